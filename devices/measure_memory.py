"""How fast the processor reads memory: sums over arrays that no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from devices.profile import Rate
from devices.steady import steady
from edgert.errors import MeasurementError

Clock = Callable[[], float]

LEAST_BYTES = 32 << 20
_LEAST_REPETITIONS = 3


@dataclass(frozen=True, slots=True)
class MemoryProbe:
    """How much is read.

    Attributes:
        n_threads: Threads that share the array.
        size_bytes: Length of the array; several times the last cache where memory allows.
        n_repetitions: The median of those that agree with the fastest counts.
        most_s: Seconds for each number of threads after which repetitions stop.
    """

    n_threads: int = 1
    size_bytes: int = 512 << 20
    n_repetitions: int = 9
    most_s: float = 2.0


@dataclass(frozen=True, slots=True)
class MemoryRates:
    """Bytes a second that one thread draws, and all of them together."""

    single: Rate
    together: Rate


def measure_memory(probe: MemoryProbe, clock: Clock = time.perf_counter) -> MemoryRates:
    """Read memory with one thread, then with all.

    Raises:
        MeasurementError: the array does not fit, or is too small to say anything.
    """
    if probe.size_bytes < LEAST_BYTES:
        raise MeasurementError(
            f"memory: {probe.size_bytes:,} bytes are too few to measure with, "
            f"wanted {LEAST_BYTES:,} or more"
        )
    try:
        array = np.ones(probe.size_bytes // 8, np.uint64)
    except MemoryError as error:
        raise MeasurementError(f"memory: no room for {probe.size_bytes:,} bytes") from error
    single = _rate(array, 1, probe, clock)
    together = _rate(array, probe.n_threads, probe, clock) if probe.n_threads > 1 else single
    # Threads that hinder each other do not make the memory slower than one of them.
    return MemoryRates(single, together if together.value > single.value else single)


def _rate(array: NDArray[np.uint64], n_threads: int, probe: MemoryProbe, clock: Clock) -> Rate:
    parts = np.array_split(array, n_threads)
    times_s: list[float] = []
    begin_s = clock()
    with ThreadPoolExecutor(n_threads, thread_name_prefix="memory-probe") as pool:
        list(
            pool.map(np.bitwise_or.reduce, parts)
        )  # threads exist and pages are there before time is taken
        while len(times_s) < probe.n_repetitions:
            start_s = clock()
            # The reduction releases the interpreter lock.
            list(pool.map(np.bitwise_or.reduce, parts))
            end_s = clock()
            if end_s <= start_s:
                raise MeasurementError("memory: the clock did not move while it was read")
            times_s.append(end_s - start_s)
            if end_s - begin_s > probe.most_s and len(times_s) >= _LEAST_REPETITIONS:
                break
    kept_s = steady(times_s)
    middle_s = statistics.median(kept_s)
    spread = (max(kept_s) - min(kept_s)) / 2 / middle_s
    return Rate(value=array.nbytes / middle_s, origin="measured", spread=spread)
