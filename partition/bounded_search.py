"""Exact search for problems with ceilings or shared memories: branch and bound on the chain.

Stages are added from the front. A partial chain is dropped when no completion can beat the best
placement or keep the limits; what a completion costs at least is looked up in priced chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import inf

import numpy as np

from edgert.errors import PlanError
from partition.device_sets import DeviceSets, device_sets
from partition.enumerate_search import ranks_of
from partition.evaluate import score
from partition.prices import tighten
from partition.problem import METRICS, Assignment, Placement, Problem
from partition.relaxation import PricedChain, Relaxation, priced, relax
from partition.stage_load import TIE, precedes, ranking
from partition.stage_table import Floats

# Chains under different prices; more of them drop little more.
_MOST_BOUNDS = 24
_MOST_LIMIT_BOUNDS = 6
MOST_NODES = 20_000


@dataclass(slots=True)
class _Best:
    """The best placement so far.

    Attributes:
        problem: What is asked.
        beyond: The value of the objective that a bound must stay below.
        placement: None where none was found yet.
        seen: What was tried.
    """

    problem: Problem
    beyond: float
    placement: Placement | None = None
    seen: set[Assignment] = field(default_factory=set)

    def offer(self, assignment: Assignment) -> float:
        """Try an assignment; return the value above which no bound matters."""
        if assignment in self.seen:
            return self.beyond
        self.seen.add(assignment)
        found = score(self.problem, assignment)
        if isinstance(found, Placement):
            order = ranking(self.problem.objective)
            if self.placement is None or precedes(
                ranks_of(found, order), ranks_of(self.placement, order)
            ):
                self.placement = found
                self.beyond = found.score.of(self.problem.objective)
        return self.beyond


@dataclass(frozen=True, slots=True)
class _Bounds:
    """Several priced chains side by side, the most telling first.

    Attributes:
        stages: (n_bounds, n_devices, first, end).
        hops: (n_bounds, source, target).
        first: (n_bounds, n_devices).
        rest: (n_bounds, n_sets, n_devices, n_units + 1).
        start: (n_bounds,), their offsets.
        most: (n_bounds,), what a chain may cost; infinite where the best placement says.
    """

    stages: Floats
    hops: Floats
    first: Floats
    rest: Floats
    start: Floats
    most: Floats


@dataclass(frozen=True, slots=True)
class _Node:
    """A partial chain: its stages, the set of its devices, and its cost under each bound."""

    stages: tuple[tuple[int, int, int], ...]
    used: int
    costs: Floats


def bounded_search(problem: Problem) -> Placement | None:
    """Find the best placement, the fastest one where several are equal; None where there is none.

    It is proven best unless its `gap` says otherwise: after MOST_NODES partial chains the search
    stops, which a few hard problems (bytes sent under a ceiling, many shared memories) reach.

    Raises:
        PlanError: too many different devices, or nothing found before the search stopped.
    """
    sets = device_sets(problem)
    found = _search(problem, sets, None)
    if found is None or problem.objective == "tpot_s":
        return found
    reached = found.score.of(problem.objective) * (1 + TIE)
    ceilings = {**problem.ceilings, problem.objective: reached}
    faster = _search(replace(problem, objective="tpot_s", ceilings=ceilings), sets, found)
    if faster is None:
        return found
    again = score(problem, _assignment(faster))
    return replace(again, gap=found.gap) if isinstance(again, Placement) else found


def _assignment(placement: Placement) -> Assignment:
    return tuple((stage.device, stage.first, stage.end) for stage in placement.stages)


def _search(problem: Problem, sets: DeviceSets, known: Placement | None) -> Placement | None:
    relaxation = relax(problem, sets)
    best = _Best(problem, _beyond(relaxation, METRICS.index(problem.objective)))
    if known is not None:
        best.offer(_assignment(known))
    bounds = tighten(relaxation, problem.objective, best.offer)
    if not bounds or bounds[0].value > best.beyond * (1 + TIE):
        return best.placement
    if best.placement is None or bounds[0].value < best.beyond * (1 - TIE):
        chains = [(bound.chain, inf) for bound in bounds[:_MOST_BOUNDS]]
        of_limits = _of_limits(relaxation, best)
        if of_limits is not None:
            _branch(relaxation, _side_by_side([*chains, *of_limits]), best)
    return best.placement


def _beyond(relaxation: Relaxation, metric: int) -> float:
    """Return more than any placement can cost."""
    n_devices = len(relaxation.pools)
    hops = [relaxation.hops[metric], relaxation.first[metric], relaxation.last[metric]]
    longest = max(float(np.where(np.isfinite(values), values, 0.0).max()) for values in hops)
    worst = float(relaxation.table.metrics[metric].max())
    return (n_devices * worst + (n_devices + 1) * longest) * (1 + TIE) + TIE


def _of_limits(relaxation: Relaxation, best: _Best) -> list[tuple[PricedChain, float]] | None:
    """Return chains for each limit and what they may cost; None where a limit cannot be kept."""
    found = []
    for index, limit in enumerate(relaxation.limits):
        prices = [float(index == other) for other in range(len(relaxation.limits))]
        alone = priced(relaxation, [0.0] * len(METRICS), prices)
        found.append((alone, TIE * abs(limit.most)))
        if limit.pool is not None or len(relaxation.limits) == 1:
            continue
        others = tuple(other for other in relaxation.limits if other != limit)
        most = limit.most + TIE * abs(limit.most)

        def offer(assignment: Assignment, least: float = most) -> float:
            best.offer(assignment)
            return least * (1 + 2 * TIE)

        bounds = tighten(replace(relaxation, limits=others), METRICS[limit.metric], offer)
        if bounds[0].value > most:
            return None
        found += [(bound.chain, most) for bound in bounds[:_MOST_LIMIT_BOUNDS]]
    return found


def _side_by_side(chains: Sequence[tuple[PricedChain, float]]) -> _Bounds:
    return _Bounds(
        stages=np.array([chain.stages for chain, _ in chains]),
        hops=np.array([chain.hops for chain, _ in chains]),
        first=np.array([chain.first for chain, _ in chains]),
        rest=np.array([chain.rest for chain, _ in chains]),
        start=np.array([chain.offset for chain, _ in chains]),
        most=np.array([most for _, most in chains]),
    )


def _branch(relaxation: Relaxation, bounds: _Bounds, best: _Best) -> None:
    """Open the most promising node first, deeper ones before others that promise the same."""
    sets = relaxation.sets
    n_units = bounds.stages.shape[-1] - 1
    telling = np.isinf(bounds.most)
    heap: list[tuple[float, int, Assignment, _Node]] = [(-inf, 0, (), _Node((), 0, bounds.start))]
    n_nodes = 0
    while heap and n_nodes < MOST_NODES:
        least, _, _, node = heappop(heap)
        if least >= best.beyond * (1 - TIE):
            return
        place = node.stages[-1][2] if node.stages else 0
        if place == n_units:
            best.offer(node.stages)
            continue
        n_nodes += 1
        costs, totals = _extend(bounds, sets, node)
        kept = (totals <= bounds.most[:, None, None]).all(axis=0)
        values = totals[telling].max(axis=0)
        kept &= sets.allowed[node.used][:, None] & (values < best.beyond * (1 - TIE))
        devices, ends = np.nonzero(kept)
        for device, end in zip(devices.tolist(), ends.tolist(), strict=True):
            value = float(values[device, end])
            stages = (*node.stages, (device, place, end))
            used = int(sets.larger[node.used, device])
            child = _Node(stages, used, costs[:, device, end])
            heappush(heap, (value, -end, stages, child))
    if heap:
        _leave_open(best, heap[0][0])


def _leave_open(best: _Best, least: float) -> None:
    """Say how much better than the best placement what was not looked at could be."""
    if best.placement is None:
        raise PlanError(
            f"no placement was found among {MOST_NODES:,} partial ones",
            hint="leave out some devices, or relax a ceiling",
        )
    gap = max(0.0, (best.beyond - least) / (abs(best.beyond) or 1.0))
    best.placement = replace(best.placement, gap=gap)


def _extend(bounds: _Bounds, sets: DeviceSets, node: _Node) -> tuple[Floats, Floats]:
    """Return the costs of every next stage, and the least totals: (n_bounds, n_devices, end)."""
    if node.stages:
        last, _, place = node.stages[-1]
        hops = bounds.hops[:, last]
    else:
        place, hops = 0, bounds.first
    costs = node.costs[:, None, None] + hops[:, :, None] + bounds.stages[:, :, place]
    devices = np.arange(bounds.stages.shape[1])
    return costs, costs + bounds.rest[:, sets.larger[node.used], devices]
