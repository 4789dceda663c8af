"""Why a problem has no placement: what was tried, and which limit each option breaks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import inf

from edgert.errors import PlanError
from partition.bounded_search import bounded_search
from partition.chain_search import chain_search, separable
from partition.enumerate_search import enumerate_search, n_assignments
from partition.evaluate import above_ceiling, score
from partition.problem import Problem, Rejection

_MOST_TRIED = 2000  # assignments, all of which are scored to name the nearest misses
_MOST_LINES = 7


def why_infeasible(problem: Problem) -> PlanError:
    """Build the error for a problem without a placement, the nearest miss first."""
    general = list(_everything(problem))
    tried = list(_options(problem))
    # One line for each choice of devices: its nearest miss.
    nearest: dict[tuple[str, ...], Rejection] = {}
    for rejection in sorted(tried, key=lambda rejection: rejection.excess):
        names = tuple(part.rpartition(" ")[0] for part in rejection.option.split(", "))
        nearest.setdefault(names, rejection)
    listed = sorted(nearest.values(), key=lambda rejection: rejection.excess)
    lines = [f"{rejection.option}: {rejection.reason}" for rejection in (*general, *listed)]
    left = len(lines) - _MOST_LINES
    more = [f"and {left} more"] if left > 0 else []
    return PlanError(
        "\n".join(("no placement satisfies the problem", *lines[:_MOST_LINES], *more)),
        hint=_hint(problem, (*general, *listed)),
    )


def _hint(problem: Problem, rejections: tuple[Rejection, ...]) -> str:
    if problem.ceilings and all("memory of" not in rejection.reason for rejection in rejections):
        return "raise the ceiling, or allow another device"
    return "lower the bits or the context, allow streaming, or allow another device"


def _options(problem: Problem) -> Iterator[Rejection]:
    if n_assignments(problem) <= _MOST_TRIED:
        yield from enumerate_search(problem)[1]
        return
    for device in range(len(problem.devices)):
        found = score(problem, ((device, 0, problem.n_units),))
        if isinstance(found, Rejection):
            yield found


def _everything(problem: Problem) -> Iterator[Rejection]:
    """Say what no placement can do, whichever devices it takes."""
    for unit in range(problem.n_units):
        if all(device.units[unit] is None for device in problem.devices):
            yield Rejection(f"unit {unit}", "is not allowed on any device")
    if not problem.ceilings:
        yield from _memory(problem)
        return
    for metric, ceiling in problem.ceilings.items():
        free = replace(problem, objective=metric, ceilings={})
        least = chain_search(free) if separable(free) else bounded_search(free)
        if least is None:
            yield from _memory(problem)
            return
        value = least.score.of(metric)
        if value > ceiling:
            excess = value / ceiling if ceiling > 0 else inf
            yield Rejection("any placement", above_ceiling(problem, metric, value, ceiling), excess)


def _memory(problem: Problem) -> Iterator[Rejection]:
    """Compare what has to be held at least with all memories together."""
    has = sum(problem.pool_bytes[pool] for pool in {device.pool for device in problem.devices})
    needed = 0.0
    for unit in range(problem.n_units):
        costs = [(option.units[unit], bool(option.flash_bytes_per_s)) for option in problem.devices]
        needed += min(
            (
                cost.kept_bytes + (0.0 if streams else sum(cost.weight_bytes))
                for cost, streams in costs
                if cost is not None
            ),
            default=0.0,
        )
    if needed > has:
        reason = f"memory of all devices: needs at least {needed:,.0f} bytes, has {has:,.0f}"
        yield Rejection("all devices together", reason, needed / has if has else inf)
