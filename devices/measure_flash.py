"""How fast a file can be read past the page cache, by request size and by requests in flight."""

from __future__ import annotations

import errno
import mmap
import os
import random
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from devices.profile import FlashPoint, Rate
from edgert.errors import MeasurementError

Clock = Callable[[], float]

_PAGE_BYTES = 4096
_RANDOM_UP_TO_BYTES = 64 << 10
_MOST_REQUESTS = 1 << 14
_SCRATCH_CHUNK_BYTES = 4 << 20
_SCRATCH_SHARE = 8  # of the free space at most one part in so many
LEAST_SCRATCH_BYTES = 16 << 20


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


@dataclass(frozen=True, slots=True)
class CurveProbe:
    """Which points of the curve are measured, and for how long.

    Attributes:
        sizes_bytes: Request sizes; those up to 64 KiB read at random places.
        depths: Requests in flight.
        n_repetitions: Of each point; the median counts.
        random_s: Seconds of all repetitions of a point of small requests.
        sequential_s: The same of large ones.
        sustained_s: The same of the last point, largest and deepest, which is how weights stream:
            longer than a device or a throttle gives a burst for.
        most_bytes: Bytes that one repetition reads at most.
    """

    sizes_bytes: tuple[int, ...] = (4 << 10, 64 << 10, 512 << 10, 2 << 20)
    depths: tuple[int, ...] = (1, 4, 8)
    n_repetitions: int = 3
    random_s: float = 0.3
    sequential_s: float = 0.6
    sustained_s: float = 3.0
    most_bytes: int = 4 << 30


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
    with _opened(path) as descriptor:
        end = min(os.fstat(descriptor).st_size, probe.most_bytes)
        offsets = range(0, end, probe.request_bytes)
        n_bytes, duration_s = _read(descriptor, probe, iter(offsets), clock)
    return Rate(value=_rate(path, n_bytes, duration_s), origin="measured")


def measure_curve(
    path: Path, probe: CurveProbe = CurveProbe(), clock: Clock = time.monotonic
) -> tuple[FlashPoint, ...]:
    """Read `path` with every request size and depth and return the rates.

    Small requests read at random places, as rows of an embedding are; large ones one after the
    other, as layers are, each repetition where the last one ended.

    Raises:
        MeasurementError: the file cannot be read, or holds less than one request of each size.
    """
    points = []
    with _opened(path) as descriptor:
        size_bytes = os.fstat(descriptor).st_size
        for request_bytes in probe.sizes_bytes:
            if request_bytes > size_bytes:
                break
            for depth in probe.depths:
                rates = _point(path, descriptor, request_bytes, depth, (probe, clock))
                middle = statistics.median(rates)
                spread = (max(rates) - min(rates)) / 2 / middle
                rate = Rate(value=middle, origin="measured", spread=spread)
                points.append(
                    FlashPoint(request_bytes=request_bytes, n_in_flight=depth, bytes_per_s=rate)
                )
    if not points:
        raise MeasurementError(
            f"{path}: nothing to measure in {size_bytes:,} bytes, "
            f"wanted {min(probe.sizes_bytes):,} or more"
        )
    return tuple(points)


@contextmanager
def scratch_file(folder: Path, size_bytes: int) -> Iterator[Path]:
    """Write a temporary file to read from, and remove it afterwards.

    Args:
        folder: On the storage in question; made if it is not there.
        size_bytes: Wanted; less where little space is free.

    Raises:
        MeasurementError: the folder cannot be written, or its file system is (almost) full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free_bytes = shutil.disk_usage(folder).free
        size_bytes = min(size_bytes, free_bytes // _SCRATCH_SHARE)
        if size_bytes < LEAST_SCRATCH_BYTES:
            raise MeasurementError(
                f"{folder}: {free_bytes:,} bytes free, too little for a probe of the flash",
                hint="make room there, or name a model file: it is read instead",
            )
        descriptor, name = tempfile.mkstemp(prefix="flash-probe-", dir=folder)
    except OSError as error:
        raise MeasurementError(f"{folder}: cannot write a probe: {error.strerror}") from error
    path = Path(name)
    try:
        try:
            _fill(descriptor, size_bytes)
        except OSError as error:
            raise MeasurementError(f"{path}: cannot write a probe: {error.strerror}") from error
        finally:
            os.close(descriptor)
        yield path
    finally:
        with suppress(OSError):
            path.unlink()


def _fill(descriptor: int, size_bytes: int) -> None:
    """Write incompressible bytes and wait until the device has them."""
    chunk = os.urandom(_SCRATCH_CHUNK_BYTES)
    left = size_bytes // _PAGE_BYTES * _PAGE_BYTES
    while left > 0:
        left -= os.write(descriptor, chunk[:left])
    os.fsync(descriptor)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    try:
        direct = supports_direct(path)
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    except OSError as error:
        raise MeasurementError(f"{path}: cannot measure its flash: {error.strerror}") from error
    try:
        if not direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        yield descriptor
    except OSError as error:
        raise MeasurementError(f"{path}: reading failed: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _point(
    path: Path, descriptor: int, request_bytes: int, depth: int, how: tuple[CurveProbe, Clock]
) -> list[float]:
    """Return the rate of each repetition of one point."""
    curve, clock = how
    is_random = request_bytes <= _RANDOM_UP_TO_BYTES
    whole_s = curve.random_s if is_random else curve.sequential_s
    if (request_bytes, depth) == (curve.sizes_bytes[-1], curve.depths[-1]):
        whole_s = curve.sustained_s
    part_s = whole_s / curve.n_repetitions
    probe = Probe(request_bytes, depth, curve.most_bytes, part_s)
    places = _places(os.fstat(descriptor).st_size, request_bytes, curve.most_bytes)
    rates: list[float] = []
    while len(rates) < curve.n_repetitions:
        n_bytes, duration_s = _read(descriptor, probe, places, clock)
        if n_bytes == 0 and rates:
            break  # every place was read already
        rates.append(_rate(path, n_bytes, duration_s))
    return rates


def _places(size_bytes: int, request_bytes: int, most_bytes: int) -> Iterator[int]:
    """Return offsets of whole requests; what several threads may iterate over."""
    n_places = size_bytes // request_bytes
    n_requests = max(1, min(most_bytes // request_bytes, _MOST_REQUESTS))
    if request_bytes <= _RANDOM_UP_TO_BYTES:
        chosen = random.Random(request_bytes)
        slots = [chosen.randrange(n_places) for _ in range(n_requests)]
    else:
        slots = [index % n_places for index in range(n_requests)]
    return iter([slot * request_bytes for slot in slots])


def _rate(path: Path, n_bytes: int, duration_s: float) -> float:
    if n_bytes == 0 or duration_s <= 0:
        raise MeasurementError(f"{path}: nothing to measure in {n_bytes:,} bytes")
    return n_bytes / duration_s


def _read(descriptor: int, probe: Probe, offsets: Iterator[int], clock: Clock) -> tuple[int, float]:
    """Return bytes read and seconds taken; every reader has a buffer and takes the next offset."""
    start_s = clock()

    def reader() -> int:
        n_bytes = 0
        with mmap.mmap(-1, probe.request_bytes) as buffer:
            # next() on an iterator of a range or a list is atomic under the interpreter lock.
            while clock() - start_s < probe.most_s and (offset := next(offsets, None)) is not None:
                n_bytes += os.preadv(descriptor, [buffer], offset)
        return n_bytes

    with ThreadPoolExecutor(probe.n_in_flight, thread_name_prefix="flash-probe") as pool:
        readers = [pool.submit(reader) for _ in range(probe.n_in_flight)]
        n_bytes = sum(future.result() for future in readers)
    return n_bytes, clock() - start_s
