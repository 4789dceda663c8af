"""Prices of limits under which the relaxed problem bounds the real one best: cutting planes.

The bound is concave in the prices. Every solved chain gives a plane above it; a linear programme
over the planes says where to look next.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from partition.linear_program import minimise
from partition.priced_chain import PricedChain, least_chain, priced, usage
from partition.problem import METRICS, Assignment, Metric
from partition.relaxation import Relaxation
from partition.stage_load import TIE
from partition.stage_table import Floats

_MOST_STEPS = 40
_CLOSE = 1e-3  # relative distance of the bound from the planes at which it is good enough
_LARGEST_BOX = 1e7


@dataclass(frozen=True, slots=True)
class Bound:
    """A chain under prices of the limits, and the least it costs."""

    value: float
    chain: PricedChain
    prices: tuple[float, ...]


def tighten(
    relaxation: Relaxation,
    objective: Metric,
    offer: Callable[[Assignment], float],
    start: Sequence[float] = (),
) -> list[Bound]:
    """Search for good prices.

    Args:
        relaxation: The problem.
        objective: What is minimised.
        offer: Takes the stages of a solved chain; returns the value above which no bound matters.
        start: Prices to look at before any others, one for each limit.

    Returns:
        The bounds that were found, best first; empty where no chain exists.
    """
    weights = [float(metric == objective) for metric in METRICS]
    sizes = np.array([abs(limit.most) or 1.0 for limit in relaxation.limits])
    most = np.array([limit.most for limit in relaxation.limits])
    prices = np.array(start) if len(start) else np.zeros(len(sizes))
    bounds: list[Bound] = []
    planes: list[Floats] = []
    scale, box = 0.0, 1.0
    for _ in range(_MOST_STEPS):
        chain = priced(relaxation, weights, prices.tolist())
        value, path = least_chain(relaxation.sets, chain)
        if not path:
            break
        bounds.append(Bound(value, chain, tuple(prices.tolist())))
        if value >= offer(path) * (1 - TIE) or not len(sizes):
            break
        metrics, used = usage(relaxation, weights, prices.tolist(), path)
        reached = float(np.dot(weights, metrics))
        scale = scale or reached or 1.0
        planes.append(np.array((reached / scale, *((used - most) / sizes))))
        best = max(bound.value for bound in bounds) / scale
        box, found = _next(planes, best, box)
        if found is None:
            break
        prices = found * scale / sizes if len(bounds) > 1 or not len(start) else 0 * sizes
    return sorted(bounds, key=lambda bound: -bound.value)


def _next(planes: Sequence[Floats], best: float, box: float) -> tuple[float, Floats | None]:
    """Return where the planes promise most, in a box that grows while its walls hold it back."""
    table = np.array(planes)
    n_prices = table.shape[1] - 1
    rows = np.hstack((np.ones((len(table), 1)), -table[:, 1:]))
    costs = np.array([-1.0, *(0.0,) * n_prices])
    while box <= _LARGEST_BOX:
        upper = np.array([np.inf, *(box,) * n_prices])
        found = minimise(costs, rows, table[:, 0], upper)
        if found is None:
            return box, None
        if found[0] - best > _CLOSE * max(abs(best), 1.0):
            return box, found[1:]
        if found[1:].max() < box * (1 - TIE):
            return box, None
        box *= 8
    return box, None
