"""The two sides of a model that is cut once: every front and every back, forecast once each.

The front is at home, with embeddings and output; the back is on another host. Each is of a file of
its own: one model in several precisions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from devices.topology import Topology
from edgert.errors import CapacityError
from partition.build_problem import Built, build_problem
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.problem import Placement, Rejection, Score, StageChoice
from partition.settings import Prepared
from partition.stage_plan import StagePlan, plan_stage

_NO_SCORE = Score(0.0, 0.0, 0.0, 0.0, 0.0)
# Tried in this order where the goal is little memory.
_SPARES = (0.0, 0.05, 0.2, 0.5, 1.0, 2.0, 5.0)


@dataclass(frozen=True, slots=True)
class SplitFile:
    """The model in one precision.

    Attributes:
        name: Of its file.
        workload: What it holds and computes.
    """

    name: str
    workload: LanguageWorkload


@dataclass(frozen=True, slots=True)
class Sides:
    """What one side can be, and why it cannot be more.

    Attributes:
        stages: By cut, in order of files and devices.
        refused: By file and cut, the limit.
        left_out: Devices and files that hold nothing at all, and why.
    """

    stages: dict[int, list[StagePlan]]
    refused: dict[tuple[str, int], str]
    left_out: tuple[Rejection, ...]


def make_sides(
    files: Sequence[tuple[SplitFile, Sequence[Prepared]]],
    topology: Topology,
    goal: Goal,
    *,
    front: bool,
) -> Sides:
    """Forecast one side of every cut, for one setting.

    Args:
        files: With what is counted for the setting.
        topology: The hosts.
        goal: What is asked; its logits stay at home.
        front: Layers before the cut, at home; else those behind it, elsewhere.
    """
    sides = Sides({}, {}, ())
    left_out: list[Rejection] = []
    for file, prepared in files:
        before = sum(map(len, sides.stages.values()))
        refusals: list[Rejection] = []
        for option in prepared:
            built = build_problem(option.chain, topology, goal, option.overheads)
            refusals += [Rejection(r.option, r.reason) for r in built.left_out]
            for index, place in enumerate(built.places):
                if place.at_home == front:
                    _add(sides, file, (option, built, index), goal, front=front)
        if sum(map(len, sides.stages.values())) == before:
            where = "at home" if front else "on another host"
            left_out += _nothing(file, where, refusals, sides, front=front)
    return replace(sides, left_out=tuple(dict.fromkeys(left_out)))


def _add(
    sides: Sides,
    file: SplitFile,
    case: tuple[Prepared, Built, int],
    goal: Goal,
    *,
    front: bool,
) -> None:
    """Add what one device holds of one file, at every cut."""
    option, built, index = case
    n_layers = len(file.workload.run_layers)
    units = built.problem.devices[index].units
    for cut in range(1, n_layers):
        first, end = (0, cut) if front else (cut, n_layers)
        if any(unit is None for unit in units[first:end]):
            refusal = f"layers {first}..{end} may not all be on {built.places[index].name}"
            sides.refused.setdefault((file.name, cut), refusal)
            continue
        try:
            stage = _stage(file, option, built, (index, first, end), goal)
        except CapacityError as error:
            sides.refused.setdefault((file.name, cut), error.message)
            continue
        known = sides.stages.setdefault(cut, [])
        same = (s for s in known if (s.source, s.place.name) == (stage.source, stage.place.name))
        if all(other.tiers != stage.tiers for other in same):
            known.append(stage)


def _stage(
    file: SplitFile, option: Prepared, built: Built, chosen: tuple[int, int, int], goal: Goal
) -> StagePlan:
    """Hold some layers as the goal wants it: fast, or in little memory.

    Raises:
        CapacityError: they do not fit.
    """
    index, first, end = chosen
    units = built.problem.devices[index].units[first:end]
    every = float(sum(sum(unit.weight_bytes) for unit in units if unit is not None))
    tries: list[tuple[float, float | None]] = [(every, None)]
    if goal.minimise == "memory_bytes":
        tries = [*((0.0, spare) for spare in _SPARES), *tries]
    while True:
        pinned_bytes, spare = tries.pop(0)
        choice = StageChoice(index, first, end, pinned_bytes)
        placement = Placement((choice,), _NO_SCORE)
        try:
            stage = plan_stage(file.workload, option, built, (choice, placement), spare)
            _check_pools(stage)
        except CapacityError:
            if not tries:
                raise
        else:
            return replace(stage, source=file.name)


def _check_pools(stage: StagePlan) -> None:
    """Hold the peak of a stage against the memories of its host."""
    host, device = stage.place.host, stage.place.device
    needed = {device.pool_id: stage.peak_bytes - stage.host_bytes}
    program = stage.place.program_pool
    needed[program] = needed.get(program, 0) + stage.host_bytes
    for pool_id, peak_bytes in needed.items():
        available = host.pool(pool_id).available_bytes
        if peak_bytes > available:
            raise CapacityError(
                f"layers {stage.first_layer}..{stage.end_layer} take {peak_bytes:,} bytes of "
                f"{host.host_id}'s {pool_id}, {available:,} are there",
                needed_bytes=peak_bytes,
                available_bytes=available,
            )


def _nothing(
    file: SplitFile, where: str, refusals: Sequence[Rejection], sides: Sides, *, front: bool
) -> list[Rejection]:
    """Say why no part of a file can be on a side: what its smallest part lacks."""
    cut = 1 if front else len(file.workload.run_layers) - 1
    reason = sides.refused.get((file.name, cut))
    if reason is not None:
        return [Rejection(f"{file.name} {where}", reason)]
    return [Rejection(f"{file.name} {where}: {r.option}", r.reason) for r in refusals]


def weight_bits(stages: Sequence[StagePlan]) -> float:
    """Return the bits of a weight on average, scales included."""
    tensors = {
        (stage.source, tensor.name): tensor
        for stage in stages
        for tensor in (*stage.weights.whole, *stage.weights.looked_up)
    }.values()
    return 8 * sum(t.size_bytes for t in tensors) / sum(prod(t.shape) for t in tensors)
