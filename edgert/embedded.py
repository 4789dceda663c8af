"""The models inside edgert: where they are."""

from __future__ import annotations

import importlib.resources
from pathlib import Path

from edgert.errors import ConfigError

EMBEDDED_MODEL = "tiny-chat.gguf"
EMBEDDED_DRAFT = "tiny-draft.gguf"
EMBEDDED_EXPERTS = "tiny-moe.gguf"
EMBEDDED = (EMBEDDED_MODEL, EMBEDDED_DRAFT, EMBEDDED_EXPERTS)


def embedded_path(name: str) -> Path:
    """Return the path of a model inside edgert; ConfigError if it is not installed."""
    path = Path(str(importlib.resources.files("edgert") / "models" / name))
    if not path.is_file():
        raise ConfigError(
            f"{path}: the model inside edgert is missing",
            hint="name a GGUF file, or reinstall edgert",
        )
    return path


def named_path(name: str) -> Path | None:
    """Return the path of the model inside edgert with this name, None if it names something else.

    Args:
        name: Such as "tiny-moe"; a file or folder of that name goes first.

    Raises:
        ConfigError: it is not installed.
    """
    file = f"{name}.gguf"
    return embedded_path(file) if file in EMBEDDED and not Path(name).exists() else None
