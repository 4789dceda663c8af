"""How fast a file can be read past the page cache, by request size and by requests in flight."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from devices.profile import FlashPoint, Rate
from edgert.errors import MeasurementError

Clock = Callable[[], float]

_PAGE_BYTES = 4096
_RANDOM_UP_TO_BYTES = 64 << 10
_MOST_REQUESTS = 1 << 14
_MOST_CACHED_SHARE = 0.02
_NO_CACHE_HINT = "a file on a disk that can be read with O_DIRECT; else its rate is assumed"


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
class _Source:
    """A file that is read: past the page cache, or through it after its pages were dropped."""

    path: Path
    descriptor: int
    is_direct: bool

    @property
    def size_bytes(self) -> int:
        """Length of the file."""
        return os.fstat(self.descriptor).st_size

    def forget(self) -> None:
        """Drop its pages where they are read through the cache, so that the device is measured.

        Raises:
            MeasurementError: they stay, because something uses them or memory is all there is.
        """
        if self.is_direct:
            return
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # and nothing ahead
        share = cached_share(self.descriptor)
        if share > _MOST_CACHED_SHARE:
            raise MeasurementError(
                f"{self.path}: cannot be read past the page cache, which keeps "
                f"{100 * share:.0f} % of it",
                hint=_NO_CACHE_HINT,
            )


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


def cached_share(descriptor: int) -> float:
    """Return which share of a file is in the page cache; 1.0 where the kernel does not tell.

    Source: mincore(2), which answers for files that the caller owns or may write to.
    """
    size = os.fstat(descriptor).st_size
    if size == 0:
        return 0.0
    n_pages = -(-size // mmap.PAGESIZE)
    resident = (ctypes.c_ubyte * n_pages)()
    try:
        # Private and writable, because ctypes takes addresses of writable memory only.
        with mmap.mmap(
            descriptor, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        ) as view:
            anchor = ctypes.c_char.from_buffer(view)
            address = ctypes.c_void_p(ctypes.addressof(anchor))
            failed = ctypes.CDLL(None).mincore(address, ctypes.c_size_t(size), resident)
            del anchor  # or the mapping cannot be closed
    except (OSError, ValueError, AttributeError):
        return 1.0
    return 1.0 if failed else float(np.mean(np.frombuffer(bytes(resident), np.uint8) & 1))


def measure_flash(path: Path, probe: Probe = Probe(), clock: Clock = time.monotonic) -> Rate:
    """Read `path` from its start and return the rate.

    Where O_DIRECT does not work, pages are dropped from the cache first and read through it.

    Raises:
        MeasurementError: the file cannot be read, is empty, or stays in the cache.
    """
    with _opened(path) as source:
        end = min(source.size_bytes, probe.most_bytes)
        offsets = range(0, end, probe.request_bytes)
        source.forget()
        n_bytes, duration_s = _read(source.descriptor, probe, iter(offsets), clock)
    return Rate(value=_rate(path, n_bytes, duration_s), origin="measured")


def measure_curve(
    path: Path, probe: CurveProbe = CurveProbe(), clock: Clock = time.monotonic
) -> tuple[FlashPoint, ...]:
    """Read `path` with every request size and depth and return the rates.

    Small requests read at random places, as rows of an embedding are; large ones one after the
    other, as layers are, each repetition where the last one ended. Where O_DIRECT does not work,
    a repetition reads no place twice.

    Raises:
        MeasurementError: the file cannot be read, holds less than one request of each size, or
            stays in the page cache.
    """
    points = []
    with _opened(path) as source:
        size_bytes = source.size_bytes
        for request_bytes in probe.sizes_bytes:
            if request_bytes > size_bytes:
                break
            for depth in probe.depths:
                rates = _point(source, request_bytes, depth, probe, clock)
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
def _opened(path: Path) -> Iterator[_Source]:
    try:
        direct = supports_direct(path)
        descriptor = os.open(path, os.O_RDONLY | (os.O_DIRECT if direct else 0))
    except OSError as error:
        raise MeasurementError(f"{path}: cannot measure its flash: {error.strerror}") from error
    try:
        yield _Source(path, descriptor, direct)
    except OSError as error:
        raise MeasurementError(f"{path}: reading failed: {error.strerror}") from error
    finally:
        os.close(descriptor)


def _point(
    source: _Source, request_bytes: int, depth: int, curve: CurveProbe, clock: Clock
) -> list[float]:
    """Return the rate of each repetition of one point."""
    is_random = request_bytes <= _RANDOM_UP_TO_BYTES
    whole_s = curve.random_s if is_random else curve.sequential_s
    if (request_bytes, depth) == (curve.sizes_bytes[-1], curve.depths[-1]):
        whole_s = curve.sustained_s
    part_s = whole_s / curve.n_repetitions
    probe = Probe(request_bytes, depth, curve.most_bytes, part_s)
    n_places = source.size_bytes // request_bytes
    places = _places(n_places, probe, repeat=source.is_direct)
    rates: list[float] = []
    while len(rates) < curve.n_repetitions:
        source.forget()
        part = places if source.is_direct else islice(places, n_places)
        n_bytes, duration_s = _read(source.descriptor, probe, part, clock)
        if n_bytes == 0 and rates:
            break  # every place was read already
        rates.append(_rate(source.path, n_bytes, duration_s))
    return rates


def _places(n_places: int, probe: Probe, *, repeat: bool) -> Iterator[int]:
    """Return offsets of whole requests; what several threads may iterate over.

    Args:
        n_places: Requests that the file holds.
        probe: Size of a request, and most bytes.
        repeat: Whether random places may come twice before all of them came.
    """
    n_requests = max(1, min(probe.most_bytes // probe.request_bytes, _MOST_REQUESTS))
    order = [index % n_places for index in range(n_requests)]
    if probe.request_bytes <= _RANDOM_UP_TO_BYTES:
        chosen = random.Random(probe.request_bytes)
        if repeat:
            order = [chosen.randrange(n_places) for _ in range(n_requests)]
        else:
            shuffled = chosen.sample(range(n_places), min(n_places, n_requests))
            order = [shuffled[index % len(shuffled)] for index in range(n_requests)]
    return iter([slot * probe.request_bytes for slot in order])


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
