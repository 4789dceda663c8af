"""Repetitions of a graph on a fake clock: which count, and when there are enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from edgert.llama.repetition import Repetitions, Reserve, Timed


@dataclass
class Machine:
    """A processor whose graphs take what they are told, and its clocks.

    Attributes:
        times_s: Of each computation, the one that warms up first; the last for ever.
        lost: Which of them somebody else had the processors for.
    """

    times_s: Sequence[float]
    lost: Sequence[int] = ()
    n_threads: int = 2
    n_computed: int = 0
    now_s: float = 0.0
    used_s: float = 0.0

    def compute(self, _graph: int) -> None:
        time_s = self.times_s[min(self.n_computed, len(self.times_s) - 1)]
        self.now_s += time_s
        self.used_s += time_s * (1 if self.n_computed in self.lost else self.n_threads)
        self.n_computed += 1

    def time(self, n_repetitions: int, most_s: float) -> Timed:
        repetitions = Repetitions(
            lambda: self.now_s, lambda: self.used_s, n_repetitions, most_s, Reserve(18.0)
        )
        return repetitions.time(self, 0)


def test_median_and_spread_are_of_repetitions_that_agree() -> None:
    machine = Machine([9.0, 1.0, 1.02, 1.04])
    timed = machine.time(3, 100.0)
    assert (timed.middle_s, timed.disturbed) == (pytest.approx(1.02), False)
    assert timed.spread == pytest.approx(0.02 / 1.02)
    assert machine.n_computed == 4  # one to warm up


def test_repetitions_that_lost_the_processors_do_not_count() -> None:
    timed = Machine([1.0, 1.0, 0.9, 1.0, 1.0], lost=[2]).time(3, 100.0)
    assert (timed.middle_s, timed.disturbed) == (pytest.approx(1.0), False)
    assert timed.spread == pytest.approx(0.0, abs=1e-9)


def test_slow_ones_among_many_do_not_count() -> None:
    """What steals from a virtual machine is not seen in its processor time."""
    timed = Machine([1.0, 4.0, 1.0, 3.5, 1.1, 1.0, 1.0]).time(4, 100.0)
    assert (timed.middle_s, timed.disturbed) == (pytest.approx(1.0), False)


def test_it_goes_on_until_most_agree_beyond_the_usual_time() -> None:
    machine = Machine([1.0, 4.0, 1.0, 2.5, 3.0, 1.0, 1.0, 1.0])
    timed = machine.time(3, 6.0)
    assert (timed.middle_s, timed.disturbed) == (pytest.approx(1.0), False)
    assert 6.0 < machine.now_s < 4 * 6.0


@pytest.mark.parametrize("lost", [(), range(100)])
def test_disturbed_where_too_few_agree_or_all_lost_the_processors(lost: Sequence[int]) -> None:
    times = [1.0] * 100 if lost else [1.0, *([4.0, 1.0, 3.0, 2.0] * 25)]
    machine = Machine(times, lost)
    timed = machine.time(3, 5.0)
    assert timed.disturbed
    assert timed.middle_s == pytest.approx(1.0 if lost else 2.5, rel=0.25)
    assert machine.now_s < 6 * 5.0


def test_measurements_share_what_more_they_may_take() -> None:
    reserve = Reserve(30.0)
    for _ in range(2):
        machine = Machine([1.0, *([4.0, 1.0, 3.0, 2.0] * 50)])
        repetitions = Repetitions(lambda: machine.now_s, lambda: machine.used_s, 3, 5.0, reserve)  # noqa: B023
        assert repetitions.time(machine, 0).disturbed
        assert machine.now_s < 5.0 + 30.0 + 5.0
    assert machine.now_s < 20.0  # the first took it all
    assert reserve.left_s < 0


def test_few_are_enough_where_time_is_over_and_they_agree() -> None:
    machine = Machine([2.0])
    assert not machine.time(100, 5.0).disturbed
    assert machine.n_computed == 4  # one of them to warm up
