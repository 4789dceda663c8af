"""The manifest of home alone that another one names for when its hosts are gone."""

from __future__ import annotations

import hashlib
from pathlib import Path

from edgert.errors import FormatError
from partition.manifest import Fallback, Manifest
from partition.manifest_file import canonical_json, read_manifest

_HINT = "make both again: edgert plan MODEL --fallback FILE"


def read_fallback(manifest: Manifest, path: Path) -> tuple[Manifest, Path] | None:
    """Return the fallback of a manifest and its file, None where it has none.

    Args:
        manifest: Valid.
        path: Its file; the fallback lies relative to it.

    Raises:
        ConfigError: the file is not there.
        FormatError: it is another one, of another model, or no manifest of home alone.
    """
    named = manifest.policies.fallback
    if named is None:
        return None
    place = path.parent / named.path
    found = read_manifest(place)
    digest = fallback_hash(found)
    if digest != named.sha256:
        raise FormatError(
            f"SHA-256 is {digest}, {path} names {named.sha256}", path=place, hint=_HINT
        )
    check_fallback(manifest, found, place)
    return found, place


def with_fallback(manifest: Manifest, fallback: Manifest, path: str) -> Manifest:
    """Return a manifest that names another one, which lies beside it.

    Raises:
        FormatError: the other one is no fallback of it.
    """
    check_fallback(manifest, fallback, Path(path))
    named = Fallback(path=path, sha256=fallback_hash(fallback))
    policies = manifest.policies.model_copy(update={"fallback": named})
    return manifest.model_copy(update={"policies": policies})


def fallback_hash(manifest: Manifest) -> str:
    """Return the SHA-256 that a manifest names its fallback by, whether that is signed or not."""
    unsigned = manifest.model_copy(update={"signature": None})
    return hashlib.sha256(canonical_json(unsigned)).hexdigest()


def check_fallback(manifest: Manifest, fallback: Manifest, place: Path) -> None:
    """Refuse what cannot go on where a manifest's hosts left off; FormatError."""
    run, home = fallback.run, manifest.policies.home
    hosts = [host.host_id for host in fallback.hosts]
    files = [file.sha256 for file in manifest.model.files]
    wrong = {
        f"runs on {', '.join(hosts)}, wanted {home} alone": hosts != [home],
        "is of another model": [file.sha256 for file in fallback.model.files] != files,
        f"holds {run.n_ctx} positions, wanted {manifest.run.n_ctx}": (
            run.n_ctx < manifest.run.n_ctx
        ),
        f"takes batches of {run.n_batch}, wanted {manifest.run.n_batch}": (
            run.n_batch < manifest.run.n_batch
        ),
        f"gives {run.n_logits_max} logits at once, wanted {manifest.run.n_logits_max}": (
            run.n_logits_max < manifest.run.n_logits_max
        ),
    }
    for reason, found in wrong.items():
        if found:
            raise FormatError(f"the fallback {reason}", path=place, hint=_HINT)
