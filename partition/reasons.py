"""Why a plan is as it is: decisions, what binds, warnings; words only, nothing is decided here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgert.units import format_bytes, format_rate, format_seconds
from partition.baselines import PlainWay
from partition.candidates import Candidate
from partition.goal import Goal
from partition.problem import TIE_SHARE
from partition.rates_used import stage_rates
from partition.stage_plan import StagePlan

_FLASH_SHARE = 0.1  # of a pass spent waiting, from which on flash is what binds


@dataclass(frozen=True, slots=True)
class Reason:
    """A decision and why it was taken."""

    what: str
    choice: str
    reason: str


def what_binds(candidate: Candidate) -> str:
    """Say what a faster run of this candidate would need more of."""
    seconds = [_stage_binds(stage) for stage in candidate.stages]
    seconds.append((candidate.hops_decode_s, "links between hosts"))
    return max(seconds)[1]


def _stage_binds(stage: StagePlan) -> tuple[float, str]:
    """Return a stage's seconds and what most of them are spent on, once reads run ahead."""
    decode = stage.forecast.decode
    rate = stage.forecast.flash_bytes_per_s
    if rate is None or decode.steady_stall_s < _FLASH_SHARE * decode.steady_s:
        return decode.steady_s, f"computing on {stage.place.name}"
    read = format_bytes(stage.forecast.read_bytes)
    return decode.steady_s, (
        f"flash of {stage.place.host.host_id}: {read} a token at {format_rate(rate)}; every byte "
        "more of memory is a byte less to read"
    )


def split_reason(chosen: Candidate, found: Sequence[Candidate]) -> list[Reason]:
    """Compare sharing every layer with layers one after another, where both are possible."""
    shared = [candidate for candidate in found if candidate.parallel]
    chain = [candidate for candidate in found if not candidate.parallel]
    if not shared or not chain:
        return []
    one, other = (min(ways, key=lambda way: way.tpot_s) for ways in (shared, chain))
    return [
        Reason(
            "how hosts share the work",
            "tensor parallel" if chosen.parallel else "layers one after another",
            f"sharing every layer: {format_seconds(one.tpot_s)} a token, exchanges "
            f"{format_seconds(one.hops_decode_s)} of it; one after another on "
            f"{len({stage.place.name for stage in other.stages})} devices: "
            f"{format_seconds(other.tpot_s)}",
        )
    ]


def decisions(
    chosen: Candidate, others: Sequence[Candidate], plain: Sequence[PlainWay], goal: Goal
) -> tuple[Reason, ...]:
    """Return every decision of a plan with its reason, the baselines last."""
    found = [_ubatch_reason(chosen, others, goal), _cache_reason(chosen, goal)]
    for stage in chosen.stages:
        tiers = stage.tiers
        if tiers.streamed and not tiers.cached:
            found.append(
                Reason(
                    f"weights on {stage.place.name}",
                    f"{len(tiers.pinned)} tensors pinned, {len(tiers.streamed)} streamed",
                    f"{format_bytes(stage.weights.every_bytes)} of weights, "
                    f"{format_bytes(stage.forecast.held_bytes)} of room for them; a fixed pinned "
                    "set saves its own bytes on every token, a cache of a cyclic pass saves none",
                )
            )
        else:
            found.append(_in_memory(stage))
    used = {stage.place.name for stage in chosen.stages}
    for candidate in others:
        extra = sorted({stage.place.name for stage in candidate.stages} - used)
        if extra and candidate.of(goal.minimise) > chosen.of(goal.minimise):
            found.append(
                Reason(
                    f"not using {', '.join(extra)}", "left out",
                    f"{candidate.name} would take {format_seconds(candidate.tpot_s)} a token, "
                    f"the plan takes {format_seconds(chosen.tpot_s)}",
                )
            )  # fmt: skip
    return (*found, *_baseline_reasons(chosen, plain))


def _in_memory(stage: StagePlan) -> Reason:
    what, tiers = f"weights on {stage.place.name}", stage.tiers
    if tiers.experts is not None:
        beside = f"{len(tiers.pinned)} tensors pinned"
        beside += f", {len(tiers.streamed)} streamed" if tiers.streamed else ""
        stays = "what fits of what every token uses" if tiers.streamed else "what every token uses"
        return Reason(
            what, f"{beside}, experts in a cache of {format_bytes(tiers.experts.cache_bytes)}",
            f"{stays} stays; of the experts that a token wants about "
            f"{100 * stage.forecast.found:.0f} % are in the cache, only the others are read",
        )  # fmt: skip
    if tiers.layout == "repacked":
        why = "they fit, with kernels for interleaved rows where ggml has them"
        return Reason(what, "all in memory, rows interleaved while loading", why)
    return Reason(what, "all in memory, as in the file", "they fit")


def _baseline_reasons(chosen: Candidate, plain: Sequence[PlainWay]) -> list[Reason]:
    possible = [way for way in plain if way.tpot_s is not None]
    if not possible:
        return [Reason("against baselines", "none is possible", plain[0].reason if plain else "")]
    best = min(possible, key=lambda way: way.tpot_s or 0.0)
    ratio = (best.tpot_s or 0.0) / chosen.tpot_s
    what = "gives way to" if best.candidate is chosen else _compared(round(ratio, 2))
    return [
        Reason(
            "against baselines", f"{what} {best.name}",
            f"{ratio:.2f}x: {format_seconds(best.tpot_s or 0.0)} a token against "
            f"{format_seconds(chosen.tpot_s)}",
        )
    ]  # fmt: skip


def _compared(ratio: float) -> str:
    """Say how a plan stands to a baseline that takes so many times as long."""
    if ratio == 1.0:
        return "level with"
    return "over" if ratio > 1.0 else "slower than"


def _ubatch_reason(chosen: Candidate, others: Sequence[Candidate], goal: Goal) -> Reason:
    same = [c for c in others if c.setting.cache_type == chosen.setting.cache_type]
    fastest = min([chosen, *same], key=lambda candidate: candidate.ttft_s)
    text = f"first token of {goal.n_prompt} after {format_seconds(chosen.ttft_s)}"
    if fastest is not chosen:
        text += (
            f"; {fastest.setting.n_ubatch} would take {format_seconds(fastest.ttft_s)} and "
            f"{format_seconds(fastest.tpot_s)} a token instead of {format_seconds(chosen.tpot_s)}"
        )
    return Reason("tokens computed at once", str(chosen.setting.n_ubatch), text)


def _cache_reason(chosen: Candidate, goal: Goal) -> Reason:
    kind = chosen.setting.cache_type
    if kind == "f16":
        return Reason("KV cache", "f16", "no precision is given up unless it is allowed")
    preferred = ", ".join(goal.cache_types[: goal.cache_types.index(kind)]) or "nothing"
    return Reason(
        "KV cache", kind, f"allowed by the request; {preferred} before it was not possible"
    )


def warnings_of(chosen: Candidate, plain: Sequence[PlainWay], goal: Goal) -> tuple[str, ...]:
    """Return what a person should know: rates not measured, lossy choices, faster ways refused."""
    found = []
    for stage in chosen.stages:
        origins = sorted({rate.origin for rate in stage_rates(stage)} - {"measured"})
        if origins:
            found.append(
                f"rates of {stage.place.name} are {' and '.join(origins)}, not measured: "
                "edgert devices --measure on that host makes the prediction trustworthy"
            )
    if chosen.setting.cache_type != "f16":
        found.append(f"the KV cache is {chosen.setting.cache_type}: lossy, by request")
    faster = [
        w for w in plain if w.tpot_s is not None and w.tpot_s < chosen.tpot_s * (1 - TIE_SHARE)
    ]
    found += [
        f"{way.name} is predicted faster ({format_seconds(way.tpot_s or 0.0)} a token), but "
        + (
            "does not satisfy the goal"
            if way.candidate is not None or goal.ceilings
            else "this runtime does not run the model that way"
        )
        for way in faster
    ]
    return tuple(found)
