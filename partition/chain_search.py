"""Exact dynamic programme for problems without ceilings in which no two devices share a memory.

A state is how far the chain is, which devices it has used, and which one is last. Costs are tuples
compared lexicographically, so ties are settled while searching.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partition.device_sets import DeviceSets, device_sets
from partition.evaluate import hop_vector, score
from partition.problem import Assignment, Hop, Placement, Problem
from partition.stage_load import ranking
from partition.stage_table import Floats, stage_table

_SAME = 1e-12  # relative; sums of the same numbers in another order differ by less


@dataclass(frozen=True, slots=True)
class _Costs:
    """Costs to be compared lexicographically along the first axis.

    Attributes:
        stages: (n_ranks, n_devices, first, end).
        hops: (n_ranks, source, target).
        first: (n_ranks, n_devices), from home.
        last: (n_ranks, n_devices), back home.
    """

    stages: Floats
    hops: Floats
    first: Floats
    last: Floats


@dataclass(slots=True)
class _Progress:
    """The best ways found into each state: by set, and in a set by last device and units done."""

    values: list[Floats]  # (n_ranks, n_devices, n_units + 1)
    starts: list[NDArray[np.intp]]  # (n_devices, n_units + 1), where the last stage starts
    sources: list[NDArray[np.intp]]  # (n_devices, n_units + 1), which device was last there
    smaller: list[NDArray[np.intp]]  # (n_devices,), the set before the last device


def separable(problem: Problem) -> bool:
    """Whether `chain_search` may be used."""
    pools = [device.pool for device in problem.devices]
    return len(set(pools)) == len(pools) and not problem.ceilings


def chain_search(problem: Problem) -> Placement | None:
    """Find the best placement; None where there is none.

    Ties: TPOT, TTFT, memory, fewer stages, then what comes first.

    Raises:
        ValueError: devices share a memory, or there are ceilings.
        PlanError: too many different devices.
    """
    if not separable(problem):
        raise ValueError("devices share a memory, or there are ceilings")
    sets = device_sets(problem)
    costs = _costs(problem)
    assignment = _best_path(sets, costs, _advance(sets, costs))
    if assignment is None:
        return None
    found = score(problem, assignment)
    return found if isinstance(found, Placement) else None


def hop_costs(problem: Problem) -> tuple[Floats, Floats, Floats]:
    """Return the metrics of hops, infinite where there is none.

    Returns:
        Between devices (n_metrics, source, target), from home and back (n_metrics, n_devices).
    """
    n_devices = len(problem.devices)
    between = [[problem.hops.get((a, b)) for b in range(n_devices)] for a in range(n_devices)]
    return (
        np.moveaxis(np.array([_hop_rows(row) for row in between]), -1, 0),
        _hop_rows(problem.first_hops).T,
        _hop_rows(problem.last_hops).T,
    )


def _hop_rows(hops: list[Hop | None] | tuple[Hop | None, ...]) -> Floats:
    return np.array([(np.inf,) * 5 if hop is None else hop_vector(hop) for hop in hops])


def _costs(problem: Problem) -> _Costs:
    table = stage_table(problem)
    order = list(ranking(problem.objective))
    choices = np.where(table.possible, table.metrics[order], np.inf)
    choices = np.moveaxis(choices, -1, 1)
    stages = _pick(choices, _lexicographic_least(choices))
    # The last rank counts stages.
    stages = np.concatenate((stages, np.ones_like(stages[:1])))
    hops, first, last = (
        np.concatenate((values[order], np.zeros_like(values[:1]))) for values in hop_costs(problem)
    )
    return _Costs(stages, hops, first, last)


def _lexicographic_least(costs: Floats) -> NDArray[np.intp]:
    """Return the index along axis 1 of the lexicographically least (n_ranks, n, ...) costs."""
    alive = np.ones(costs.shape[1:], dtype=np.bool_)
    for rank in costs:
        values = np.where(alive, rank, np.inf)
        least = values.min(axis=0)
        alive &= values <= least + _SAME * np.abs(least)
        if np.count_nonzero(alive) == least.size:
            break
    found: NDArray[np.intp] = alive.argmax(axis=0)
    return found


def _pick(costs: Floats, index: NDArray[np.intp]) -> Floats:
    return np.take_along_axis(costs, index[None, None], axis=1)[:, 0]


def _advance(sets: DeviceSets, costs: _Costs) -> _Progress:
    n_sets, n_devices = sets.members.shape
    n_ranks, _, n_places, _ = costs.stages.shape
    shape = (n_devices, n_places)
    progress = _Progress(
        [np.full((n_ranks, *shape), np.inf) for _ in range(n_sets)],
        [np.zeros(shape, dtype=np.intp) for _ in range(n_sets)],
        [np.zeros(shape, dtype=np.intp) for _ in range(n_sets)],
        [np.zeros(n_devices, dtype=np.intp) for _ in range(n_sets)],
    )
    for index in range(n_sets):
        for device in np.flatnonzero(sets.allowed[index]):
            larger = sets.larger[index, device]
            if index == 0:
                arrived = np.full((n_ranks, n_places), np.inf)
                arrived[:, 0] = costs.first[:, device]
                source = np.zeros(n_places, dtype=np.intp)
            else:
                ways = progress.values[index] + costs.hops[:, :, device, None]
                source = _lexicographic_least(ways)
                arrived = _pick(ways, source)
            ends = arrived[:, :, None] + costs.stages[:, device]
            start = _lexicographic_least(ends)
            progress.values[larger][:, device] = _pick(ends, start)
            progress.starts[larger][device] = start
            progress.sources[larger][device] = source
            progress.smaller[larger][device] = index
    return progress


def _best_path(sets: DeviceSets, costs: _Costs, progress: _Progress) -> Assignment | None:
    n_devices = sets.members.shape[1]
    complete = np.array([values[:, :, -1] for values in progress.values]) + costs.last
    ways = np.moveaxis(complete, 0, 1).reshape(len(costs.last), -1)
    best = int(_lexicographic_least(ways))
    if not np.isfinite(ways[0, best]):
        return None
    index, device = divmod(best, n_devices)
    end = progress.starts[0].shape[1] - 1
    path: list[tuple[int, int, int]] = []
    while end > 0:
        first = int(progress.starts[index][device, end])
        path.append((device, first, end))
        source = int(progress.sources[index][device, first])
        index = int(progress.smaller[index][device])
        device, end = source, first
    return tuple(reversed(path))
