"""Times a graph several times: the median of those that nothing disturbed, and their spread."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from edgert.errors import BackendError

Clock = Callable[[], float]

_LEAST_REPETITIONS = 3
_UNDISTURBED_SHARE = 0.9


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
        middle_s: The median.
        spread: Half the range over it.
        disturbed: Whether other processes took the processors away while it ran.
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
        n_repetitions: Undisturbed ones that are enough; one more before them does not count.
        most_s: Seconds after which repetitions stop, not before three.
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
        while len(undisturbed) < self.n_repetitions:
            before_s, before_processor_s = self.clock(), self.processor_clock()
            processor.compute(graph)
            used_s = self.processor_clock() - before_processor_s
            after_s = self.clock()
            times.append(after_s - before_s)
            # Threads of a team wait by spinning: less processor time than wall time for each means
            # that something else had the processors.
            if used_s >= _UNDISTURBED_SHARE * processor.n_threads * times[-1]:
                undisturbed.append(times[-1])
            if len(times) >= _LEAST_REPETITIONS and after_s - start_s > self.most_s:
                break
        if len(undisturbed) >= _LEAST_REPETITIONS:
            return _summary(undisturbed, disturbed=False)
        return _summary(times, disturbed=True)


def _summary(times: Sequence[float], *, disturbed: bool) -> Timed:
    middle_s = statistics.median(times)
    if middle_s <= 0:
        raise BackendError("the clock did not move while ggml computed")
    return Timed(middle_s, (max(times) - min(times)) / 2 / middle_s, disturbed)
