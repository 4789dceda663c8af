"""Writes `blobs/` and `hosts/<host_id>/` for a manifest; a host's manifest is written last."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgert.atomic_file import sync_folder, write_error, write_file
from edgert.errors import ConfigError
from edgert.events import Listener, LoadProgress, ignore
from edgert.model_files import FileHashes
from edgert.packing.blobs import Blob, BlobStore, Recipe, file_blob
from edgert.packing.materialise import (
    Artifact,
    HostPart,
    Materialiser,
    PartKind,
    materialise,
    whole_model,
)
from edgert.packing.parts import parts_of_model
from partition.manifest import Manifest
from partition.manifest_file import canonical_json

Stored = tuple[Artifact, Blob]

INDEX, MANIFEST = "files.json", "manifest.json"
MATERIALISERS: Mapping[PartKind, Materialiser] = {
    "whole": whole_model,
    "layers": parts_of_model,
    "share": parts_of_model,
}


@dataclass(frozen=True, slots=True)
class Packed:
    """What `pack` did.

    Attributes:
        host_folders: By host.
        n_written: Blobs that were written.
        n_kept: Blobs that were there already.
    """

    host_folders: Mapping[str, Path]
    n_written: int
    n_kept: int


class _Advance:
    """Adds up what is done of all blobs; pieces written twice count once."""

    def __init__(self, total_bytes: int, listener: Listener) -> None:
        self._done_bytes = 0
        self._total_bytes = total_bytes
        self._listener = listener

    def __call__(self, n_bytes: int) -> None:
        """Count some bytes more."""
        self._done_bytes = min(self._done_bytes + n_bytes, self._total_bytes)
        self._listener(LoadProgress(self._done_bytes, self._total_bytes))


def pack(
    manifest: Manifest,
    model_paths: tuple[Path, ...],
    out: Path,
    hashes: FileHashes | None = None,
    *,
    listener: Listener = ignore,
    materialisers: Mapping[PartKind, Materialiser] = MATERIALISERS,
) -> Packed:
    """Write what each host needs; called again, it continues and repairs.

    Args:
        manifest: Checked, its model found.
        model_paths: The files of the model and of its variants, see `edgert.model_files.find`;
            hashes are checked here.
        out: The folder; made when it is missing.
        hashes: Checks blobs that are there; None remembers nothing.
        listener: Hears `LoadProgress`.
        materialisers: What can be made, by kind of part.

    Raises:
        ConfigError: a host needs what cannot be made yet, or `out` cannot be written to.
        FormatError: a source is not what the manifest says.
        CapacityError: the disk is full.
    """
    hashes = hashes or FileHashes()
    files = {
        host.host_id: materialise(_part(manifest, host.host_id, model_paths, hashes), materialisers)
        for host in manifest.hosts
    }
    for host_id, artifacts in files.items():
        _check_names(host_id, artifacts)
    blobs = tuple({a.blob.key: a.blob for own in files.values() for a in own}.values())
    total_bytes = sum(blob.size_bytes for blob in blobs)
    with _locked(out):
        store = BlobStore(out / "blobs", hashes, _Advance(total_bytes, listener))
        store.check_room(blobs, _copies_bytes(out, files, store))
        stored = {blob.key: _store(store, blob) for blob in blobs}
        n_written = sum(was_written for _, was_written in stored.values())
        folders = {}
        for host_id, artifacts in files.items():
            made = tuple((a, stored[a.blob.key][0]) for a in artifacts)
            folders[host_id] = _write_host(out, host_id, made, store, manifest)
    return Packed(folders, n_written, len(blobs) - n_written)


def _part(
    manifest: Manifest, host_id: str, model_paths: tuple[Path, ...], hashes: FileHashes
) -> HostPart:
    stages = tuple(stage for stage in manifest.stages if stage.host_id == host_id)
    return HostPart(manifest, host_id, stages, model_paths, hashes)


def _store(store: BlobStore, content: Blob | Recipe) -> tuple[Blob, bool]:
    """Store content; return it with its hash, and whether it was written."""
    if isinstance(content, Recipe):
        return store.make(content)
    return content, store.put(content)


def _check_names(host_id: str, artifacts: tuple[Artifact, ...]) -> None:
    for artifact in artifacts:
        if artifact.path.split("/")[0] in (INDEX, MANIFEST):
            raise ConfigError(
                f"host {host_id}: a file of the model is named {artifact.path}, as a file of ours",
                hint="rename the model and plan again",
            )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Hold a folder for this process alone."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        number = os.open(out / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileExistsError as error:
        raise ConfigError(f"{out}: is a file, wanted a folder", hint="choose a new name") from error
    except OSError as error:
        raise write_error(out, error) from error
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{out}: another edgert pack is writing there", hint="wait for it to end"
            ) from error
        yield
    finally:
        os.close(number)


def _write_host(
    out: Path, host_id: str, files: tuple[Stored, ...], store: BlobStore, manifest: Manifest
) -> Path:
    folder = _folder(out, host_id)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for artifact, blob in files:
            _place(store, blob, folder / artifact.path)
    except OSError as error:
        raise write_error(folder, error) from error
    write_file(folder / INDEX, _index(host_id, files), replace=True)
    write_file(folder / MANIFEST, canonical_json(manifest), replace=True)
    return folder


def _copies_bytes(out: Path, files: Mapping[str, tuple[Artifact, ...]], store: BlobStore) -> int:
    """Return the bytes of the copies that are missing where the disk has no links."""
    try:
        linked = _can_link(out)
    except OSError as error:
        raise write_error(out, error) from error
    if linked:
        return 0
    return sum(
        artifact.blob.size_bytes
        for host_id, artifacts in files.items()
        for artifact in artifacts
        if (blob := store.known(artifact.blob)) is None
        or not store.is_whole(_folder(out, host_id) / artifact.path, blob)
    )


def _can_link(folder: Path) -> bool:
    """Whether files of a folder's disk can have two names."""
    name = f".edgert-{secrets.token_hex(8)}"
    one, other = folder / f"{name}.tmp", folder / f"{name}-link.tmp"
    one.touch(exist_ok=False)
    try:
        os.link(one, other)
    except OSError:
        return False
    finally:
        one.unlink()
        other.unlink(missing_ok=True)
    return True


def _folder(out: Path, host_id: str) -> Path:
    return out / "hosts" / host_id


def _place(store: BlobStore, blob: Blob, target: Path) -> None:
    """Give a blob its name in a host's folder: a second link, or a copy where the disk has none."""
    blob_path = store.place(blob)
    if target.is_file() and target.samefile(blob_path):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.parent / f".edgert-{secrets.token_hex(8)}.tmp"
    try:
        try:
            os.link(blob_path, temporary)
        except OSError:
            if store.is_whole(target, blob):
                return
            _copy(blob_path, temporary, blob)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(target.parent)


def _copy(blob_path: Path, temporary: Path, blob: Blob) -> None:
    with temporary.open("xb") as stream:
        for chunk in file_blob(blob_path, blob.sha256, blob.size_bytes).read(0):
            stream.write(chunk)
        stream.flush()
        os.fsync(stream.fileno())


def _index(host_id: str, files: tuple[Stored, ...]) -> bytes:
    listed = [
        {
            "path": artifact.path,
            "role": artifact.role,
            **({} if artifact.stage_id is None else {"stage_id": artifact.stage_id}),
            "blob": f"../../blobs/sha256/{blob.sha256}",
            "sha256": blob.sha256,
            "size_bytes": blob.size_bytes,
        }
        for artifact, blob in files
    ]
    document = {"format_version": 1, "host_id": host_id, "files": listed}
    return (json.dumps(document, sort_keys=True, indent=1) + "\n").encode()
