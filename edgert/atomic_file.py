"""Writes a file whole or not at all: beside its place, to the disk, then renamed."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from edgert.errors import CapacityError, ConfigError, EdgertError

READABLE, PRIVATE = 0o666, 0o600  # before the umask

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


def write_file(path: Path, content: bytes, *, replace: bool, mode: int = READABLE) -> None:
    """Write a file; a failure leaves what was there, and nothing else.

    Args:
        path: Its place; the folder must exist.
        content: All of it.
        replace: Whether it may take the place of another file.
        mode: Permissions, before the umask.

    Raises:
        ConfigError: it exists and `replace` is off, or the folder cannot be written to.
        CapacityError: the disk is full.
    """

    def write(stream: BinaryIO) -> None:
        stream.write(content)

    write_stream(path, write, replace=replace, mode=mode)


def write_stream(
    path: Path, write: Callable[[BinaryIO], None], *, replace: bool, mode: int = READABLE
) -> None:
    """As `write_file`, for content that `write` puts into a stream."""
    draft = FileDraft(path, replace=replace, mode=mode)
    try:
        write(draft.stream)
    except OSError as error:
        draft.drop()
        raise write_error(path, error) from error
    except BaseException:
        draft.drop()
        raise
    draft.keep()


def write_error(path: Path, error: OSError) -> EdgertError:
    """Return what a failed write to `path` means."""
    reason = error.strerror or str(error)
    if error.errno in _NO_ROOM:
        return CapacityError(f"{path}: {reason}", hint="free some space, or write elsewhere")
    return ConfigError(
        f"{path}: cannot write it: {reason}", hint="choose a folder that exists and can be written"
    )


def sync_folder(folder: Path) -> None:
    """Make renames in a folder durable, where its file system can."""
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with suppress(OSError):
            os.fsync(number)
    finally:
        os.close(number)


class FileDraft:
    """A file that grows beside its place until it is kept there, whole, or dropped.

    Args:
        path: Its place; the folder must exist.
        replace: Whether it may take the place of another file.
        mode: Permissions, before the umask.

    Raises:
        ConfigError: it exists and `replace` is off, or the folder cannot be written to.
        CapacityError: the disk is full; from every method.
    """

    def __init__(self, path: Path, *, replace: bool, mode: int = READABLE) -> None:
        if not replace and os.path.lexists(path):
            raise _exists(path)
        self._path = path
        self._replace = replace
        self._temporary = path.parent / f".edgert-{secrets.token_hex(8)}.tmp"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self.stream: BinaryIO = os.fdopen(os.open(self._temporary, flags, mode), "wb")
        except OSError as error:
            raise write_error(path, error) from error

    def write(self, content: bytes) -> None:
        """Add to it."""
        try:
            self.stream.write(content)
        except OSError as error:
            raise write_error(self._path, error) from error

    def keep(self) -> None:
        """Move it to its place, on the disk; where that fails it is dropped."""
        try:
            self._keep()
        except FileExistsError as error:
            raise _exists(self._path) from error
        except OSError as error:
            raise write_error(self._path, error) from error

    def drop(self) -> None:
        """Leave what was there, and nothing else."""
        with suppress(OSError):
            self.stream.close()
        with suppress(OSError):
            self._temporary.unlink()

    def _keep(self) -> None:
        try:
            with self.stream as stream:
                stream.flush()
                os.fsync(stream.fileno())
            if self._replace:
                self._temporary.replace(self._path)
            else:
                _move_to_free_place(self._temporary, self._path)
        except BaseException:
            self.drop()
            raise
        sync_folder(self._path.parent)


def _exists(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: there is such a file already", hint="move it, or choose a new name"
    )


def _move_to_free_place(temporary: Path, path: Path) -> None:
    """Rename without replacing: a link fails where something is; a rename would not."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC))
        temporary.replace(path)
        return
    temporary.unlink()
