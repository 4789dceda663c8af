"""Times a graph again and again until enough repetitions agree: what disturbs only slows down.

Other processes show in processor time; what steals the processors from a virtual machine, or a
scheduler that wakes a thread late, shows only in repetitions that are slower than the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgert.errors import BackendError

Clock = Callable[[], float]

_LEAST_REPETITIONS = 3
_UNDISTURBED_SHARE = 0.9
# Repetitions at most this much slower than the fastest are of the same processor speed.
_STEADY_RATIO = 1.15
_PATIENCE = 3


class Computes(Protocol):
    """What computes graphs."""

    @property
    def n_threads(self) -> int:
        """Threads of every graph."""
        ...

    def compute(self, graph: int) -> None:
        """Compute a graph."""
        ...


@dataclass(frozen=True, slots=True)
class Timed:
    """Seconds of one computation.

    Attributes:
        middle_s: The median of repetitions that agree.
        spread: Half their range over it.
        disturbed: Whether too few agreed, or had the processors to themselves. Then all count.
    """

    middle_s: float
    spread: float
    disturbed: bool = False


@dataclass(frozen=True, slots=True)
class Repetitions:
    """How often a graph is computed.

    Attributes:
        clock: Seconds from anywhere.
        processor_clock: Seconds of processor time of this process, all threads together.
        n_repetitions: Steady ones that are enough; one more before them does not count.
        most_s: Seconds after which fewer are enough where most agree; some times that where not.
    """

    clock: Clock
    processor_clock: Clock
    n_repetitions: int = 7
    most_s: float = 2.0

    def time(self, processor: Computes, graph: int) -> Timed:
        """Compute a graph again and again; BackendError if the clock stands still."""
        processor.compute(graph)
        times: list[float] = []
        undisturbed: list[float] = []
        start_s = self.clock()
        while True:
            before_s, before_processor_s = self.clock(), self.processor_clock()
            processor.compute(graph)
            used_s = self.processor_clock() - before_processor_s
            after_s = self.clock()
            times.append(after_s - before_s)
            # Threads of a team wait by spinning: less processor time than wall time for each means
            # that something else had the processors.
            if used_s >= _UNDISTURBED_SHARE * processor.n_threads * times[-1]:
                undisturbed.append(times[-1])
            steady = _steady(undisturbed)
            agree = len(steady) >= _LEAST_REPETITIONS and 2 * len(steady) > len(undisturbed)
            if self._are_enough(len(steady), after_s - start_s, agree=agree):
                break
        return _summary(steady, disturbed=False) if agree else _summary(times, disturbed=True)

    def _are_enough(self, n_steady: int, elapsed_s: float, *, agree: bool) -> bool:
        """Whether repetitions may stop: enough agree, most do, or it has taken too long."""
        if agree and n_steady >= self.n_repetitions:
            return True
        return elapsed_s > self.most_s * (1 if agree else _PATIENCE)


def _steady(times: Sequence[float]) -> list[float]:
    fastest_s = min(times, default=0.0)
    return [time_s for time_s in times if time_s <= _STEADY_RATIO * fastest_s]


def _summary(times: Sequence[float], *, disturbed: bool) -> Timed:
    middle_s = statistics.median(times)
    if middle_s <= 0:
        raise BackendError("the clock did not move while ggml computed")
    return Timed(middle_s, (max(times) - min(times)) / 2 / middle_s, disturbed)
