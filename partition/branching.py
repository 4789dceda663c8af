"""Branch and bound on the stages of a chain, added from the front.

A partial chain is dropped when no completion can beat the best placement or keep the limits; what a
completion costs at least is looked up in priced chains.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush
from math import inf

import numpy as np

from partition.device_sets import DeviceSets
from partition.enumerate_search import ranks_of
from partition.evaluate import score
from partition.priced_chain import PricedChain
from partition.problem import Assignment, Placement, Problem
from partition.relaxation import Relaxation
from partition.stage_load import TIE, precedes, ranking
from partition.stage_table import Floats

# Where a search stops, so that hard problems take some ten seconds rather than minutes.
MOST_NODES = 40_000  # partial chains
MOST_TRIED = 3_000  # whole ones


@dataclass(slots=True)
class Best:
    """The best placement so far.

    Attributes:
        problem: What is asked.
        beyond: The value of the objective that a bound must stay below.
        placement: None where none was found yet.
        seen: What was tried.
        n_nodes: Partial chains that were opened.
        open_value: The least that what was not looked at might reach; infinite where all was.
    """

    problem: Problem
    beyond: float
    placement: Placement | None = None
    seen: set[Assignment] = field(default_factory=set)
    n_nodes: int = 0
    open_value: float = inf

    def offer(self, assignment: Assignment) -> float:
        """Try an assignment; return the value above which no bound matters."""
        if assignment in self.seen:
            return self.beyond
        self.seen.add(assignment)
        found = score(self._asked_for(), assignment)
        if isinstance(found, Placement):
            order = ranking(self.problem.objective)
            if self.placement is None or precedes(
                ranks_of(found, order), ranks_of(self.placement, order)
            ):
                self.placement = found
                self.beyond = found.score.of(self.problem.objective)
        return self.beyond

    def _asked_for(self) -> Problem:
        """Return the problem, with a ceiling that lets scoring give up early."""
        if not self.problem.ceilings:
            return self.problem
        objective = self.problem.objective
        limit = min(self.beyond, self.problem.ceilings.get(objective, inf))
        return replace(self.problem, ceilings={**self.problem.ceilings, objective: limit})

    def offer_of(self, devices: tuple[int, ...]) -> Callable[[Assignment], float]:
        """Return `offer` for assignments that count only some devices."""
        return lambda stages: self.offer(
            tuple((devices[device], first, end) for device, first, end in stages)
        )


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


def _side_by_side(chains: Sequence[tuple[PricedChain, float]]) -> _Bounds:
    return _Bounds(
        stages=np.array([chain.stages for chain, _ in chains]),
        hops=np.array([chain.hops for chain, _ in chains]),
        first=np.array([chain.first for chain, _ in chains]),
        rest=np.array([chain.rest for chain, _ in chains]),
        start=np.array([chain.offset for chain, _ in chains]),
        most=np.array([most for _, most in chains]),
    )


def branch(
    relaxation: Relaxation,
    chains: Sequence[tuple[PricedChain, float]],
    best: Best,
    least: float,
) -> None:
    """Open the most promising partial chain first, longer ones before equally promising ones.

    Args:
        relaxation: The problem taken apart.
        chains: Chains under prices, each with what it may cost: infinite where the best placement
            says that.
        best: Tries complete chains, and keeps the best placement.
        least: What any chain costs at least.
    """
    sets = relaxation.sets
    bounds = _side_by_side(chains)
    offer = best.offer_of(relaxation.devices)
    n_units = bounds.stages.shape[-1] - 1
    telling = np.isinf(bounds.most)
    heap: list[tuple[float, int, Assignment, _Node]] = [(least, 0, (), _Node((), 0, bounds.start))]
    while heap:
        least, _, _, node = heappop(heap)
        if least >= best.beyond * (1 - TIE):
            return
        if best.n_nodes >= MOST_NODES or len(best.seen) >= MOST_TRIED:
            best.open_value = min(best.open_value, least)
            return
        place = node.stages[-1][2] if node.stages else 0
        if place == n_units:
            offer(node.stages)
            continue
        best.n_nodes += 1
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
