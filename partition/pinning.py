"""What the stages of a fixed assignment pin: exact, for any objective, pools and ceilings.

Without ceilings the memories are independent. Ceilings tie them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partition.ceiling_pins import unpin_under_ceilings
from partition.pool_pins import PoolCase, best_of, fill, pool_cases, streamable_bytes
from partition.problem import METRICS, Metric, Problem
from partition.stage_load import (
    MEMORY,
    StageLoad,
    Vector,
    exceeds,
    ranking,
    stage_metrics,
    total,
)


@dataclass(frozen=True, slots=True)
class Pins:
    """Bytes each stage leaves unpinned, and what all stages and hops cost then."""

    unpinned_bytes: tuple[float, ...]
    metrics: Vector


@dataclass(frozen=True, slots=True)
class Shortfall:
    """The limit that cannot be kept.

    Attributes:
        pool: Index of the memory that is too small; None where a ceiling is.
        metric: The ceiling; None where a memory is too small, or only all together are.
        needed: The least that is possible.
        available: What the limit is.
    """

    pool: int | None
    metric: Metric | None
    needed: float
    available: float


def choose_pins(problem: Problem, loads: Sequence[StageLoad], hops: Vector) -> Pins | Shortfall:
    """Choose what to pin so that the objective is least, then TPOT, TTFT and memory.

    Args:
        problem: Its objective, ceilings, pools and reads are used.
        loads: Stages in order of the chain.
        hops: What the hops add.

    Returns:
        The choice, or the limit that no choice keeps.
    """
    order = ranking(problem.objective)
    cases: list[list[PoolCase]] = []
    for pool in sorted({load.pool for load in loads}):
        capacity = problem.pool_bytes[pool]
        inside = [index for index, load in enumerate(loads) if load.pool == pool]
        found = list(pool_cases(loads, inside, problem.reads, capacity))
        possible = [case for case in found if not exceeds(case.need_bytes, streamable_bytes(case))]
        if not possible:
            least = min(case.base[MEMORY] - streamable_bytes(case) for case in found)
            return Shortfall(pool, None, least, capacity)
        cases.append(possible)
    unpinned = [0.0] * len(loads)
    for possible in cases:
        _take(unpinned, best_of(possible, order))
    pins = _pins(loads, problem.reads, unpinned, hops)
    if _broken(problem, pins.metrics) is None:
        return pins
    return _choose_under_ceilings(problem, loads, cases, hops)


def _take(unpinned: list[float], choice: tuple[PoolCase, Sequence[float]]) -> None:
    case, taken = choice
    for n_bytes, piece in zip(taken, case.pieces, strict=True):
        unpinned[piece.stage] += n_bytes


def _pins(
    loads: Sequence[StageLoad], reads: Sequence[float], unpinned: Sequence[float], hops: Vector
) -> Pins:
    # Rounding of the sums must not leave a stage with less than nothing pinned.
    exact = tuple(
        min(n_bytes, sum(load.weight_bytes)) for n_bytes, load in zip(unpinned, loads, strict=True)
    )
    stages = [stage_metrics(load, reads, n) for load, n in zip(loads, exact, strict=True)]
    return Pins(exact, total((*stages, hops)))


def _broken(problem: Problem, metrics: Vector) -> Shortfall | None:
    """Return the ceiling that is broken worst."""
    worst: Shortfall | None = None
    for metric in METRICS:
        ceiling = problem.ceilings.get(metric)
        value = metrics[METRICS.index(metric)]
        if ceiling is None or not exceeds(value, ceiling):
            continue
        if worst is None or value * worst.available > worst.needed * ceiling:
            worst = Shortfall(None, metric, value, ceiling)
    return worst


def _choose_under_ceilings(
    problem: Problem, loads: Sequence[StageLoad], cases: Sequence[Sequence[PoolCase]], hops: Vector
) -> Pins | Shortfall:
    broken = _broken(problem, _least(cases, hops))
    if broken is not None:
        return broken
    unpinned = unpin_under_ceilings(problem, loads, hops)
    if unpinned is None:
        return Shortfall(None, None, 0.0, 0.0)
    return _pins(loads, problem.reads, unpinned, hops)


def _least(cases: Sequence[Sequence[PoolCase]], hops: Vector) -> Vector:
    """Return the least value of each metric by itself."""
    return tuple(
        start + sum(min(fill(case, (index,))[0][index] for case in pool) for pool in cases)
        for index, start in enumerate(hops)
    )
