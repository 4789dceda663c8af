"""What a fixed assignment of units to devices costs at its best, or which limit forbids it."""

from __future__ import annotations

from math import inf

from partition.pinning import Shortfall, choose_pins
from partition.problem import (
    BY_TOKEN,
    METRICS,
    Assignment,
    Hop,
    Metric,
    Placement,
    Problem,
    Rejection,
    Score,
    StageChoice,
)
from partition.stage_load import StageLoad, Vector, total


def score(problem: Problem, assignment: Assignment) -> Placement | Rejection:
    """Choose the pinned bytes of an assignment and predict what it costs.

    The objective is least; among choices that are equal in it TPOT is, then TTFT, then memory.

    Args:
        problem: What is asked.
        assignment: Stages in order of the chain.

    Returns:
        The placement, or the limit that it cannot keep.

    Raises:
        ValueError: a unit or a device is used twice, or a unit is left out.
    """
    _check(problem, assignment)
    option = describe(problem, assignment)
    forbidden = _forbidden(problem, assignment)
    if forbidden is not None:
        return Rejection(option, forbidden)
    loads = [stage_load(problem, *stage) for stage in assignment]
    chosen = choose_pins(problem, loads, hop_metrics(problem, assignment))
    if isinstance(chosen, Shortfall):
        return _rejection(problem, option, chosen)
    stages = tuple(
        StageChoice(device, first, end, sum(load.weight_bytes) - unpinned_bytes)
        for (device, first, end), load, unpinned_bytes in zip(
            assignment, loads, chosen.unpinned_bytes, strict=True
        )
    )
    return Placement(stages, Score(*chosen.metrics))


def describe(problem: Problem, assignment: Assignment) -> str:
    """Name an assignment: `a/cpu 0..12, b/gpu 12..32`."""
    return ", ".join(
        f"{problem.devices[device].name} {first}..{end}" for device, first, end in assignment
    )


def stage_load(problem: Problem, device: int, first: int, end: int) -> StageLoad:
    """Add up units [first, end) on a device.

    Raises:
        ValueError: a unit is not allowed there.
    """
    option = problem.devices[device]
    units = [unit for unit in option.units[first:end] if unit is not None]
    if len(units) < end - first:
        raise ValueError(f"a unit of {first}..{end} is not allowed on {option.name}")
    return StageLoad(
        pool=option.pool,
        weight_bytes=tuple(map(sum, zip(*(unit.weight_bytes for unit in units), strict=True))),
        base_bytes=option.fixed_bytes + sum(unit.kept_bytes for unit in units),
        window_bytes=option.window_bytes,
        decode_s=sum(unit.decode_s for unit in units),
        prefill_s=sum(unit.prefill_s for unit in units),
        flash_bytes_per_s=option.flash_bytes_per_s,
        n_sweeps=option.n_sweeps,
        power_w=option.power_w,
    )


def hop_metrics(problem: Problem, assignment: Assignment) -> Vector:
    """Add up the hops of an assignment whose devices can all talk."""
    hops = [hop for _, _, hop in _hops(problem, assignment) if hop is not None]
    return total([hop_vector(hop) for hop in hops])


def hop_vector(hop: Hop) -> Vector:
    """Return what a hop adds to each metric."""
    return hop.decode_s, hop.prefill_s, 0.0, 0.0, hop.sent_bytes


def _hops(problem: Problem, assignment: Assignment) -> list[tuple[str, str, Hop | None]]:
    path = [device for device, _, _ in assignment]
    names = [problem.devices[device].name for device in path]
    return [
        ("home", names[0], problem.first_hops[path[0]]),
        *(
            (names[i], names[i + 1], problem.hops.get((path[i], path[i + 1])))
            for i in range(len(path) - 1)
        ),
        (names[-1], "home", problem.last_hops[path[-1]]),
    ]


def _check(problem: Problem, assignment: Assignment) -> None:
    ends = [0, *(end for _, _, end in assignment)]
    starts = [*(first for _, first, _ in assignment), problem.n_units]
    devices = [device for device, _, _ in assignment]
    if starts != ends or any(first >= end for _, first, end in assignment):
        raise ValueError(f"units 0..{problem.n_units} are not covered once by {list(assignment)}")
    if len(set(devices)) < len(devices):
        raise ValueError(f"a device is used twice by {list(assignment)}")


def _forbidden(problem: Problem, assignment: Assignment) -> str | None:
    for device, first, end in assignment:
        for unit in range(first, end):
            if problem.devices[device].units[unit] is None:
                return f"unit {unit} is not allowed on {problem.devices[device].name}"
    for source, target, hop in _hops(problem, assignment):
        if hop is None:
            return f"no link from {source} to {target}"
    return None


def _rejection(problem: Problem, option: str, shortfall: Shortfall) -> Rejection:
    excess = shortfall.needed / shortfall.available if shortfall.available > 0 else inf
    if shortfall.pool is not None:
        names = [device.name for device in problem.devices if device.pool == shortfall.pool]
        reason = (
            f"memory of {' and '.join(names)}: needs at least {shortfall.needed:,.0f} bytes, "
            f"has {shortfall.available:,.0f}"
        )
    elif shortfall.metric is not None:
        reason = above_ceiling(problem, shortfall.metric, shortfall.needed, shortfall.available)
    else:
        limits = " and ".join(
            f"{metric} <= {problem.ceilings[metric]:,.6g}"
            for metric in METRICS
            if metric in problem.ceilings
        )
        # Each of them can be kept by itself, so this is nearer than any broken one.
        reason, excess = f"{limits} cannot all hold", 1.0
    return Rejection(option, reason, excess)


def above_ceiling(problem: Problem, metric: Metric, least: float, ceiling: float) -> str:
    """Say that a ceiling cannot be kept, as people gave it: by token."""
    if metric in BY_TOKEN:
        least, ceiling = least / problem.tokens_per_pass, ceiling / problem.tokens_per_pass
    return f"{metric} is at least {least:,.6g}, the ceiling is {ceiling:,.6g}"
