"""Files named by their content: written once, continued after a cut, never there half."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from edgert.atomic_file import sync_folder, write_error, write_file
from edgert.errors import CapacityError, ConfigError, FormatError
from edgert.model_files import FileHashes

logger = logging.getLogger(__name__)

CHUNK_BYTES = 4 << 20
_MARKED_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class Blob:
    """Content to be stored.

    Attributes:
        sha256: Of all of it.
        size_bytes: Of all of it.
        source: Where it is from, for errors.
        read: Yields it in pieces, from an offset on; the same bytes every time.
    """

    sha256: str
    size_bytes: int
    source: str
    read: Callable[[int], Iterator[bytes]]

    @property
    def key(self) -> str:
        """What names the content."""
        return self.sha256


@dataclass(frozen=True, slots=True)
class Recipe:
    """Content that is made while it is stored, so that its hash is known only then.

    Attributes:
        key: What decides every byte of it, as long as a hash: equal keys, equal content.
        size_bytes: Of all of it.
        source: What it is made of, for errors.
        check: Asked before anything is made whether the source is what the key says.
        read: Makes it in pieces, from an offset on; the same bytes every time.
    """

    key: str
    size_bytes: int
    source: str
    check: Callable[[], None]
    read: Callable[[int], Iterator[bytes]]


def file_blob(path: Path, sha256: str, size_bytes: int) -> Blob:
    """Describe a file as a blob; its hash is checked while it is stored."""

    def read(offset: int) -> Iterator[bytes]:
        try:
            with path.open("rb", buffering=0) as stream:
                stream.seek(offset)
                while chunk := stream.read(CHUNK_BYTES):
                    yield chunk
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot read it: {error.strerror or error}", hint="check its permissions"
            ) from error

    return Blob(sha256, size_bytes, str(path), read)


class BlobStore:
    """A folder of blobs, `sha256/<hash>`; unfinished ones end in `.part`.

    What is made by a recipe has its hash in `made/<key>`. While it is unfinished, `.mark` says how
    much of it is on the disk and the hash of that: a beginning is continued only if it is right.

    Args:
        folder: Made when it is missing.
        hashes: Checks finished blobs.
        advance: Told how many bytes more are done.
    """

    def __init__(self, folder: Path, hashes: FileHashes, advance: Callable[[int], None]) -> None:
        self._folder, self._made = folder / "sha256", folder / "made"
        self._hashes = hashes
        self._advance = advance
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._made.mkdir(exist_ok=True)
        except OSError as error:
            raise write_error(self._folder, error) from error

    def place(self, blob: Blob) -> Path:
        """Return where a blob is, once it is stored."""
        return self._folder / blob.sha256

    def check_room(self, blobs: tuple[Blob | Recipe, ...], copies_bytes: int = 0) -> None:
        """Refuse before anything is written; CapacityError when the disk is too full.

        Args:
            blobs: All that will be stored.
            copies_bytes: What their copies take beside them, on a disk without links.
        """
        needed = sum(self._missing_bytes(blob) for blob in blobs) + copies_bytes
        status = os.statvfs(self._folder)
        room = status.f_bavail * status.f_frsize
        if needed > room:
            raise CapacityError(
                f"{self._folder}: {room:,} bytes free, {needed:,} needed",
                needed_bytes=needed,
                available_bytes=room,
                hint="free some space, or pack to another disk",
            )

    def put(self, blob: Blob) -> bool:
        """Store a blob and return True, or False if it is there already, whole.

        Raises:
            FormatError: its source is shorter, longer or another than it should be.
            CapacityError: the disk is full; what was written is continued next time.
            ConfigError: the folder cannot be written to.
        """
        place = self.place(blob)
        if self.is_whole(place, blob):
            self._advance(blob.size_bytes)
            return False
        part = self._part(blob)
        try:
            saw, resumed = self._write(part, blob)
            if saw != blob.sha256 and resumed:
                logger.warning("%s is damaged and written anew", part)
                part.unlink()
                saw, _ = self._write(part, blob)
            if saw != blob.sha256:
                part.unlink()
                raise FormatError(
                    f"sha256 is {saw}, the manifest says {blob.sha256}",
                    path=blob.source,
                    hint="the file is damaged or another model; plan again for this one",
                )
            part.replace(place)
            sync_folder(self._folder)
        except OSError as error:
            raise write_error(part, error) from error
        return True

    def make(self, recipe: Recipe) -> tuple[Blob, bool]:
        """Store what a recipe makes; return it, and whether it had to be made.

        Raises:
            FormatError: the source is not what it was.
            CapacityError: the disk is full; what was made is continued next time.
            ConfigError: the folder cannot be written to.
        """
        blob = self.known(recipe)
        if blob is not None and self.is_whole(self.place(blob), blob):
            self._advance(blob.size_bytes)
            return blob, False
        recipe.check()
        part = self._part(recipe)
        try:
            sha256 = self._finish(part, recipe)
            place = self._folder / sha256
            part.replace(place)
            sync_folder(self._folder)
            write_file(self._made / recipe.key, sha256.encode(), replace=True)
            _mark_of(part).unlink(missing_ok=True)
        except OSError as error:
            raise write_error(part, error) from error
        return file_blob(place, sha256, recipe.size_bytes), True

    def known(self, content: Blob | Recipe) -> Blob | None:
        """Return a blob, also of a recipe that was followed before."""
        if isinstance(content, Blob):
            return content
        try:
            sha256 = (self._made / content.key).read_text()
        except (OSError, UnicodeDecodeError):
            return None
        if len(sha256) != len(content.key) or not sha256.isalnum():
            return None
        return file_blob(self._folder / sha256, sha256, content.size_bytes)

    def is_whole(self, place: Path, blob: Blob) -> bool:
        """Whether a file holds all of a blob and nothing else, by its hash."""
        if not place.is_file() or place.stat().st_size != blob.size_bytes:
            return False
        if self._hashes.of(place) == blob.sha256:
            return True
        logger.warning("%s is damaged and written anew", place)
        return False

    def _part(self, blob: Blob | Recipe) -> Path:
        return self._folder / f"{blob.key}.part"

    def _missing_bytes(self, blob: Blob | Recipe) -> int:
        known = self.known(blob)
        if known is not None and self.place(known).is_file():
            return 0  # whole, or replaced by as many bytes
        part = self._part(blob)
        return blob.size_bytes - (part.stat().st_size if part.is_file() else 0)

    def _write(self, part: Path, blob: Blob) -> tuple[str, bool]:
        """Bring the part to its full length; return its hash, and whether it had a beginning."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(part, flags, 0o666), "r+b", buffering=0) as stream:
            digest, begin = _hash_beginning(stream, blob.size_bytes)
            stream.truncate(begin)
            self._advance(begin)
            done = begin
            for chunk in blob.read(begin):
                done += len(chunk)
                if done > blob.size_bytes:
                    break
                _write_all(stream, chunk)
                digest.update(chunk)
                self._advance(len(chunk))
            os.fsync(stream.fileno())
        if done != blob.size_bytes:
            relation = "more than" if done > blob.size_bytes else f"ends after {done:,} of"
            raise FormatError(
                f"{relation} the {blob.size_bytes:,} bytes that the manifest says",
                path=blob.source,
                hint="the file changed; plan again for this one",
            )
        return digest.hexdigest(), begin > 0

    def _finish(self, part: Path, recipe: Recipe) -> str:
        """Bring what a recipe makes to its full length; return its hash."""
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(part, flags, 0o666), "r+b", buffering=0) as stream:
            digest, done = _trusted_beginning(stream, _mark_of(part), recipe.size_bytes)
            stream.truncate(done)
            stream.seek(done)
            self._advance(done)
            marked = done
            try:
                for chunk in recipe.read(done):
                    _write_all(stream, chunk)
                    digest.update(chunk)
                    done += len(chunk)
                    self._advance(len(chunk))
                    if done - marked >= _MARKED_BYTES:
                        _mark(stream, part, done, digest)
                        marked = done
            finally:
                if done > marked:
                    _mark(stream, part, done, digest)
        if done != recipe.size_bytes:
            raise FormatError(
                f"made {done:,} bytes, wanted {recipe.size_bytes:,}",
                path=recipe.source,
                hint="the file changed; plan again for this one",
            )
        return digest.hexdigest()


def _mark_of(part: Path) -> Path:
    return part.with_suffix(".mark")


def _mark(stream: BinaryIO, part: Path, done: int, digest: hashlib._Hash) -> None:
    """Note how much is on the disk, and its hash."""
    os.fsync(stream.fileno())
    note = {"n_bytes": done, "sha256": digest.hexdigest()}
    write_file(_mark_of(part), json.dumps(note).encode(), replace=True)


def _trusted_beginning(stream: BinaryIO, mark: Path, most_bytes: int) -> tuple[hashlib._Hash, int]:
    """Return the hash and length of what is there as it was noted; nothing where it is not."""
    try:
        note = json.loads(mark.read_bytes())
        n_bytes, wanted = note["n_bytes"], note["sha256"]
    except (OSError, ValueError, TypeError, KeyError):
        return hashlib.sha256(), 0
    if not isinstance(n_bytes, int) or not 0 <= n_bytes <= most_bytes:
        return hashlib.sha256(), 0
    digest, done = _hash_beginning(stream, n_bytes)
    if done == n_bytes and digest.hexdigest() == wanted:
        return digest, done
    logger.warning("%s is damaged and made anew", mark.with_suffix(".part"))
    return hashlib.sha256(), 0


def _hash_beginning(stream: BinaryIO, most_bytes: int) -> tuple[hashlib._Hash, int]:
    digest, done = hashlib.sha256(), 0
    while chunk := stream.read(min(CHUNK_BYTES, most_bytes - done)):
        digest.update(chunk)
        done += len(chunk)
    return digest, done


def _write_all(stream: BinaryIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    while rest:
        rest = rest[stream.write(rest) :]
