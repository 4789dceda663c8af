"""What the stages of a fixed assignment pin: exact, for any objective, pools and ceilings.

Without ceilings the memories are independent. Ceilings tie them together: a linear programme.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from partition.linear_program import Floats, minimise
from partition.pool_pins import (
    PoolCase,
    best_of,
    fill,
    pool_cases,
    streamable_bytes,
)
from partition.problem import METRICS, Metric, Problem
from partition.stage_load import (
    MEMORY,
    TIE,
    StageLoad,
    Vector,
    exceeds,
    precedes,
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
    least = _least(cases, hops)
    broken = _broken(problem, least)
    if broken is not None:
        return broken
    order = ranking(problem.objective)
    best: Pins | None = None
    for combination in _promising(problem, cases, hops):
        ranks = tuple(best.metrics[index] for index in order) if best else None
        bound = _least([[case] for case in combination], hops)[order[0]]
        if ranks is not None and exceeds(bound, ranks[0]):
            continue
        unpinned = _programme(problem, combination, hops, len(loads))
        if unpinned is None:
            continue
        pins = _pins(loads, problem.reads, unpinned, hops)
        if ranks is None or precedes([pins.metrics[index] for index in order], ranks):
            best = pins
    return best or Shortfall(None, None, 0.0, 0.0)


def _least(cases: Sequence[Sequence[PoolCase]], hops: Vector) -> Vector:
    """Return the least value of each metric by itself."""
    return tuple(
        start + sum(min(fill(case, (index,))[0][index] for case in pool) for pool in cases)
        for index, start in enumerate(hops)
    )


def _promising(
    problem: Problem, cases: Sequence[Sequence[PoolCase]], hops: Vector
) -> list[tuple[PoolCase, ...]]:
    """Return the combinations that keep each ceiling by itself, most promising first."""
    first = METRICS.index(problem.objective)
    found = []
    for combination in product(*cases):
        least = _least([[case] for case in combination], hops)
        if _broken(problem, least) is None:
            found.append((least[first], combination))
    return [combination for _, combination in sorted(found, key=lambda pair: pair[0])]


def _programme(
    problem: Problem, combination: Sequence[PoolCase], hops: Vector, n_stages: int
) -> list[float] | None:
    """Solve for the unpinned bytes of each stage; None where ceilings cannot hold together."""
    pieces = [piece for case in combination for piece in case.pieces]
    if not pieces:
        return None  # nothing to choose, and the plain choice broke a ceiling
    base = total((*(case.base for case in combination), hops))
    prices = np.array([piece.slopes for piece in pieces]).T
    prices *= np.array([piece.n_bytes for piece in pieces])
    rows, most = _limits(problem, combination, base, prices)
    taken: Floats | None = None
    for index in ranking(problem.objective):
        scale = np.abs(prices[index]).max() or 1.0
        found = minimise(prices[index] / scale, rows, most, np.ones(len(pieces)))
        if found is None:
            break
        taken = found
        # The next metric decides among what is as good in this one.
        reached = float(prices[index] @ taken)
        slack = TIE * max(abs(base[index] + reached), abs(reached))
        rows = np.vstack((rows, prices[index] / scale))
        most = np.append(most, (reached + slack) / scale)
    if taken is None:
        return None
    return _unpinned(combination, taken, n_stages)


def _limits(
    problem: Problem, combination: Sequence[PoolCase], base: Vector, prices: Floats
) -> tuple[Floats, Floats]:
    rows: list[Floats] = []
    most: list[float] = []
    start = 0
    for case in combination:
        end = start + len(case.pieces)
        if case.need_bytes > 0:
            scale = float(np.abs(prices[MEMORY, start:end]).max())
            row = np.zeros(prices.shape[1])
            row[start:end] = prices[MEMORY, start:end] / scale
            rows.append(row)
            most.append(-case.need_bytes / scale)
        start = end
    for metric, ceiling in problem.ceilings.items():
        index = METRICS.index(metric)
        scale = abs(ceiling) or 1.0
        rows.append(prices[index] / scale)
        # Half of what `exceeds` forgives, or a ceiling at its own optimum would be out of reach.
        most.append((ceiling + TIE / 2 * abs(ceiling) - base[index]) / scale)
    return np.array(rows).reshape(-1, prices.shape[1]), np.array(most)


def _unpinned(combination: Sequence[PoolCase], taken: Floats, n_stages: int) -> list[float]:
    unpinned = [0.0] * n_stages
    start = 0
    for case in combination:
        n_bytes = [
            piece.n_bytes * float(share)
            for piece, share in zip(case.pieces, taken[start:], strict=False)
        ]
        start += len(case.pieces)
        # The solver keeps rows to its tolerance; a pool is kept to the byte.
        left = case.need_bytes - sum(n_bytes)
        for index, piece in enumerate(case.pieces):
            more = min(max(0.0, left), piece.n_bytes - n_bytes[index])
            n_bytes[index] += more
            left -= more
        _take(unpinned, (case, n_bytes))
    return unpinned
