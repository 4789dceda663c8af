"""Temporary files that the flash probe reads, and those that a killed probe left behind."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from edgert.errors import MeasurementError

logger = logging.getLogger(__name__)

LEAST_BYTES = 16 << 20
_PREFIX = "flash-probe-"
_PAGE_BYTES = 4096
_CHUNK_BYTES = 4 << 20
_SHARE = 8  # of the free space at most one part in so many


def remove_stale(folder: Path) -> None:
    """Remove files of probes that were killed; call it while no other process may be measuring."""
    for path in folder.glob(f"{_PREFIX}*"):
        if path.is_symlink() or not path.is_file():
            continue
        try:
            path.unlink()
        except OSError as error:
            logger.warning("%s: left by an earlier probe and not removed: %s", path, error.strerror)


@contextmanager
def scratch_file(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Write a temporary file to read from; it has no name once it is full: nothing is left behind.

    Args:
        folder: On the storage in question; made if it is not there.
        size_bytes: Wanted; less where little space is free.

    Raises:
        MeasurementError: the folder cannot be written, or its file system is (almost) full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
        size_bytes = min(size_bytes, free_bytes // _SHARE)
        if size_bytes < LEAST_BYTES:
            raise MeasurementError(
                f"{folder}: {free_bytes:,} bytes free, too little for a probe of the flash",
                hint="make room there, or name a model file: it is read instead",
            )
        descriptor, name = tempfile.mkstemp(prefix=_PREFIX, dir=folder)
    except OSError as error:
        raise MeasurementError(f"{folder}: cannot write a probe: {error.strerror}") from error
    path = Path(name)
    try:
        try:
            _fill(descriptor, size_bytes)
        except OSError as error:
            raise MeasurementError(f"{path}: cannot write a probe: {error.strerror}") from error
        finally:
            with suppress(OSError):
                path.unlink()
        yield Path(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)


def _fill(descriptor: int, size_bytes: int) -> None:
    """Write incompressible bytes and wait until the device has them."""
    chunk = os.urandom(_CHUNK_BYTES)
    left = size_bytes // _PAGE_BYTES * _PAGE_BYTES
    while left > 0:
        left -= os.write(descriptor, chunk[:left])
    os.fsync(descriptor)
