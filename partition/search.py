"""The best placement of a problem, or why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

from partition.bounded_search import bounded_search
from partition.chain_search import chain_search, separable
from partition.infeasible import why_infeasible
from partition.problem import METRICS, Metric, Placement, Problem
from partition.stage_load import TIE, exceeds

FRONTIER_STEPS = 4


def search(problem: Problem) -> Placement:
    """Find the placement whose objective is least under the ceilings.

    Where no two devices share a memory and there are no ceilings, one dynamic programme settles it,
    ties included. Everything else is branch and bound, which is also faster than trying everything
    for the smallest problems.

    Raises:
        PlanError: nothing satisfies the problem; the message lists what was rejected and why.
    """
    found = chain_search(problem) if separable(problem) else bounded_search(problem)
    if found is None:
        raise why_infeasible(problem)
    return found


def frontier(
    problem: Problem, metrics: Sequence[Metric], n_steps: int = FRONTIER_STEPS
) -> tuple[Placement, ...]:
    """Sample the placements of which none is better than another in every metric.

    What is pinned can be traded continuously, so the frontier has no end of points. Taken are the
    best of each metric and, for each pair of metrics, the best of one under ceilings on the other
    that rise in equal steps.

    Args:
        problem: Its ceilings hold, its objective is not used.
        metrics: Two or more, each once.
        n_steps: Of each ceiling, at least 1.

    Returns:
        By the first metric, ascending; none is dominated by another.

    Raises:
        ValueError: fewer than two metrics, or one twice.
        PlanError: nothing satisfies the problem.
    """
    if len(metrics) < 2 or len(set(metrics)) < len(metrics):
        raise ValueError(f"wanted two or more different metrics, got {list(metrics)}")
    found = [search(replace(problem, objective=metric)) for metric in metrics]
    ceilings = {metric: _steps(found, metric, n_steps) for metric in metrics}
    # The metric that varies more smoothly is minimised: levels of the other would be skipped.
    for least, other in combinations(sorted(metrics, key=METRICS.index), 2):
        for limit in ceilings[other]:
            placement = _under(replace(problem, objective=least), other, limit)
            if placement is not None:
                found.append(placement)
    return _undominated(found, metrics)


def _steps(found: Sequence[Placement], metric: Metric, n_steps: int) -> list[float]:
    values = [placement.score.of(metric) for placement in found]
    low, high = min(values), max(values)
    steps = [low + (high - low) * step / n_steps for step in range(n_steps)]
    return sorted({step + TIE * abs(step) for step in steps})


def _under(problem: Problem, metric: Metric, limit: float) -> Placement | None:
    limit = min(limit, problem.ceilings.get(metric, limit))
    return bounded_search(replace(problem, ceilings={**problem.ceilings, metric: limit}))


def _undominated(found: Sequence[Placement], metrics: Sequence[Metric]) -> tuple[Placement, ...]:
    points = sorted(found, key=lambda placement: [placement.score.of(m) for m in metrics])
    kept: list[Placement] = []
    for placement in points:
        if not any(_as_good(other, placement, metrics) for other in kept):
            kept = [other for other in kept if not _as_good(placement, other, metrics)]
            kept.append(placement)
    return tuple(kept)


def _as_good(one: Placement, other: Placement, metrics: Sequence[Metric]) -> bool:
    return not any(exceeds(one.score.of(m), other.score.of(m)) for m in metrics)
