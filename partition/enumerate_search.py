"""Exact search by trying everything: every order of every set of devices, every way to cut."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, permutations
from math import comb, perm

from partition.evaluate import score
from partition.problem import Assignment, Placement, Problem, Rejection
from partition.stage_load import precedes, ranking


def n_assignments(problem: Problem) -> int:
    """Count what an enumeration would try."""
    n_devices, n_cuts = len(problem.devices), problem.n_units - 1
    most = min(n_devices, problem.n_units)
    return sum(perm(n_devices, n) * comb(n_cuts, n - 1) for n in range(1, most + 1))


def assignments(problem: Problem) -> Iterator[Assignment]:
    """Yield every assignment: fewer stages first, then by devices, then by cuts."""
    n_units = problem.n_units
    for n_stages in range(1, min(len(problem.devices), n_units) + 1):
        for devices in permutations(range(len(problem.devices)), n_stages):
            for cuts in combinations(range(1, n_units), n_stages - 1):
                yield tuple(zip(devices, (0, *cuts), (*cuts, n_units), strict=True))


def enumerate_search(problem: Problem) -> tuple[Placement | None, tuple[Rejection, ...]]:
    """Try every assignment.

    Returns:
        The best placement (ties: TPOT, TTFT, memory, fewer stages, then lexicographic), None where
        there is none, and why the others were rejected.
    """
    order = ranking(problem.objective)
    best: Placement | None = None
    best_ranks: tuple[float, ...] = ()
    rejections = []
    for assignment in assignments(problem):
        found = score(problem, assignment)
        if isinstance(found, Rejection):
            rejections.append(found)
            continue
        ranks = ranks_of(found, order)
        if best is None or precedes(ranks, best_ranks):
            best, best_ranks = found, ranks
    return best, tuple(rejections)


def ranks_of(placement: Placement, order: tuple[int, ...]) -> tuple[float, ...]:
    """Return the metrics of a placement in the order in which they decide."""
    score_ = placement.score
    values = (
        score_.tpot_s, score_.ttft_s, score_.memory_bytes, score_.energy_j, score_.sent_bytes,
    )  # fmt: skip
    return tuple(values[index] for index in order)
