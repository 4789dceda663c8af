"""How fast a file can be read past the page cache: sequential O_DIRECT reads, a few in flight."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from devices.profile import Rate
from edgert.errors import MeasurementError

Clock = Callable[[], float]

_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Probe:
    """How much is read, and how.

    Attributes:
        request_bytes: Size of one read; a multiple of 4096.
        n_in_flight: Reads under way at the same time.
        most_bytes: Stop after this many bytes.
        most_s: Stop after this many seconds.
    """

    request_bytes: int = 4 << 20
    n_in_flight: int = 4
    most_bytes: int = 1 << 30
    most_s: float = 3.0


def supports_direct(path: Path) -> bool:
    """Say whether the file system of `path` reads it with O_DIRECT."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return False
        raise
    try:
        with mmap.mmap(-1, _PAGE_BYTES) as buffer:
            os.preadv(descriptor, [buffer], 0)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return hasattr(os, "O_DIRECT")


def measure_flash(path: Path, probe: Probe = Probe(), clock: Clock = time.monotonic) -> Rate:
    """Read `path` from its start and return the rate.

    Where O_DIRECT does not work, pages are dropped from the cache first and read through it.

    Raises:
        MeasurementError: the file cannot be read, or is empty.
    """
    try:
        direct = supports_direct(path)
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    except OSError as error:
        raise MeasurementError(f"{path}: cannot measure its flash: {error.strerror}") from error
    try:
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        n_bytes, duration_s = _read(descriptor, probe, clock)
    except OSError as error:
        raise MeasurementError(f"{path}: reading failed: {error.strerror}") from error
    finally:
        os.close(descriptor)
    if n_bytes == 0 or duration_s <= 0:
        raise MeasurementError(f"{path}: nothing to measure in {n_bytes:,} bytes")
    return Rate(n_bytes / duration_s, "measured")


def _read(descriptor: int, probe: Probe, clock: Clock) -> tuple[int, float]:
    """Return bytes read and seconds taken; every reader has a buffer and takes the next offset."""
    end = min(os.fstat(descriptor).st_size, probe.most_bytes)
    offsets = iter(range(0, end, probe.request_bytes))
    start_s = clock()

    def reader() -> int:
        n_bytes = 0
        with mmap.mmap(-1, probe.request_bytes) as buffer:
            # next() on a range iterator is atomic under the interpreter lock.
            while clock() - start_s < probe.most_s and (offset := next(offsets, None)) is not None:
                n_bytes += os.preadv(descriptor, [buffer], offset)
        return n_bytes

    with ThreadPoolExecutor(probe.n_in_flight, thread_name_prefix="flash-probe") as pool:
        readers = [pool.submit(reader) for _ in range(probe.n_in_flight)]
        n_bytes = sum(future.result() for future in readers)
    return n_bytes, clock() - start_s
