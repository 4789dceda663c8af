"""Finds the files of a manifest's model and checks that they are the very ones, to the bit."""

from __future__ import annotations

import hashlib
import logging
import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, BinaryIO, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgert.atomic_file import write_file
from edgert.errors import Cancelled, ConfigError, EdgertError, FormatError
from edgert.events import Listener, LoadProgress, ignore
from edgert.strict_json import LARGEST_BYTES
from partition.manifest import Manifest, ModelFile, Sha256

logger = logging.getLogger(__name__)

Stop = Callable[[], bool]

_CHUNK_BYTES = 4 << 20
_MOST_REMEMBERED = 1000


class _FileHash(BaseModel):
    """What a file was like when it was hashed; another length, time or inode is another file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    size_bytes: Annotated[int, Field(ge=0)]
    modified_ns: int
    changed_ns: int
    inode: int
    sha256: Sha256


class _HashFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    format_version: Literal[1] = 1
    files: dict[str, _FileHash] = {}


def never() -> bool:
    """Do not stop."""
    return False


def file_sha256(path: Path, listener: Listener = ignore, stopped: Stop = never) -> str:
    """Hash a file, a piece at a time.

    Args:
        path: A regular file.
        listener: Hears `LoadProgress`.
        stopped: Asked now and then.

    Raises:
        ConfigError: it cannot be read.
        FormatError: it changed meanwhile.
        Cancelled: `stopped` said so.
    """
    return _hash(path, listener, stopped).sha256


class FileHashes:
    """Hashes of files, remembered from run to run where there is a cache folder.

    Args:
        folder: The cache folder; None remembers nothing.
        listener: Hears `LoadProgress` while a file is hashed.
        stopped: Asked now and then whether to give up.
    """

    def __init__(
        self, folder: Path | None = None, listener: Listener = ignore, stopped: Stop = never
    ) -> None:
        self._path = None if folder is None else folder / "file-hashes.json"
        self._listener = listener
        self._stopped = stopped

    def of(self, path: Path) -> str:
        """Return the sha256 of a file; raises as `file_sha256` does."""
        if self._path is None:
            return file_sha256(path, self._listener, self._stopped)
        place = str(path.resolve())
        known = _remembered(self._path).get(place)
        if known is not None and known == _described(_status(path), known.sha256):
            return known.sha256
        found = _hash(path, self._listener, self._stopped)
        self._remember(place, found)
        return found.sha256

    def _remember(self, place: str, found: _FileHash) -> None:
        """Add a hash; a cache that cannot be written to costs time only."""
        if self._path is None:
            return
        files = _remembered(self._path)
        files.pop(place, None)  # the latest are at the end, the earliest are forgotten
        kept = dict([*files.items(), (place, found)][-_MOST_REMEMBERED:])
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            content = _HashFile(files=kept).model_dump_json().encode()
            write_file(self._path, content, replace=True)
        except (OSError, EdgertError, UnicodeEncodeError, ValueError) as error:
            logger.warning("file hashes are not remembered: %s", error)


def locate(
    manifest: Manifest,
    manifest_path: Path,
    override: Path | None = None,
    hashes: FileHashes | None = None,
) -> tuple[Path, ...]:
    """Return the files in the manifest's order, each of the size and hash it names.

    Those of the model come first, those of its variants behind; see `paths_of`.

    Args:
        manifest: What names them.
        manifest_path: Its file; paths are relative to its folder.
        override: A file or folder named by a person instead: the first file (others lie beside it
            as they do in the manifest), or the folder that paths are relative to. Variants that do
            not lie beside a file that is named may lie beside the manifest.
        hashes: What hashes them; None remembers nothing.

    Raises:
        ConfigError: a file is missing or cannot be read.
        FormatError: a file is another one; names both sizes or hashes.
    """
    paths = find(manifest, manifest_path, override)
    hashes = hashes or FileHashes()
    for file, path in zip(files_of(manifest), paths, strict=True):
        check_hash(path, file, hashes.of(path))
    return paths


def find(manifest: Manifest, manifest_path: Path, override: Path | None = None) -> tuple[Path, ...]:
    """As `locate`, but checks sizes only."""
    paths = tuple(_place(manifest, file, manifest_path, override) for file in files_of(manifest))
    for file, path in zip(files_of(manifest), paths, strict=True):
        if not path.exists():
            raise ConfigError(
                f"{path}: there is no such file, the manifest's model {manifest.model.name} "
                f"has {file.path}",
                hint="name the model with -m FILE, or put it beside the manifest",
            )
        saw = _status(path).st_size
        if saw != file.size_bytes:
            raise FormatError(
                f"{saw:,} bytes, the manifest says {file.size_bytes:,}",
                path=path,
                hint="the file is cut short or another model; plan again for this one",
            )
    return paths


def files_of(manifest: Manifest) -> tuple[ModelFile, ...]:
    """Return the files of the model, then those of each variant."""
    return tuple(file for model in (manifest.model, *manifest.variants) for file in model.files)


def paths_of(
    manifest: Manifest, paths: Sequence[Path], variant: int | None = None
) -> tuple[Path, ...]:
    """Return which of the paths of `locate` are of the model, or of one of its variants."""
    counts = [len(model.files) for model in (manifest.model, *manifest.variants)]
    index = 0 if variant is None else 1 + variant
    first = sum(counts[:index])
    return tuple(paths[first : first + counts[index]])


def check_hash(path: Path, file: ModelFile, saw: str) -> None:
    """Compare a file's hash with the one the manifest names; FormatError names both."""
    if saw != file.sha256:
        raise FormatError(
            f"sha256 is {saw}, the manifest says {file.sha256}",
            path=path,
            hint="the file is damaged or another model; plan again for this one",
        )


def _place(manifest: Manifest, file: ModelFile, manifest_path: Path, override: Path | None) -> Path:
    if override is None:
        return manifest_path.parent / file.path
    if override.is_dir():
        return override / file.path
    if file not in manifest.model.files:
        beside_it = override.parent / file.path
        return beside_it if beside_it.exists() else manifest_path.parent / file.path
    first = manifest.model.files[0].path
    if file.path == first:
        return override
    beside = os.path.relpath(file.path, Path(first).parent)
    if ".." in Path(beside).parts:
        raise ConfigError(
            f"{file.path} does not lie below the folder of {first}, for which {override} is named",
            hint="name the folder that holds both with -m FOLDER",
        )
    return override.parent / beside


def _status(path: Path) -> os.stat_result:
    try:
        status = path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path}: not a regular file", hint="name a model file with -m FILE")
    return status


def _unreadable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(
        f"{path}: cannot read it: {error.strerror or error}", hint="check its permissions"
    )


def _described(status: os.stat_result, sha256: str) -> _FileHash:
    return _FileHash(
        size_bytes=status.st_size,
        modified_ns=status.st_mtime_ns,
        changed_ns=status.st_ctime_ns,
        inode=status.st_ino,
        sha256=sha256,
    )


def _hash(path: Path, listener: Listener, stopped: Stop) -> _FileHash:
    before = _status(path)  # opening a pipe would wait for a writer
    try:
        with path.open("rb", buffering=0) as stream:
            digest = _read_all(stream, before.st_size, listener, stopped)
            after = os.fstat(stream.fileno())
    except OSError as error:
        raise _unreadable(path, error) from error
    found = _described(before, digest)
    if found != _described(after, digest):
        raise FormatError("the file changed while it was read", path=path, hint="try again")
    return found


def _read_all(stream: BinaryIO, size_bytes: int, listener: Listener, stopped: Stop) -> str:
    digest, done, buffer = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK_BYTES))
    while n_read := stream.readinto(buffer):  # type: ignore[attr-defined]
        digest.update(buffer[:n_read])
        done += n_read
        listener(LoadProgress(done, max(size_bytes, done)))
        if stopped():
            raise Cancelled("stopped while checking the model")
    return digest.hexdigest()


def _remembered(path: Path) -> dict[str, _FileHash]:
    try:
        with path.open("rb") as stream:
            content = stream.read(LARGEST_BYTES)
        return dict(_HashFile.model_validate_json(content).files)
    except FileNotFoundError:
        return {}
    except (OSError, ValidationError) as error:
        logger.warning("%s is damaged and ignored: %s", path, type(error).__name__)
        return {}
