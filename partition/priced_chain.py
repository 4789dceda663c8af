"""Lower bounds: chains in which limits have a price, solved from the back.

For any prices of at least 0 no placement that keeps the limits costs less than the best chain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from partition.device_sets import DeviceSets
from partition.problem import Assignment
from partition.relaxation import Relaxation
from partition.stage_table import Floats


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
