"""The flash probe, with a clock of its own."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.measure_flash import Probe, measure_flash, supports_direct
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
