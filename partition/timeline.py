"""The simulated timeline of a plan: loading, a prefill, a few tokens, and the memory held."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from edgert.timeline import MemoryPoint, Span, Timeline
from partition.candidates import Candidate
from partition.stage_plan import StagePlan

_SHOWN_PASSES = 2
_LOAD_STEPS = 8


def plan_timeline(candidate: Candidate) -> Timeline:
    """Return the timeline of a candidate.

    Stages follow each other within a token, parallel ones begin it together.
    """
    load_s = candidate.load_s
    spans: list[Span] = []
    memory: list[MemoryPoint] = []
    start_s = load_s
    for stage in candidate.stages:
        place = stage.place.name
        size = stage.forecast.load_bytes
        spans.append(Span(place, "flash", "load pinned weights", 0.0, load_s, size))
        end_s = start_s + stage.forecast.prefill_s
        spans.append(Span(place, "compute", "prefill", start_s, end_s))
        memory += _memory(stage, load_s, start_s)
        start_s = start_s if candidate.parallel else end_s
    first_token_s = load_s + candidate.ttft_s
    for index in range(_SHOWN_PASSES):
        start_s = first_token_s + index * candidate.tpot_s * candidate.tokens_per_pass
        for stage in candidate.stages:
            spans += _last_pass(stage, start_s)
            end_s = start_s + stage.forecast.decode.steady_s
            spans += _hop(stage, candidate, end_s)
            share_s = candidate.hops_decode_s / len(candidate.stages)
            start_s = start_s if candidate.parallel else end_s + share_s
    for stage in candidate.stages:
        memory.append(MemoryPoint(stage.place.name, start_s, _held(stage)))
    memory += _programs(candidate.stages, start_s)
    return Timeline("predicted", tuple(spans), tuple(memory))


def _last_pass(stage: StagePlan, start_s: float) -> list[Span]:
    """Return the spans of the steady pass, moved to where it happens."""
    passes = stage.forecast.decode
    began_s = passes.ends_s[-1] - passes.steady_s
    shift_s = start_s - began_s
    return [
        replace(span, start_s=max(span.start_s, began_s) + shift_s, end_s=span.end_s + shift_s)
        for span in passes.spans
        if began_s < span.end_s <= passes.ends_s[-1]
    ]


def _hop(stage: StagePlan, candidate: Candidate, at_s: float) -> list[Span]:
    if not candidate.hops_decode_s:
        return []
    share_s = candidate.hops_decode_s / len(candidate.stages)
    return [Span(stage.place.name, "link", "hidden state", at_s, at_s + share_s)]


def _memory(stage: StagePlan, load_s: float, prefill_s: float) -> list[MemoryPoint]:
    """Return what is held while loading, and from the prefill on.

    A point holds until the next one, so each step of loading shows what its end has.
    """
    place, loaded = stage.place.name, _loaded(stage)
    points = [
        MemoryPoint(
            place,
            load_s * step / _LOAD_STEPS,
            loaded | {"pinned": loaded["pinned"] * (step + 1) // _LOAD_STEPS},
        )
        for step in range(_LOAD_STEPS)
    ]
    return [
        *points,
        MemoryPoint(place, load_s, loaded | {"staging": 0}),
        MemoryPoint(place, prefill_s, _held(stage)),
    ]


def _programs(stages: Sequence[StagePlan], end_s: float) -> list[MemoryPoint]:
    """Return what programs take of their host's memory where its stages compute from others."""
    held: dict[str, int] = {}
    for stage in stages:
        if stage.host_bytes:
            pool = f"{stage.place.host.host_id}/{stage.place.program_pool}"
            held[pool] = held.get(pool, 0) + stage.host_bytes
    return [
        MemoryPoint(pool, at_s, {"program": size})
        for pool, size in held.items()
        for at_s in (0.0, end_s)
    ]


def _loaded(stage: StagePlan) -> dict[str, int]:
    """Return what is held when the last weight arrives; compute buffers are not touched yet."""
    moving_bytes = stage.tiers.window_bytes + stage.cache_bytes
    return {
        "program": stage.fixed_bytes - stage.buffer_bytes - stage.host_bytes,
        "kv cache": stage.kv_bytes,
        "pinned": stage.forecast.held_bytes - moving_bytes,
        "staging": stage.staging_bytes,
        "window": 0,
        "expert cache": 0,
        "compute buffers": 0,
    }


def _held(stage: StagePlan) -> dict[str, int]:
    return _loaded(stage) | {
        "staging": stage.working_bytes,
        "window": stage.tiers.window_bytes,
        "expert cache": stage.cache_bytes,
        "compute buffers": stage.buffer_bytes,
    }
