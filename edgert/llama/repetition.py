"""Times a graph again and again until enough repetitions agree: what disturbs only slows down.

Other processes show in processor time; what steals the processors from a virtual machine, or a
scheduler that wakes a thread late, shows only in repetitions that are slower than the others.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from devices.steady import steady
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
        middle_s: The median of repetitions that agree.
        spread: Half their range over it.
        disturbed: Whether too few agreed, or had the processors to themselves. Then all count.
    """

    middle_s: float
    spread: float
    disturbed: bool = False


@dataclass(slots=True)
class Reserve:
    """Seconds that disturbed measurements may still take together, beyond their own."""

    left_s: float


@dataclass(frozen=True, slots=True)
class Repetitions:
    """How often a graph is computed.

    Attributes:
        clock: Seconds from anywhere.
        processor_clock: Seconds of processor time of this process, all threads together.
        n_repetitions: Steady ones that are enough; one more before them does not count.
        most_s: Seconds after which fewer are enough, not before three.
        reserve: What more it may take where they do not agree; measurements may share one.
    """

    clock: Clock
    processor_clock: Clock
    n_repetitions: int = 7
    most_s: float = 2.0
    reserve: Reserve = field(default_factory=lambda: Reserve(0.0))

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
            agreeing = steady(undisturbed)
            n_agree = len(agreeing)
            agree = n_agree >= _LEAST_REPETITIONS and 2 * n_agree > len(undisturbed)
            late_s = after_s - start_s - self.most_s
            if agree and (n_agree >= self.n_repetitions or late_s > 0):
                break
            if len(times) >= _LEAST_REPETITIONS and late_s > self.reserve.left_s:
                break
        self.reserve.left_s -= max(0.0, late_s)
        return _summary(agreeing, disturbed=False) if agree else _summary(times, disturbed=True)


def _summary(times: Sequence[float], *, disturbed: bool) -> Timed:
    middle_s = statistics.median(times)
    if middle_s <= 0:
        raise BackendError("the clock did not move while ggml computed")
    return Timed(middle_s, (max(times) - min(times)) / 2 / middle_s, disturbed)
