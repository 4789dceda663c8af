"""A problem taken apart for pricing: a chain, and the limits that make it more than one.

Shared memories and ceilings tie stages together. With a price instead of each limit, and of only
some devices where that helps, a chain is left that `priced_chain` solves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from partition.chain_search import hop_costs
from partition.device_sets import DeviceSets, device_sets
from partition.problem import METRICS, DeviceOption, Problem
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
