"""The planner: workload, topology and goal in, one plan with its reasons out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from devices.topology import Topology
from edgert.errors import PlanError
from edgert.units import format_bytes, format_rate, format_seconds
from partition.baselines import PlainWay, plain_ways
from partition.candidates import Candidate, candidates
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.popularity import Popularity
from partition.problem import Metric, Rejection
from partition.settings import Prepared, prepare
from partition.tensor_candidates import tensor_candidates

_TIES = 1e-9
_MOST_REASONS = 8
_ASSUMED = Popularity()


@dataclass(frozen=True, slots=True)
class Reason:
    """A decision and why it was taken."""

    what: str
    choice: str
    reason: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What was decided.

    Attributes:
        goal: What was asked.
        topology: What there was.
        chosen: The way to run the model.
        others: The next best ways, best first.
        plain: The baselines it was scored against.
        binds: What limits it.
        reasons: Its decisions.
        rejected: What was not possible, and why.
        warnings: What a person should know: assumed rates, lossy choices.
    """

    goal: Goal
    topology: Topology
    chosen: Candidate
    others: tuple[Candidate, ...]
    plain: tuple[PlainWay, ...]
    binds: str
    reasons: tuple[Reason, ...]
    rejected: tuple[Rejection, ...]
    warnings: tuple[str, ...]


def make_plan(
    workload: LanguageWorkload,
    topology: Topology,
    goal: Goal,
    popularity: Popularity = _ASSUMED,
) -> Plan:
    """Decide where every weight lives, and what it takes.

    Raises:
        ConfigError: the goal contradicts itself.
        PlanError: nothing satisfies it; the message names each option and its limit.
    """
    goal.checked()
    prepared = prepare(workload, topology, goal, popularity)
    found, rejected = _ways(workload, topology, goal, prepared, popularity)
    plain = plain_ways(workload, topology, goal, prepared)
    executable = [*found, *(way.candidate for way in plain if way.candidate is not None)]
    allowed, broken = _within_ceilings(executable, goal)
    if not allowed:
        raise _no_plan(topology, (*rejected, *broken))
    ranked = _ranked(allowed, goal)
    chosen, others = ranked[0], _distinct(ranked[1:], ranked[0])
    return Plan(
        goal=goal, topology=topology, chosen=chosen, others=others, plain=plain,
        binds=what_binds(chosen),
        reasons=(*_split_reason(chosen, found), *_reasons(chosen, others, plain, goal)),
        rejected=(*rejected, *broken), warnings=_warnings(chosen, plain, goal),
    )  # fmt: skip


def frontier(
    workload: LanguageWorkload,
    topology: Topology,
    goal: Goal,
    metrics: Sequence[Metric],
    popularity: Popularity = _ASSUMED,
) -> tuple[Candidate, ...]:
    """Return the candidates that no other beats in all of `metrics`, best of the first first."""
    every: list[Candidate] = []
    prepared = prepare(workload, topology, goal, popularity)
    for metric in metrics:
        asked = replace(goal, minimise=metric)
        every += _ways(workload, topology, asked, prepared, popularity)[0]
    kept = [one for one in every if not any(_beats(other, one, metrics) for other in every)]
    unique = {tuple(one.of(metric) for metric in metrics): one for one in kept}
    return tuple(unique[key] for key in sorted(unique))


def what_binds(candidate: Candidate) -> str:
    """Say what a faster run of this candidate would need more of."""
    seconds: list[tuple[float, str]] = []
    for stage in candidate.stages:
        decode, name = stage.forecast.decode, stage.place.name
        stall_s = decode.stall_s / len(decode.ends_s)
        rate = stage.forecast.flash_bytes_per_s
        if rate is not None and stall_s > 0:
            read = stage.forecast.read_bytes
            seconds.append(
                (
                    decode.steady_s,
                    f"flash of {stage.place.host.host_id}: {format_bytes(read)} a token at "
                    f"{format_rate(rate)}; {format_bytes(read)} more memory would end it",
                )
            )
        else:
            seconds.append((decode.steady_s, f"computing on {name}"))
    seconds.append((candidate.hops_decode_s, "links between hosts"))
    return max(seconds)[1]


def _ways(
    workload: LanguageWorkload,
    topology: Topology,
    goal: Goal,
    prepared: Sequence[Prepared],
    popularity: Popularity,
) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    """Find the ways with layers one after another, and those with every layer shared."""
    found, rejected = candidates(workload, topology, goal, prepared)
    shared, refused = tensor_candidates(workload, topology, goal, popularity)
    return (*found, *shared), (*rejected, *refused)


def _split_reason(chosen: Candidate, found: Sequence[Candidate]) -> list[Reason]:
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


def _within_ceilings(
    found: Sequence[Candidate], goal: Goal
) -> tuple[list[Candidate], list[Rejection]]:
    allowed, broken = [], []
    for candidate in found:
        over = [m for m, most in goal.ceilings.items() if candidate.of(m) > most * (1 + _TIES)]
        if over:
            reason = (
                f"{over[0]} is {candidate.of(over[0]):.6g}, at most {goal.ceilings[over[0]]:.6g}"
            )
            broken.append(Rejection(candidate.name, reason))
        else:
            allowed.append(candidate)
    return allowed, broken


def _ranked(found: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Order by the goal; within the slack a better prefill (or decode) comes first."""
    second: Metric = "ttft_s" if goal.minimise != "ttft_s" else "tpot_s"
    best = min(candidate.of(goal.minimise) for candidate in found)

    def rank(candidate: Candidate) -> tuple[int, bool, float, float, str]:
        preference = goal.cache_types.index(candidate.setting.cache_type)
        value = candidate.of(goal.minimise)
        beyond = value > best * (1 + goal.ttft_slack) + _TIES
        if beyond:
            return preference, True, value, candidate.of(second), candidate.name
        return preference, False, candidate.of(second), value, candidate.name

    return sorted(found, key=rank)


def _distinct(ranked: Sequence[Candidate], chosen: Candidate) -> tuple[Candidate, ...]:
    seen, kept = {chosen.name}, []
    for candidate in ranked:
        if candidate.name not in seen:
            seen.add(candidate.name)
            kept.append(candidate)
    return tuple(kept[:_MOST_REASONS])


def _reasons(
    chosen: Candidate, others: Sequence[Candidate], plain: Sequence[PlainWay], goal: Goal
) -> tuple[Reason, ...]:
    found = [_ubatch_reason(chosen, others, goal), _cache_reason(chosen, goal)]
    for stage in chosen.stages:
        tiers = stage.tiers
        if tiers.streamed:
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
            found.append(
                Reason(
                    f"weights on {stage.place.name}", "all in memory",
                    "they fit, with kernels for interleaved rows where ggml has them",
                )
            )  # fmt: skip
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


def _baseline_reasons(chosen: Candidate, plain: Sequence[PlainWay]) -> list[Reason]:
    possible = [way for way in plain if way.tpot_s is not None]
    if not possible:
        return [Reason("against baselines", "none is possible", plain[0].reason if plain else "")]
    best = min(possible, key=lambda way: way.tpot_s or 0.0)
    ratio = (best.tpot_s or 0.0) / chosen.tpot_s
    what = "gives way to" if best.candidate is chosen else "over"
    return [
        Reason(
            "against baselines", f"{what} {best.name}",
            f"{ratio:.2f}x: {format_seconds(best.tpot_s or 0.0)} a token against "
            f"{format_seconds(chosen.tpot_s)}",
        )
    ]  # fmt: skip


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


def _warnings(chosen: Candidate, plain: Sequence[PlainWay], goal: Goal) -> tuple[str, ...]:
    found = []
    for stage in chosen.stages:
        device, host = stage.place.device, stage.place.host
        rates = [k.matvec_bytes_per_s for k in device.kernels]
        rates += [host.flash.streaming] if host.flash is not None and stage.tiers.streamed else []
        origins = sorted({rate.origin for rate in rates} - {"measured"})
        if origins:
            found.append(
                f"rates of {stage.place.name} are {' and '.join(origins)}, not measured: "
                "edgert devices --measure on that host makes the prediction trustworthy"
            )
    if chosen.setting.cache_type != "f16":
        found.append(f"the KV cache is {chosen.setting.cache_type}: lossy, by request")
    faster = [w for w in plain if w.tpot_s is not None and w.tpot_s < chosen.tpot_s * (1 - _TIES)]
    found += [
        f"{way.name} is predicted faster ({format_seconds(way.tpot_s or 0.0)} a token) but does "
        "not satisfy the goal"
        for way in faster
        if way.candidate is not None or goal.ceilings
    ]
    return tuple(found)


def _no_plan(topology: Topology, rejected: Sequence[Rejection]) -> PlanError:
    lines = [f"  {item.option}: {item.reason}" for item in rejected[:_MOST_REASONS]]
    more = len(rejected) - len(lines)
    lines += [f"  and {more} more"] if more > 0 else []
    hosts = ", ".join(host.host_id for host in topology.hosts)
    return PlanError(
        "no plan satisfies the goal on " + hosts + ":\n" + "\n".join(lines),
        hint="raise --memory or a ceiling, lower -c, or allow --cache-types q8_0",
    )


def _beats(other: Candidate, one: Candidate, metrics: Sequence[Metric]) -> bool:
    pairs = [(other.of(metric), one.of(metric)) for metric in metrics]
    return all(a <= b * (1 + _TIES) for a, b in pairs) and any(
        a < b * (1 - _TIES) for a, b in pairs
    )
