"""The flash probe, with a clock of its own."""

from __future__ import annotations

import errno
import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from devices import measure_flash as module
from devices.measure_flash import (
    CurveProbe,
    Probe,
    measure_curve,
    measure_flash,
    scratch_file,
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


def test_direct_reading_is_a_yes_or_no_question(file: Path) -> None:
    assert supports_direct(file) in (True, False)
    with pytest.raises(FileNotFoundError):
        supports_direct(file.with_name("missing"))


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


def test_scratch_file_is_written_and_gone_afterwards(tmp_path: Path) -> None:
    with scratch_file(tmp_path / "cache", 16 << 20) as path:
        assert path.stat().st_size == 16 << 20
    assert list((tmp_path / "cache").iterdir()) == []


def test_scratch_file_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_file(tmp_path, 16 << 20):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_descriptor: int, _content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(MeasurementError, match="No space left"), scratch_file(tmp_path, 16 << 20):
        pass
    assert list(tmp_path.iterdir()) == []


def test_almost_full_disk_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_SCRATCH_BYTES", 1 << 60)
    with pytest.raises(MeasurementError, match="too little"), scratch_file(tmp_path, 16 << 20):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MeasurementError), scratch_file(tmp_path / "file", 16 << 20):
        pass
