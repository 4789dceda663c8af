"""The planner of ONNX models: workload, topology and goal in, one plan with its reasons out. Pure.

Weights stay in memory; a plan is which device runs which part of the graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devices.topology import Topology
from edgert.errors import FormatError, PlanError
from edgert.timeline import MemoryPoint, Span, Timeline
from edgert.units import format_bytes, format_seconds
from partition.baselines import PlainWay
from partition.build_problem import Place
from partition.goal import Goal
from partition.onnx_candidates import OnnxCandidate, onnx_candidate, over_memory
from partition.onnx_cost import float_rates
from partition.onnx_problem import (
    OnnxChain,
    cut_problems,
    is_static,
    onnx_chain,
    usable_places,
)
from partition.onnx_workload import OnnxWorkload
from partition.plan import check_power
from partition.problem import TIE_SHARE, Rejection
from partition.reasons import Reason
from partition.search import search

_MOST_LISTED = 8


@dataclass(frozen=True, slots=True)
class OnnxPlan:
    """What was decided.

    Attributes:
        goal: What was asked.
        topology: What there was.
        chain: The model in units.
        chosen: The way to run it.
        others: The next best ways, best first.
        plain: The whole model on each single device.
        binds: What limits it.
        reasons: Its decisions.
        rejected: What was not possible, and why.
        warnings: What a person should know.
    """

    goal: Goal
    topology: Topology
    chain: OnnxChain
    chosen: OnnxCandidate
    others: tuple[OnnxCandidate, ...]
    plain: tuple[PlainWay, ...]
    binds: str
    reasons: tuple[Reason, ...]
    rejected: tuple[Rejection, ...]
    warnings: tuple[str, ...]


def make_onnx_plan(workload: OnnxWorkload, topology: Topology, goal: Goal) -> OnnxPlan:
    """Decide which device runs which part of a graph.

    Raises:
        ConfigError: the goal contradicts itself, or is about energy that nothing is known of.
        FormatError: the model has no nodes.
        PlanError: nothing satisfies it; the message names each option and its limit.
    """
    goal.checked()
    check_power(topology, goal)
    if not workload.nodes:
        raise FormatError("the graph has no nodes", path=workload.path)
    chain = onnx_chain(workload)
    places, left_out = usable_places(chain, topology, goal)
    rejected = list(left_out)
    plain, found = _single(chain, topology, places, goal)
    for cut in cut_problems(chain, places, topology, goal) if len(places) > 1 else ():
        try:
            placement = search(cut.problem)
        except PlanError as error:
            rejected.append(Rejection("several devices", error.message))
            continue
        choices = [
            (cut.places[s.device], cut.pieces[s.first][0], cut.pieces[s.end - 1][1])
            for s in placement.stages
        ]
        found.append(onnx_candidate(chain, topology, choices))
    allowed, broken = _within(found, goal)
    rejected += [item for item in broken if item not in rejected]
    if not allowed:
        raise _no_plan(plain, rejected)
    ranked = _ranked(allowed, goal)
    return OnnxPlan(
        goal=goal, topology=topology, chain=chain, chosen=ranked[0],
        others=tuple(ranked[1 : 1 + _MOST_LISTED]), plain=plain, binds=_binds(ranked[0]),
        reasons=_reasons(chain, ranked[0], plain), rejected=tuple(dict.fromkeys(rejected)),
        warnings=_warnings(chain, ranked[0]),
    )  # fmt: skip


def onnx_timeline(candidate: OnnxCandidate) -> Timeline:
    """Return the timeline of a candidate: loading, then one inference."""
    spans: list[Span] = []
    memory: list[MemoryPoint] = []
    start_s = candidate.load_s
    hop_s = candidate.hops_s / len(candidate.stages)
    for stage in candidate.stages:
        place = stage.place.name
        spans.append(
            Span(place, "flash", "load weights", 0.0, candidate.load_s, stage.weight_bytes)
        )
        spans.append(Span(place, "compute", "inference", start_s, start_s + stage.compute_s))
        held = {"program": stage.fixed_bytes, "pinned": stage.weight_bytes}
        memory.append(MemoryPoint(place, 0.0, {"program": stage.fixed_bytes, "pinned": 0}))
        memory.append(MemoryPoint(place, candidate.load_s, held))
        memory.append(MemoryPoint(place, start_s, held | {"compute buffers": stage.live_bytes}))
        start_s += stage.compute_s
        if hop_s:
            spans.append(Span(place, "link", "activations", start_s, start_s + hop_s))
            start_s += hop_s
    return Timeline("predicted", tuple(spans), tuple(memory))


def _single(
    chain: OnnxChain, topology: Topology, places: Sequence[Place], goal: Goal
) -> tuple[tuple[PlainWay, ...], list[OnnxCandidate]]:
    """Return the whole model on each device, and those of them that are possible."""
    ways, found = [], []
    for place in places:
        candidate = onnx_candidate(chain, topology, [(place, 0, len(chain.units))])
        reason = over_memory(candidate)
        if is_static(place) and any(chain.static_refusal):
            reason = next(filter(None, chain.static_refusal))
        if place.host.host_id != topology.home and "input" not in goal.may_leave:
            reason = "the input may not leave home"
        name = f"whole model on {place.name}"
        if reason:
            ways.append(PlainWay(name, None, reason))
        else:
            ways.append(PlainWay(name, candidate.tpot_s, "everything fits"))
            found.append(candidate)
    return tuple(ways), found


def _within(
    found: Sequence[OnnxCandidate], goal: Goal
) -> tuple[list[OnnxCandidate], list[Rejection]]:
    allowed: list[OnnxCandidate] = []
    broken = []
    for candidate in found:
        reasons = [over_memory(candidate)] + [
            f"{metric} is {candidate.of(metric):.6g}, at most {most:.6g}"
            for metric, most in goal.ceilings.items()
            if candidate.of(metric) > most * (1 + TIE_SHARE)
        ]
        named = next(filter(None, reasons), "")
        if named:
            broken.append(Rejection(candidate.name, named))
        elif candidate.name not in {other.name for other in allowed}:
            allowed.append(candidate)
    return allowed, broken


def _ranked(found: Sequence[OnnxCandidate], goal: Goal) -> list[OnnxCandidate]:
    """Order by the goal; ways that are alike in it by time, then by fewer stages."""
    best = min(candidate.of(goal.minimise) for candidate in found)

    def rank(candidate: OnnxCandidate) -> tuple[float, float, int, str]:
        value = candidate.of(goal.minimise)
        value = best if value <= best * (1 + TIE_SHARE) else value
        return value, candidate.tpot_s, len(candidate.stages), candidate.name

    return sorted(found, key=rank)


def _binds(chosen: OnnxCandidate) -> str:
    seconds = [(stage.compute_s, f"computing on {stage.place.name}") for stage in chosen.stages]
    return max([*seconds, (chosen.hops_s, "handing activations over")])[1]


def _reasons(
    chain: OnnxChain, chosen: OnnxCandidate, plain: Sequence[PlainWay]
) -> tuple[Reason, ...]:
    found = []
    for stage in chosen.stages:
        units = f"units {stage.first_unit} to {stage.end_unit} of {len(chain.units)}"
        found.append(
            Reason(
                f"graph on {stage.place.name}", units,
                f"{format_seconds(stage.compute_s)}, {format_bytes(stage.weight_bytes)} of weights "
                f"and {format_bytes(stage.live_bytes)} of activations at once",
            )
        )  # fmt: skip
    for one, other in zip(chosen.stages, chosen.stages[1:], strict=False):
        size = chain.handed_bytes[one.end_unit - 1]
        found.append(
            Reason(
                f"cut before unit {other.first_unit}", f"{format_bytes(size)} cross it",
                f"{len(other.inputs)} tensors from {one.place.name} to {other.place.name}",
            )
        )  # fmt: skip
    possible = [way for way in plain if way.tpot_s is not None]
    if possible:
        best = min(possible, key=lambda way: way.tpot_s or 0.0)
        found.append(
            Reason(
                "against one device", best.name,
                f"{format_seconds(best.tpot_s or 0.0)} an inference against "
                f"{format_seconds(chosen.tpot_s)}",
            )
        )  # fmt: skip
    return tuple(found)


def _warnings(chain: OnnxChain, chosen: OnnxCandidate) -> tuple[str, ...]:
    workload, found = chain.workload, []
    for stage in chosen.stages:
        rates = float_rates(stage.place.device)
        if rates.origin != "measured":
            note = f": {rates.note}" if rates.note else ""
            found.append(f"rates of {stage.place.name} are {rates.origin}, not measured{note}")
    found += [
        f"dimension {item.dimension} is {item.reason}: --dimension {item.dimension}=N fixes it"
        for item in workload.open_dimensions[:_MOST_LISTED]
    ]
    if workload.unknown:
        name, why = workload.unknown[0]
        found.append(
            f"{len(workload.unknown)} nodes are counted as no work, {name} first: {why}; "
            "the prediction is too low"
        )
    if None in workload.live_bytes:
        found.append("some activations have no known size: memory may be more than predicted")
    return tuple(found)


def _no_plan(plain: Sequence[PlainWay], rejected: Sequence[Rejection]) -> PlanError:
    lines = [f"  {way.name}: {way.reason}" for way in plain if way.tpot_s is None]
    lines += [f"  {item.option}: {item.reason}" for item in rejected]
    more = [f"  and {len(lines) - _MOST_LISTED} more"] if len(lines) > _MOST_LISTED else []
    return PlanError(
        "no plan satisfies the goal:\n" + "\n".join([*lines[:_MOST_LISTED], *more]),
        hint="raise --memory or a ceiling, or allow another device",
    )
