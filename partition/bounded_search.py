"""Exact search for problems with ceilings or shared memories.

Prices of the limits give a lower bound, and the chains they lead to give placements. Where the two
do not meet, problems with shared memories are taken apart by which of the sharing devices are used:
a memory with one user needs no price. What is still open then is branched on stage by stage.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, product
from math import inf

import numpy as np

from edgert.errors import PlanError
from partition.branching import Best, branch
from partition.evaluate import score
from partition.priced_chain import PricedChain, least_chain, priced
from partition.prices import Bound, tighten
from partition.problem import METRICS, Assignment, Placement, Problem
from partition.relaxation import Relaxation, leave_room, relax, restrict
from partition.stage_load import TIE

# Chains under different prices; more of them drop little more.
_MOST_BOUNDS = 24
_MOST_LIMIT_BOUNDS = 6
_MOST_PARTS = 1024


def bounded_search(problem: Problem) -> Placement | None:
    """Find the best placement, the fastest one where several are equal; None where there is none.

    It is proven best unless its `gap` says otherwise: the search stops after MOST_NODES partial
    chains or MOST_TRIED whole ones, which many devices under a ceiling on speed may need.

    Raises:
        PlanError: too many different devices, or nothing found before the search stopped.
    """
    found = _search(problem, None)
    if found is None or problem.objective == "tpot_s" or found.gap > 0:
        return found
    reached = found.score.of(problem.objective) * (1 + TIE)
    ceilings = {**problem.ceilings, problem.objective: reached}
    faster = _search(replace(problem, objective="tpot_s", ceilings=ceilings), found)
    if faster is None:
        return found
    again = score(problem, _assignment(faster))
    return replace(again, gap=found.gap) if isinstance(again, Placement) else found


def _assignment(placement: Placement) -> Assignment:
    return tuple((stage.device, stage.first, stage.end) for stage in placement.stages)


def _search(problem: Problem, known: Placement | None) -> Placement | None:
    whole = relax(problem)
    best = Best(problem, _beyond(whole, METRICS.index(problem.objective)))
    if known is not None:
        best.offer(_assignment(known))
    bounds = tighten(whole, problem.objective, best.offer)
    if _is_open(bounds, best):
        parts = _parts(problem)
        if len(parts) > 1:
            _search_parts(whole, parts, bounds[0], best)
        else:
            _close(whole, bounds, best)
    return _finished(best)


def _is_open(bounds: list[Bound], best: Best) -> bool:
    """Whether something better than the best placement may be left."""
    return bool(bounds) and bounds[0].value < best.beyond * (1 - TIE)


def _finished(best: Best) -> Placement | None:
    if best.placement is None:
        if best.open_value < inf:
            raise PlanError(
                f"none of {len(best.seen):,} placements that were tried keeps the limits, "
                f"and {best.n_nodes:,} partial ones do not prove that none can",
                hint="leave out some devices, or relax a ceiling",
            )
        return None
    better = max(0.0, best.beyond - best.open_value)
    return replace(best.placement, gap=better / (abs(best.beyond) or 1.0))


def _parts(problem: Problem) -> list[tuple[int, ...]]:
    """List the choices of devices that together are all: of each memory, which of its users."""
    pools = [device.pool for device in problem.devices]
    choices = []
    for pool in sorted(set(pools)):
        users = [device for device, other in enumerate(pools) if other == pool]
        choices.append(
            [chosen for n in range(1, len(users) + 1) for chosen in combinations(users, n)]
        )
    if np.prod([len(choice) for choice in choices], dtype=float) > _MOST_PARTS:
        return [tuple(range(len(pools)))]
    return [tuple(sorted(sum(chosen, ()))) for chosen in product(*choices)]


def _search_parts(
    whole: Relaxation, parts: list[tuple[int, ...]], bound: Bound, best: Best
) -> None:
    """Search all parts: with the prices for the whole, then with their own, then by branching.

    Most promising ones come first in each pass, and every pass finds better placements, so that the
    next one has less to look at.
    """
    objective = best.problem.objective
    for_whole = dict(zip(whole.limits, bound.prices, strict=True))
    weights = [float(metric == objective) for metric in METRICS]
    ordered: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = []
    for devices in parts:
        part = restrict(best.problem, whole, devices)
        prices = tuple(for_whole[limit] for limit in part.limits)
        least, _ = least_chain(part.sets, priced(part, weights, prices))
        ordered.append((least, devices, prices))
    left: list[tuple[float, tuple[int, ...], tuple[float, ...]]] = []
    for least, devices, prices in sorted(ordered):
        if least >= best.beyond * (1 - TIE):
            break
        part = leave_room(best.problem, restrict(best.problem, whole, devices))
        bounds = tighten(part, objective, best.offer_of(devices), prices)
        if _is_open(bounds, best):
            left.append((bounds[0].value, devices, bounds[0].prices))
    for least, devices, prices in sorted(left):
        if least >= best.beyond * (1 - TIE):
            break
        # Chains of all parts would not fit in memory, so those of this one are solved again.
        part = leave_room(best.problem, restrict(best.problem, whole, devices))
        bounds = tighten(part, objective, best.offer_of(devices), prices)
        if _is_open(bounds, best):
            _close(part, bounds, best)


def _close(relaxation: Relaxation, bounds: list[Bound], best: Best) -> None:
    """Branch until nothing better than the best placement can be left."""
    chains = [(bound.chain, inf) for bound in bounds[:_MOST_BOUNDS]]
    of_limits = _of_limits(relaxation, best)
    if of_limits is not None:
        branch(relaxation, [*chains, *of_limits], best, bounds[0].value)


def _of_limits(relaxation: Relaxation, best: Best) -> list[tuple[PricedChain, float]] | None:
    """Return chains for each limit and what they may cost; None where a limit cannot be kept."""
    found = []
    try_out = best.offer_of(relaxation.devices)
    for index, limit in enumerate(relaxation.limits):
        prices = [float(index == other) for other in range(len(relaxation.limits))]
        alone = priced(relaxation, [0.0] * len(METRICS), prices)
        found.append((alone, TIE * abs(limit.most)))
        if limit.pool is not None or len(relaxation.limits) == 1:
            continue
        others = tuple(other for other in relaxation.limits if other != limit)
        most = limit.most + TIE * abs(limit.most)

        def offer(assignment: Assignment, least: float = most) -> float:
            try_out(assignment)
            return least * (1 + 2 * TIE)

        bounds = tighten(replace(relaxation, limits=others), METRICS[limit.metric], offer)
        if not bounds or bounds[0].value > most:
            return None
        found += [(bound.chain, most) for bound in bounds[:_MOST_LIMIT_BOUNDS]]
    return found


def _beyond(relaxation: Relaxation, metric: int) -> float:
    """Return more than any placement can cost."""
    n_devices = len(relaxation.pools)
    hops = [relaxation.hops[metric], relaxation.first[metric], relaxation.last[metric]]
    longest = max(float(np.where(np.isfinite(values), values, 0.0).max()) for values in hops)
    worst = float(relaxation.table.metrics[metric].max())
    return (n_devices * worst + (n_devices + 1) * longest) * (1 + TIE) + TIE
