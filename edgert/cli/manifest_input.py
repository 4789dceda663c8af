"""From the name of a manifest to a checked one that a trusted key signed, where keys are set."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from edgert.cli.opening import user_path

if TYPE_CHECKING:
    from edgert.cli.options import TrustFlags
    from partition.manifest import Manifest


def is_manifest(name: str) -> bool:
    """Whether a file that a person named is a manifest, not a model."""
    return name.lower().endswith(".json")


def open_manifest(name: str, trust: TrustFlags) -> tuple[Path, Manifest]:
    """Read a manifest and check its rules and signature; return its path too.

    Raises:
        ConfigError: there is no such file, or a trusted key is none.
        FormatError: it breaks a rule, or no trusted key signed it.
    """
    from edgert.signing import trusted_keys, verify
    from partition.manifest_file import read_manifest

    path = user_path(name)
    trusted = trusted_keys(trust.trusted_keys)
    manifest = read_manifest(path)
    verify(manifest, trusted, str(path))
    return path, manifest
