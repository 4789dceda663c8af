"""Lower bounds: what is left of a problem when shared memories and ceilings have a price instead.

For any prices of at least 0 the priced problem is a chain without ceilings, so a dynamic programme
solves it, and no placement that keeps the limits costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from partition.chain_search import hop_costs
from partition.device_sets import DeviceSets, device_sets
from partition.problem import METRICS, Assignment, DeviceOption, Problem
from partition.stage_load import MEMORY
from partition.stage_table import Floats, StageTable, stage_table


@dataclass(frozen=True, slots=True)
class Limit:
    """A ceiling, or a memory that devices share.

    Attributes:
        metric: Index in METRICS.
        pool: Whose memory counts; None for all.
        most: Not to be exceeded.
    """

    metric: int
    pool: int | None
    most: float


@dataclass(frozen=True, slots=True)
class Relaxation:
    """A problem taken apart for pricing.

    Attributes:
        devices: Which of the problem's devices it may use; all else here counts only these.
        sets: Those that may have been used.
        complete: (n_sets,), whether a chain may end there.
        table: Stages.
        hops: (n_metrics, source, target), infinite where there is none.
        first: (n_metrics, n_devices).
        last: (n_metrics, n_devices).
        pools: (n_devices,), the memory of each.
        limits: What makes the problem more than a chain.
    """

    devices: tuple[int, ...]
    sets: DeviceSets
    complete: NDArray[np.bool_]
    table: StageTable
    hops: Floats
    first: Floats
    last: Floats
    pools: tuple[int, ...]
    limits: tuple[Limit, ...]


@dataclass(frozen=True, slots=True)
class PricedChain:
    """A chain with one cost, and the least that completing it takes.

    Attributes:
        stages: (n_devices, first, end), infinite where impossible.
        hops: (source, target).
        first: (n_devices,).
        rest: (n_sets, n_devices, n_units + 1), from the end of a stage back home.
        offset: To be added to the cost of a chain.
    """

    stages: Floats
    hops: Floats
    first: Floats
    rest: Floats
    offset: float


def relax(problem: Problem) -> Relaxation:
    """Take a problem apart.

    Raises:
        PlanError: too many different devices.
    """
    sets = device_sets(problem)
    hops, first, last = hop_costs(problem)
    return Relaxation(
        devices=tuple(range(len(problem.devices))),
        sets=sets,
        complete=np.ones(len(sets.members), dtype=np.bool_),
        table=stage_table(problem),
        hops=hops,
        first=first,
        last=last,
        pools=tuple(device.pool for device in problem.devices),
        limits=_limits(problem),
    )


def restrict(problem: Problem, whole: Relaxation, devices: tuple[int, ...]) -> Relaxation:
    """Allow only some devices, and demand all of those that share a memory with another."""
    kept = list(devices)
    part = _part(problem, devices)
    pools = tuple(device.pool for device in part.devices)
    demanded = np.array([pools.count(pool) > 1 for pool in pools])
    sets = device_sets(part)
    return Relaxation(
        devices=devices,
        sets=sets,
        complete=(sets.members | ~demanded).all(axis=1),
        table=StageTable(whole.table.possible[kept], whole.table.metrics[:, kept]),
        hops=whole.hops[:, kept][:, :, kept],
        first=whole.first[:, kept],
        last=whole.last[:, kept],
        pools=pools,
        limits=_limits(part),
    )


def leave_room(problem: Problem, relaxation: Relaxation) -> Relaxation:
    """Leave to the demanded devices of each memory what a stage there takes at least."""
    if len(set(relaxation.pools)) == len(relaxation.pools):
        return relaxation
    part = _part(problem, relaxation.devices)
    taken = [_least_bytes(device) for device in part.devices]
    capacities = [
        problem.pool_bytes[device.pool]
        - sum(
            taken[other]
            for other, pool in enumerate(relaxation.pools)
            if pool == device.pool and other != index
        )
        for index, device in enumerate(part.devices)
    ]
    return replace(relaxation, table=stage_table(part, capacities))


def _part(problem: Problem, devices: tuple[int, ...]) -> Problem:
    return replace(
        problem,
        devices=tuple(problem.devices[device] for device in devices),
        hops={
            (a, b): problem.hops[source, target]
            for a, source in enumerate(devices)
            for b, target in enumerate(devices)
            if (source, target) in problem.hops
        },
        first_hops=tuple(problem.first_hops[device] for device in devices),
        last_hops=tuple(problem.last_hops[device] for device in devices),
    )


def _least_bytes(device: DeviceOption) -> float:
    """Return what a stage takes at least: that of one unit, streamed or pinned."""
    window_bytes = device.window_bytes if device.flash_bytes_per_s else np.inf
    units = [
        unit.kept_bytes + min(window_bytes, sum(unit.weight_bytes))
        for unit in device.units
        if unit is not None
    ]
    return device.fixed_bytes + min(units, default=0.0)


def _limits(problem: Problem) -> tuple[Limit, ...]:
    pools = [device.pool for device in problem.devices]
    ceilings = [
        Limit(METRICS.index(metric), None, most) for metric, most in problem.ceilings.items()
    ]
    shared = [
        Limit(MEMORY, pool, problem.pool_bytes[pool])
        for pool in sorted(set(pools))
        if pools.count(pool) > 1
    ]
    return (*ceilings, *shared)


def priced(
    relaxation: Relaxation, weights: Sequence[float], prices: Sequence[float]
) -> PricedChain:
    """Solve the chain whose cost is weighted metrics and limits at a price.

    Args:
        relaxation: The problem.
        weights: Of each of METRICS, at least 0.
        prices: Of each limit, at least 0: per unit by which it is exceeded.
    """
    table = relaxation.table
    by_device = _weights_by_device(relaxation, weights, prices)
    costs = np.zeros(table.possible.shape)
    for metric, weight in enumerate(by_device):
        if weight.any():
            costs += weight[:, None, None, None] * table.metrics[metric]
    stages = np.where(table.possible, costs, np.inf).min(axis=-1)
    of_hops = _weights_of_hops(relaxation, weights, prices)
    hops, first, last = (
        _weigh(of_hops, values) for values in (relaxation.hops, relaxation.first, relaxation.last)
    )
    offset = -sum(p * limit.most for p, limit in zip(prices, relaxation.limits, strict=True))
    # (n_sets, n_devices), infinite where a chain must not end
    ends = np.where(relaxation.complete[:, None], last[None, :], np.inf)
    return PricedChain(
        stages, hops, first, rest_of_chain(relaxation.sets, stages, hops, ends), offset
    )


def _weights_by_device(
    relaxation: Relaxation, weights: Sequence[float], prices: Sequence[float]
) -> Floats:
    """Return (n_metrics, n_devices)."""
    found = np.repeat(np.array(weights, dtype=float)[:, None], len(relaxation.pools), axis=1)
    for price, limit in zip(prices, relaxation.limits, strict=True):
        inside = [limit.pool in (None, pool) for pool in relaxation.pools]
        found[limit.metric] += price * np.array(inside)
    return found


def _weights_of_hops(
    relaxation: Relaxation, weights: Sequence[float], prices: Sequence[float]
) -> Floats:
    found = np.array(weights, dtype=float)
    for price, limit in zip(prices, relaxation.limits, strict=True):
        if limit.pool is None:
            found[limit.metric] += price
    return found


def _weigh(weights: Floats, values: Floats) -> Floats:
    """Return the weighted sum over metrics; infinite where there is no hop, whatever the weight."""
    there = np.isfinite(values[0])
    finite = np.where(there, values, 0.0)
    return np.where(there, np.tensordot(weights, finite, axes=1), np.inf)


def rest_of_chain(sets: DeviceSets, stages: Floats, hops: Floats, ends: Floats) -> Floats:
    """Return the least cost from the end of a stage back home.

    Args:
        sets: Devices that may have been used.
        stages: (n_devices, first, end).
        hops: (source, target).
        ends: (n_sets, n_devices), of ending a chain there.

    Returns:
        (n_sets, n_devices, n_units + 1).
    """
    n_sets, n_devices = sets.members.shape
    rest = np.full((n_sets, n_devices, stages.shape[1]), np.inf)
    rest[:, :, -1] = ends
    for index in range(n_sets - 1, 0, -1):
        members = np.flatnonzero(sets.members[index])
        for device in np.flatnonzero(sets.allowed[index]):
            after = rest[sets.larger[index, device], device]
            onwards = (stages[device] + after).min(axis=1)
            ways = hops[members, device][:, None] + onwards
            rest[index, members] = np.minimum(rest[index, members], ways)
    return rest


def least_chain(sets: DeviceSets, chain: PricedChain) -> tuple[float, Assignment]:
    """Return the least cost of a chain, and the stages that reach it; none where it is infinite."""
    n_units = chain.stages.shape[1] - 1
    path: list[tuple[int, int, int]] = []
    index, place, least = 0, 0, np.inf
    while place < n_units:
        hop = chain.hops[path[-1][0]] if path else chain.first
        ways = hop[:, None] + chain.stages[:, place] + _after(sets, chain, index)
        ways[~sets.allowed[index]] = np.inf
        if not path:
            least = float(ways.min()) + chain.offset
            if not np.isfinite(least):
                return least, ()
        device, end = (int(i) for i in np.unravel_index(ways.argmin(), ways.shape))
        path.append((device, place, end))
        index, place = int(sets.larger[index, device]), end
    return least, tuple(path)


def usage(
    relaxation: Relaxation,
    weights: Sequence[float],
    prices: Sequence[float],
    assignment: Assignment,
) -> tuple[Floats, Floats]:
    """Return the metrics (n_metrics,) and the use of each limit (n_limits,) at these prices."""
    by_device = _weights_by_device(relaxation, weights, prices)
    used = np.zeros((len(relaxation.pools), len(weights)))
    for device, first, end in assignment:
        choices = relaxation.table.metrics[:, device, first, end]
        costs = by_device[:, device] @ choices
        costs[~relaxation.table.possible[device, first, end]] = np.inf
        used[device] = choices[:, costs.argmin()]
    path = [device for device, _, _ in assignment]
    hops = relaxation.first[:, path[0]] + relaxation.last[:, path[-1]]
    hops = hops + sum(relaxation.hops[:, a, b] for a, b in pairwise(path))
    uses = []
    for limit in relaxation.limits:
        inside = [limit.pool in (None, pool) for pool in relaxation.pools]
        of_hops = hops[limit.metric] if limit.pool is None else 0.0
        uses.append(used[inside, limit.metric].sum() + of_hops)
    return used.sum(axis=0) + hops, np.array(uses)


def _after(sets: DeviceSets, chain: PricedChain, index: int) -> Floats:
    """Return (n_devices, n_units + 1): what follows a stage of each device from this set on."""
    devices = np.arange(sets.members.shape[1])
    following: Floats = chain.rest[sets.larger[index], devices]
    return following
