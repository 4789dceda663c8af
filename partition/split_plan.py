"""Edge and cloud: one cut, a precision on each side, a context and a codec, exactly. Pure.

Source: one-point split compression (arXiv 2511.04002) chooses split, precisions and length under
memory and latency; how that is searched and what decides among equals is our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from devices.topology import Topology
from edgert.errors import ConfigError
from partition.baselines import PlainWay, plain_ways
from partition.candidates import Candidate
from partition.goal import Goal
from partition.plan import Plan, check_power, distinct, no_plan, within_ceilings
from partition.popularity import Popularity
from partition.problem import TIE_SHARE, Metric, Rejection
from partition.reasons import decisions, warnings_of, what_binds
from partition.settings import Prepared, Setting, prepare
from partition.split_link import SplitCodecs, hidden_bytes, split_hops
from partition.split_reasons import split_decisions, split_warnings
from partition.split_stages import Sides, SplitFile, make_sides, weight_bits

_ASSUMED = Popularity()
_MOST_LISTED = 8
_LEAST_LAYERS, _LEAST_HOSTS = 2, 2
_LOSSES = ("f32", "f16", "adaptive")  # codecs, the most precise first


@dataclass(frozen=True, slots=True)
class SplitAsk:
    """What may be chosen from.

    Attributes:
        fronts: The model in precisions for home, which keeps embeddings and output.
        backs: In precisions for the other host.
        codecs: How hidden states may travel.
        contexts: Positions of the cache, those that are preferred first; empty for the goal's.
    """

    fronts: tuple[SplitFile, ...]
    backs: tuple[SplitFile, ...]
    codecs: SplitCodecs
    contexts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class SplitPlan:
    """A plan with one cut.

    Attributes:
        plan: As any plan.
        front: The file at home.
        back: The other one, or the same.
    """

    plan: Plan
    front: SplitFile
    back: SplitFile


def make_split_plan(
    ask: SplitAsk, topology: Topology, goal: Goal, popularity: Popularity = _ASSUMED
) -> SplitPlan:
    """Try every cut with every pair of files, codec and setting, in the first context that works.

    Raises:
        ConfigError: the goal contradicts itself, or there is nothing to cut.
        PlanError: nothing satisfies it; the message names each option and its limit.
    """
    _check(ask, topology, goal)
    goal = replace(goal, may_leave=tuple(x for x in goal.may_leave if x == "hidden_states"))
    rejected: list[Rejection] = []
    for n_ctx in ask.contexts or (goal.n_ctx,):
        asked = replace(goal, n_ctx=n_ctx).checked()
        found, refused, sides = _candidates(ask, topology, asked, popularity)
        allowed, broken = within_ceilings(_ranked(found, asked), asked)
        if not allowed:
            some = [Rejection(f"{r.option}, context {n_ctx}", r.reason) for r in refused + broken]
            rejected += some
            continue
        ways = _ranked(allowed, asked)
        chosen = ways[0]
        files = {file.name: file for file in (*ask.fronts, *ask.backs)}
        front, back = (files[stage.source] for stage in chosen.stages)
        prepared = prepare(front.workload, topology, asked, popularity)
        plain = plain_ways(front.workload, topology, asked, prepared, popularity)
        longer = [item.reason for item in rejected]
        contexts = (ask.contexts, n_ctx, longer)
        words = split_decisions(chosen, ways, sides[chosen.setting], contexts)
        others = (*rejected[:_MOST_LISTED], *refused, *_nearest(broken))
        plan = _plan((chosen, ways), plain, topology, asked, others)
        plan = replace(
            plan,
            reasons=(*words, *plan.reasons),
            warnings=(*plan.warnings, *split_warnings(chosen, plain)),
        )
        return SplitPlan(plan, front, back)
    raise no_plan(topology, rejected)


def _check(ask: SplitAsk, topology: Topology, goal: Goal) -> None:
    goal.checked()
    check_power(topology, goal)
    if len(topology.hosts) < _LEAST_HOSTS:
        raise ConfigError(
            f"a model cannot be cut between hosts, {topology.home} is the only one",
            hint="--topology FILE, or several --device",
        )
    n_layers = len(ask.fronts[0].workload.run_layers)
    if n_layers < _LEAST_LAYERS:
        raise ConfigError(f"a model of {n_layers} layers cannot be cut")


def _candidates(
    ask: SplitAsk, topology: Topology, goal: Goal, popularity: Popularity
) -> tuple[list[Candidate], list[Rejection], dict[Setting, tuple[Sides, Sides]]]:
    """Put fronts and backs of the same setting together."""
    counted = {
        file.name: prepare(file.workload, topology, goal, popularity)
        for file in (*ask.fronts, *ask.backs)
    }
    settings = dict.fromkeys(option.setting for option in counted[ask.fronts[0].name])
    found: list[Candidate] = []
    rejected: list[Rejection] = []
    every: dict[Setting, tuple[Sides, Sides]] = {}
    for setting in settings:
        both = []
        for files, is_front in ((ask.fronts, True), (ask.backs, False)):
            options = [(file, _of(counted[file.name], setting)) for file in files]
            both.append(make_sides(options, topology, goal, front=is_front))
        fronts, backs = every[setting] = (both[0], both[1])
        made = _joined(fronts, backs, (ask, topology, goal), setting)
        found += made
        refused = [*fronts.left_out, *backs.left_out]
        rejected += refused if made or refused else _apart(fronts, backs)
    return found, list(dict.fromkeys(rejected)), every


def _of(counted: Sequence[Prepared], setting: Setting) -> list[Prepared]:
    return [option for option in counted if option.setting == setting]


def _joined(
    fronts: Sides, backs: Sides, asked: tuple[SplitAsk, Topology, Goal], setting: Setting
) -> list[Candidate]:
    ask, topology, goal = asked
    n_embd, n_decoded = ask.fronts[0].workload.spec.n_embd, 1 + goal.n_drafted
    found = []
    for cut in sorted(fronts.stages.keys() & backs.stages.keys()):
        for front in fronts.stages[cut]:
            for split in ask.codecs.at(front.source, cut):
                token_bytes = hidden_bytes(split, n_embd)
                for back in backs.stages[cut]:
                    host = back.place.host.host_id
                    hop = split_hops(topology, host, token_bytes, n_decoded, goal.n_prompt)
                    if hop is None:
                        continue
                    made = Candidate(
                        setting=setting, stages=(front, back), hops_decode_s=hop.decode_s,
                        hops_prefill_s=hop.prefill_s, sent_bytes=hop.sent_bytes,
                        tokens_per_pass=goal.tokens_per_pass, split=split,
                    )  # fmt: skip
                    found.append(made)
    return found


def _apart(fronts: Sides, backs: Sides) -> list[Rejection]:
    """Say that what home holds and what the other host holds leave layers between them."""
    most, least = max(fronts.stages, default=0), min(backs.stages, default=0)
    reason = f"home holds layers 0..{most} at most, another host those from {least} on"
    limits = {*(fronts.refused.get((s.source, most + 1)) for s in fronts.stages.get(most, ()))}
    known = sorted(limit for limit in limits if limit is not None)
    return [Rejection("one cut", "; ".join([reason, *known]))]


def _ranked(found: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Order by the goal; within its slack more precision comes first."""
    second: Metric = "ttft_s" if goal.minimise != "ttft_s" else "tpot_s"
    best: dict[str, float] = {}
    for candidate in found:
        kind, value = candidate.setting.cache_type, candidate.of(goal.minimise)
        best[kind] = min(value, best.get(kind, value))
    slack = goal.ttft_slack if goal.minimise in ("tpot_s", "ttft_s") else 0.0

    def rank(candidate: Candidate) -> tuple[object, ...]:
        kind, value = candidate.setting.cache_type, candidate.of(goal.minimise)
        beyond = value > best[kind] * (1 + slack + TIE_SHARE)
        rest = (*_losses(candidate), candidate.of(second), value, candidate.name)
        return goal.cache_types.index(kind), beyond, value if beyond else 0.0, *rest

    return sorted(found, key=rank)


def _losses(candidate: Candidate) -> tuple[float, int]:
    """Return what orders by precision: bits of a weight, negative, and the loss of the codec."""
    codec = candidate.split.codec if candidate.split is not None else "f32"
    return -round(weight_bits(candidate.stages), 6), _LOSSES.index(codec)


def _layout(candidate: Candidate) -> tuple[object, ...]:
    """Return everything but the settings."""
    stages = [(stage.source, stage.place.name, stage.end_layer) for stage in candidate.stages]
    return candidate.split, *stages


def _nearest(broken: Sequence[Rejection]) -> tuple[Rejection, ...]:
    """Return the ways that just miss a ceiling, and how many others do."""
    n_more = len(broken) - _MOST_LISTED
    more = (Rejection(f"{n_more} more ways", "above a ceiling too"),) if n_more > 0 else ()
    return (*broken[:_MOST_LISTED], *more)


def _plan(
    ways: tuple[Candidate, Sequence[Candidate]],
    plain: tuple[PlainWay, ...],
    topology: Topology,
    goal: Goal,
    rejected: tuple[Rejection, ...],
) -> Plan:
    chosen, every = ways
    best = {_layout(way): way for way in reversed(every)}
    others = distinct([way for way in every if best[_layout(way)] is way], chosen)
    same = [way for way in every[1:] if _layout(way) == _layout(chosen)]
    return Plan(
        goal=goal, topology=topology, chosen=chosen, others=others, plain=plain,
        binds=what_binds(chosen), reasons=decisions(chosen, same, plain, goal),
        rejected=rejected, warnings=warnings_of(chosen, (), goal),
    )  # fmt: skip
