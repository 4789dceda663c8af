"""The best ways to run a model: settings times placements, each cut at tensors and forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import inf

from devices.topology import Topology
from edgert.errors import BackendError, CapacityError, PlanError
from partition.build_problem import Built, build_problem
from partition.candidates import Candidate, over_ceilings
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.problem import Placement, Rejection
from partition.search import search
from partition.settings import Prepared
from partition.stage_plan import StagePlan, plan_stage

_MOST_SEARCHES = 4  # of one problem, each with less memory where whole tensors did not fit
# Tried in this order when the goal is little memory.
_SPARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)


def candidates(
    workload: LanguageWorkload, topology: Topology, goal: Goal, prepared: Sequence[Prepared]
) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    """Find the best placement for every setting.

    Returns:
        What is possible, in order of the settings, and why the others are not.
    """
    found: list[Candidate] = []
    rejected: list[Rejection] = []
    for option in prepared:
        several = _n_devices(topology) > 1 and not option.cached
        for resident in (False, True) if several else (False,):
            built = build_problem(option.chain, topology, goal, option.overheads, resident=resident)
            rejected += [reason for reason in built.left_out if reason not in rejected]
            if not built.places:
                continue
            try:
                found.append(search_and_cut(workload, option, built, goal))
            except (PlanError, CapacityError, BackendError) as error:
                rejected.append(Rejection(_label(option, resident), error.message))
    return tuple(found), tuple(rejected)


def search_and_cut(
    workload: LanguageWorkload, prepared: Prepared, built: Built, goal: Goal
) -> Candidate:
    """Search, and search again with less where whole tensors do not fit what their bytes did.

    Raises:
        PlanError: nothing satisfies the goal.
        CapacityError: nothing that the searches found can be cut at tensors.
    """
    limits, missed = built.problem, None
    for left in reversed(range(_MOST_SEARCHES)):
        try:
            placement = search(limits)
        except PlanError:
            if missed is None:
                raise
            return missed
        try:
            found = _cut(workload, prepared, built, placement, goal)
        except CapacityError as error:
            if not left:
                raise
            short_bytes = max(1, (error.needed_bytes or 0) - (error.available_bytes or 0))
            pools = list(limits.pool_bytes)
            for pool in _too_small(workload, prepared, built, placement):
                pools[pool] = max(0.0, pools[pool] - short_bytes) if left > 1 else 0.0
            limits = replace(limits, pool_bytes=tuple(pools))
            continue
        over_bytes = found.peak_bytes - goal.ceilings.get("memory_bytes", inf)
        if over_bytes <= 0 or not left:
            return found
        missed = found
        ceiling = max(1.0, limits.ceilings["memory_bytes"] - over_bytes)
        limits = replace(limits, ceilings={**limits.ceilings, "memory_bytes": ceiling})
    raise ValueError(f"{_MOST_SEARCHES} searches are none")


def _too_small(
    workload: LanguageWorkload, prepared: Prepared, built: Built, placement: Placement
) -> set[int]:
    """Return the memories that do not hold what a placement puts there, cut at whole tensors."""
    found = set()
    for choice in placement.stages:
        try:
            plan_stage(workload, prepared, built, (choice, placement), None)
        except CapacityError:
            found.add(built.problem.devices[choice.device].pool)
    # Each stage fits by itself: together they do not.
    return found or {built.problem.devices[choice.device].pool for choice in placement.stages}


def _cut(
    workload: LanguageWorkload,
    prepared: Prepared,
    built: Built,
    placement: Placement,
    goal: Goal,
) -> Candidate:
    """Cut a placement at tensors; where memory counts, with no more than it wants.

    Where it is the goal, with as little as satisfies the ceilings; where it has a ceiling, with as
    much as that allows. The search divides bytes, a plan whole tensors: at the very bytes that meet
    a ceiling the tensors may just miss it.

    Raises:
        CapacityError: tensors do not fit where their bytes did.
    """
    least = goal.minimise == "memory_bytes"
    found = None
    for spare in _SPARES if least else (None, *reversed(_SPARES)):
        try:
            found = materialise(workload, prepared, built, placement, goal, spare)
        except CapacityError:
            if spare is None:
                raise
            continue  # the window of whole tensors is larger than that of their bytes
        over = over_ceilings(found, goal)
        if not over or (not least and "memory_bytes" not in over):
            return found
    if least or found is None:
        return materialise(workload, prepared, built, placement, goal)
    return found


def _n_devices(topology: Topology) -> int:
    """Count devices; a single one that holds everything is among the baselines anyway."""
    return sum(len(host.devices) for host in topology.hosts)


def _label(prepared: Prepared, resident: bool) -> str:
    setting = prepared.setting
    where = ", all in memory" if resident else ""
    where += ", experts in a cache" if prepared.cached and not resident else ""
    return f"ubatch {setting.n_ubatch}, {setting.cache_type} KV{where}"


def materialise(
    workload: LanguageWorkload,
    prepared: Prepared,
    built: Built,
    placement: Placement,
    goal: Goal,
    spare: float | None = None,
) -> Candidate:
    """Name every tensor of a placement and forecast it.

    Args:
        workload: The model.
        prepared: Counted for the setting.
        built: The problem that the placement solves.
        placement: Its solution.
        goal: What is asked.
        spare: Memory of a stage beyond what the search gave it, as a share of that; None fills the
            memory of stages that have it to themselves.

    Raises:
        CapacityError: the bytes the search found do not hold the tensors as they are cut.
    """
    stages = [
        plan_stage(workload, prepared, built, (choice, placement), spare)
        for choice in placement.stages
    ]
    _check_pools(stages)
    devices = [choice.device for choice in placement.stages]
    problem = built.problem
    hops = [problem.first_hops[devices[0]], problem.last_hops[devices[-1]]]
    hops += [problem.hops[pair] for pair in pairwise(devices)]
    known = [hop for hop in hops if hop is not None]
    return Candidate(
        setting=prepared.setting,
        stages=tuple(stages),
        hops_decode_s=sum(hop.decode_s for hop in known),
        hops_prefill_s=sum(hop.prefill_s for hop in known),
        sent_bytes=sum(hop.sent_bytes for hop in known),
        tokens_per_pass=goal.tokens_per_pass,
        gap=placement.gap,
    )


def _check_pools(stages: Sequence[StagePlan]) -> None:
    """Hold the peaks of whole tensors against each memory, stages that share it together."""
    peaks: dict[tuple[str, str], int] = {}
    for stage in stages:
        host = stage.place.host
        for pool_id, peak_bytes in (
            (stage.place.device.pool_id, stage.peak_bytes - stage.host_bytes),
            (stage.place.program_pool, stage.host_bytes),
        ):
            key = (host.host_id, pool_id)
            peaks[key] = peaks.get(key, 0) + peak_bytes
            available = host.pool(pool_id).available_bytes
            if peaks[key] > available:
                raise CapacityError(
                    f"whole tensors take {peaks[key]:,} bytes of {host.host_id}'s {pool_id}, "
                    f"{available:,} are there",
                    needed_bytes=peaks[key],
                    available_bytes=available,
                )
