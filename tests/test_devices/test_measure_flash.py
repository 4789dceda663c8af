"""The flash probe, with a clock of its own."""

from __future__ import annotations

import errno
import itertools
import mmap
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from devices import measure_flash as module
from devices.measure_flash import (
    CurveProbe,
    Probe,
    measure_curve,
    measure_flash,
    supports_direct,
)
from edgert.errors import MeasurementError

KIB = 1024


def ticking(step_s: float) -> Callable[[], float]:
    """A clock that is one step later at every look."""
    counter = itertools.count()
    return lambda: next(counter) * step_s


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(os.urandom(1024 * KIB + 100))
    return path


def test_rate_is_bytes_over_the_clocks_seconds(file: Path) -> None:
    times = iter([0.0, *[0.1] * 100])
    last = [0.0]

    def clock() -> float:
        last[0] = next(times)
        return last[0]

    probe = Probe(request_bytes=256 * KIB, n_in_flight=1)
    rate = measure_flash(file, probe, clock)
    assert rate.value == pytest.approx((1024 * KIB + 100) / 0.1)
    assert rate.origin == "measured"


def test_reading_stops_at_the_byte_limit(file: Path) -> None:
    times = iter([0.0, *[1.0] * 100])
    probe = Probe(request_bytes=256 * KIB, n_in_flight=1, most_bytes=512 * KIB)
    assert measure_flash(file, probe, lambda: next(times)).value == 512 * KIB


def test_reading_stops_at_the_time_limit(file: Path) -> None:
    probe = Probe(request_bytes=64 * KIB, n_in_flight=1, most_s=3.0)
    # Looks at 1 and 2 allow a read each, the one at 3 stops, the one at 4 is the end.
    rate = measure_flash(file, probe, ticking(1.0))
    assert rate.value == 2 * 64 * KIB / 4


def test_several_readers_read_every_byte_once(file: Path) -> None:
    times = iter([0.0, *[1.0] * 1000])
    probe = Probe(request_bytes=64 * KIB, n_in_flight=4)
    assert measure_flash(file, probe, lambda: next(times)).value == 1024 * KIB + 100


def test_missing_and_empty_files_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for name in ("missing", "empty"):
        with pytest.raises(MeasurementError, match=name):
            measure_flash(tmp_path / name)


def test_folder_cannot_be_measured(tmp_path: Path) -> None:
    with pytest.raises(MeasurementError):
        measure_flash(tmp_path)


def test_direct_reading_is_what_the_file_system_takes(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(error: int | None) -> Callable[..., int]:
        def fake(path: Path, flags: int) -> int:
            if flags & os.O_DIRECT and error is not None:
                raise OSError(error, os.strerror(error))
            return real(path, flags & ~os.O_DIRECT)

        return fake

    real = os.open
    answers = []
    for error in (None, errno.EINVAL, errno.ENOTSUP):
        monkeypatch.setattr(os, "open", opened(error))
        answers.append(supports_direct(file))
    assert answers == [True, False, False]
    monkeypatch.setattr(os, "open", opened(errno.EACCES))
    with pytest.raises(PermissionError):
        supports_direct(file)
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        supports_direct(file.with_name("missing"))


@dataclass
class Cache:
    """A page cache: what is read through it stays until it is dropped."""

    pages: set[int] = field(default_factory=set)
    keeps: bool = False
    n_cached_reads: int = 0
    n_reads: int = 0
    n_dropped: int = 0

    def preadv(self, _descriptor: int, buffers: list[mmap.mmap], offset: int) -> int:
        n_bytes = len(buffers[0])
        pages = set(range(offset // 4096, (offset + n_bytes) // 4096))
        self.n_reads += 1
        self.n_cached_reads += bool(pages & self.pages)
        self.pages |= pages
        return n_bytes

    def fadvise(self, _descriptor: int, _start: int, _length: int, advice: int) -> None:
        if advice == os.POSIX_FADV_DONTNEED:
            self.n_dropped += 1
            if not self.keeps:
                self.pages.clear()

    def share(self, descriptor: int) -> float:
        return len(self.pages) / (os.fstat(descriptor).st_size // 4096)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Cache:
    """A file system without O_DIRECT."""
    found = Cache()
    monkeypatch.setattr(module, "supports_direct", lambda _: False)
    monkeypatch.setattr(os, "preadv", found.preadv)
    monkeypatch.setattr(os, "posix_fadvise", found.fadvise)
    monkeypatch.setattr(module, "cached_share", found.share)
    return found


@pytest.mark.parametrize("request_bytes", [4096, 64 * KIB, 256 * KIB])
def test_without_direct_reading_no_repetition_reads_the_cache(
    file: Path, cache: Cache, request_bytes: int
) -> None:
    probe = CurveProbe(sizes_bytes=(request_bytes,), depths=(1,), sustained_s=3e6)
    (point,) = measure_curve(file, probe, ticking(1.0))
    assert point.bytes_per_s.origin == "measured"
    assert cache.n_cached_reads == 0
    assert cache.n_dropped == 3
    # Each of the repetitions reads the whole file, and none of it twice.
    assert cache.n_reads == 3 * (1024 * KIB // request_bytes)


def test_file_that_stays_in_the_cache_cannot_be_measured(file: Path, cache: Cache) -> None:
    cache.keeps, cache.pages = True, {0, 1, 2, 3, 4, 5, 6, 7}
    for measure in (measure_flash, measure_curve):
        with pytest.raises(MeasurementError, match="cannot be read past the page cache"):
            measure(file)
    assert cache.n_reads == 0


def test_share_of_a_file_in_the_page_cache_is_what_the_kernel_says(file: Path) -> None:
    with file.open("rb") as opened:
        opened.read()
        assert module.cached_share(opened.fileno()) > 0.9


def test_curve_has_a_point_for_each_size_and_depth(file: Path) -> None:
    probe = CurveProbe(sizes_bytes=(4096, 64 * KIB), depths=(1, 2), random_s=12.0, sustained_s=12.0)
    points = measure_curve(file, probe, ticking(1.0))
    assert [(point.request_bytes, point.n_in_flight) for point in points] == [
        (4096, 1), (4096, 2), (64 * KIB, 1), (64 * KIB, 2),
    ]  # fmt: skip
    assert {point.bytes_per_s.origin for point in points} == {"measured"}
    # Of the four seconds of a repetition three looks allow a read, the fifth is the end.
    assert points[0].bytes_per_s.value == 3 * 4096 / 5
    assert points[0].bytes_per_s.spread == 0


def test_curve_leaves_out_requests_larger_than_the_file(file: Path) -> None:
    probe = CurveProbe(sizes_bytes=(512 * KIB, 4096 * KIB), depths=(1,), sequential_s=12.0)
    assert [point.request_bytes for point in measure_curve(file, probe, ticking(1.0))] == [
        512 * KIB
    ]


def test_curve_of_a_file_without_one_request_cannot_be_measured(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 100)
    with pytest.raises(MeasurementError, match="small"):
        measure_curve(tmp_path / "small", CurveProbe(), ticking(1.0))


def test_clock_that_stands_still_is_an_error(file: Path) -> None:
    with pytest.raises(MeasurementError, match="nothing to measure"):
        measure_curve(file, CurveProbe(sizes_bytes=(64 * KIB,)), lambda: 0.0)
