"""The models inside edgert: where they are."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from edgert.errors import ConfigError

EMBEDDED_MODEL = "tiny-chat.gguf"
EMBEDDED_DRAFT = "tiny-draft.gguf"


def embedded_path(name: str) -> Path:
    """Return the path of a model inside edgert; ConfigError if it is not installed."""
    path = Path(str(importlib.resources.files("edgert") / "models" / name))
    if not path.is_file():
        raise ConfigError(
            f"{path}: the model inside edgert is missing",
            hint="name a GGUF file, or reinstall edgert",
        )
    return path
