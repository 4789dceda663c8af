"""The memory probe, with a clock of its own."""

from __future__ import annotations

import itertools

import pytest

from devices.measure_memory import LEAST_BYTES, MemoryProbe, measure_memory
from edgert.errors import MeasurementError


def test_rate_is_bytes_over_the_clocks_seconds() -> None:
    looks = itertools.count()
    probe = MemoryProbe(n_threads=1, size_bytes=LEAST_BYTES, n_repetitions=3, most_s=100.0)
    rates = measure_memory(probe, lambda: next(looks) * 0.5)
    assert rates.single.value == LEAST_BYTES / 0.5
    assert rates.together == rates.single
    assert (rates.single.origin, rates.single.spread) == ("measured", 0)


def test_threads_share_the_array_and_never_count_as_slower_than_one() -> None:
    times = iter([0.0, 0.0, 1.0, 1.0, 2.0, 2.0, 3.0, 3.0, 3.0, 7.0, 7.0, 11.0, 11.0, 15.0])
    probe = MemoryProbe(n_threads=2, size_bytes=LEAST_BYTES, n_repetitions=3, most_s=100.0)
    rates = measure_memory(probe, lambda: next(times))
    assert rates.single.value == LEAST_BYTES
    assert rates.together == rates.single


def test_repetitions_stop_at_the_time_limit() -> None:
    looks = itertools.count()
    probe = MemoryProbe(n_threads=1, size_bytes=LEAST_BYTES, n_repetitions=10**9, most_s=10.0)
    assert measure_memory(probe, lambda: float(next(looks))).single.value == LEAST_BYTES


def test_too_small_an_array_says_nothing() -> None:
    with pytest.raises(MeasurementError, match="too few"):
        measure_memory(MemoryProbe(size_bytes=LEAST_BYTES - 1))


def test_clock_that_stands_still_is_an_error() -> None:
    with pytest.raises(MeasurementError, match="clock"):
        measure_memory(MemoryProbe(size_bytes=LEAST_BYTES), lambda: 0.0)
