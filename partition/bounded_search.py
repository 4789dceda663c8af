"""Exact search for problems with ceilings or shared memories: branch and bound on the chain.

Stages are added from the front. A partial chain is dropped when no completion can beat the best
placement or keep the limits; what a completion costs at least is looked up in priced chains.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from partition.device_sets import DeviceSets, device_sets
from partition.enumerate_search import ranks_of
from partition.evaluate import score
from partition.prices import tighten
from partition.problem import METRICS, Assignment, Placement, Problem
from partition.relaxation import PricedChain, Relaxation, priced, relax
from partition.stage_load import TIE, precedes, ranking
from partition.stage_table import Floats

_MOST_BOUNDS = 4  # chains under different prices; more of them drop little more
MOST_NODES = 200_000


@dataclass(slots=True)
class _Best:
    """The best placement so far, and the value of the objective that a bound must stay below."""

    problem: Problem
    beyond: float
    placement: Placement | None = None
    seen: set[Assignment] | None = None

    def offer(self, assignment: Assignment) -> float:
        """Try an assignment; return the value above which no bound matters."""
        if self.seen is None:
            self.seen = set()
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

    Raises:
        PlanError: too many different devices.
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
    return again if isinstance(again, Placement) else found


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
        telling = [bound.chain for bound in bounds[:_MOST_BOUNDS]]
        _branch(relaxation, _side_by_side(relaxation, telling), best)
    return best.placement


def _beyond(relaxation: Relaxation, metric: int) -> float:
    """Return more than any placement can cost."""
    n_devices = len(relaxation.pools)
    hops = [relaxation.hops[metric], relaxation.first[metric], relaxation.last[metric]]
    longest = max(float(np.where(np.isfinite(values), values, 0.0).max()) for values in hops)
    worst = float(relaxation.table.metrics[metric].max())
    return (n_devices * worst + (n_devices + 1) * longest) * (1 + TIE) + TIE


def _side_by_side(relaxation: Relaxation, telling: Sequence[PricedChain]) -> _Bounds:
    """Put the bounds on the objective beside one on each limit by itself."""
    n_limits = len(relaxation.limits)
    chains = [*telling]
    most = [inf] * len(telling)
    for index, limit in enumerate(relaxation.limits):
        prices = [float(index == other) for other in range(n_limits)]
        chains.append(priced(relaxation, [0.0] * len(METRICS), prices))
        most.append(TIE * abs(limit.most))
    return _Bounds(
        stages=np.array([chain.stages for chain in chains]),
        hops=np.array([chain.hops for chain in chains]),
        first=np.array([chain.first for chain in chains]),
        rest=np.array([chain.rest for chain in chains]),
        start=np.array([chain.offset for chain in chains]),
        most=np.array(most),
    )


def _branch(relaxation: Relaxation, bounds: _Bounds, best: _Best) -> None:
    sets = relaxation.sets
    n_units = bounds.stages.shape[-1] - 1
    stack = [(-inf, _Node((), 0, bounds.start))]
    n_nodes = 0
    while stack and n_nodes < MOST_NODES:
        least, node = stack.pop()
        if least >= best.beyond * (1 - TIE):
            continue
        n_nodes += 1
        costs, totals = _extend(bounds, sets, node)
        most = np.where(np.isinf(bounds.most), best.beyond * (1 - TIE), bounds.most)
        alive = (totals <= most[:, None, None]).all(axis=0) & sets.allowed[node.used][:, None]
        devices, ends = np.nonzero(alive)
        order = np.argsort(totals[0, devices, ends], kind="stable")
        children = []
        place = node.stages[-1][2] if node.stages else 0
        for device, end in zip(devices[order].tolist(), ends[order].tolist(), strict=True):
            value = float(totals[0, device, end])
            stages = (*node.stages, (device, place, end))
            if end < n_units:
                used = int(sets.larger[node.used, device])
                children.append((value, _Node(stages, used, costs[:, device, end])))
            elif value < best.beyond * (1 - TIE):
                best.offer(stages)
        stack += reversed(children)


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
