"""The planner for models whose experts are nested: how many bits experts have, then the rest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from devices.topology import Topology
from edgert.errors import CapacityError, ConfigError, PlanError
from edgert.units import format_bytes, format_seconds
from partition.baselines import PlainWay
from partition.build_problem import Place
from partition.candidates import Candidate, over_ceilings
from partition.cost import Missing, unit_seconds
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.nested_stage import plan_nested_stage
from partition.nested_widths import NestedStacks, NestedWork, WidthRule, as_computed, nested_work
from partition.plan import (
    Plan,
    assumed_routing,
    check_power,
    distinct,
    no_plan,
    ranked,
    within_ceilings,
)
from partition.popularity import Popularity
from partition.problem import Rejection
from partition.reasons import Reason, decisions, warnings_of, what_binds
from partition.settings import Prepared, prepare

# Memory for weights that is tried where little of it is the goal, over the least there can be.
_SPARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0, 9.0, 19.0)


@dataclass(frozen=True, slots=True)
class NestedAsk:
    """A nested model and what is asked of its widths.

    Attributes:
        stacks: Its experts in every width.
        uniform: Every width of the file for all experts, the widest first.
        asked: What a person chose; None leaves it to the planner.
        why: How a person chose.
        measured: Rules whose quality was measured and that are worth trying, the best first.
    """

    stacks: NestedStacks
    uniform: tuple[WidthRule, ...]
    asked: WidthRule | None = None
    why: str = "asked for"
    measured: tuple[WidthRule, ...] = ()

    @property
    def rules(self) -> tuple[WidthRule, ...]:
        """What is tried, in order, until something satisfies the goal."""
        if self.asked is not None:
            return (self.asked,)
        if not self.measured:
            return self.uniform
        widest = self.uniform[0]
        return (widest, *(rule for rule in self.measured if rule != widest))


@dataclass(frozen=True, slots=True)
class _Tried:
    """One rule: its share of each width, the ways to run the model like that, best first."""

    work: NestedWork
    ways: tuple[Candidate, ...]
    rejected: tuple[Rejection, ...]


@dataclass(frozen=True, slots=True)
class _Case:
    """What all rules have in common."""

    workload: LanguageWorkload
    ask: NestedAsk
    topology: Topology
    goal: Goal
    popularity: Popularity

    def try_rule(self, rule: WidthRule) -> _Tried:
        """Find the ways to run the model with a rule."""
        n_used = self.workload.spec.n_expert_used
        work = nested_work(self.workload, self.ask.stacks, rule, n_used)
        computed = as_computed(self.workload, work)
        found: list[Candidate] = []
        rejected: list[Rejection] = []
        for option in prepare(computed, self.topology, self.goal, self.popularity):
            if not option.cached:
                continue
            made = self._candidate(work, option)
            if isinstance(made, str):
                setting = option.setting
                name = f"experts in {rule.words} bits, ubatch {setting.n_ubatch}, "
                rejected.append(Rejection(f"{name}{setting.cache_type} KV", made))
            else:
                found.append(made)
        allowed, broken = within_ceilings(found, self.goal)
        return _Tried(work, tuple(ranked(allowed, self.goal)), (*rejected, *broken))

    def _candidate(self, work: NestedWork, option: Prepared) -> Candidate | str:
        """Return the best way with one setting, or why there is none."""
        home = self.topology.host(self.topology.home)
        devices = [device for device in home.devices if device.kind == "cpu"]
        if not devices:
            return f"{home.host_id} has no processor that is described"
        place = Place(home, devices[0])
        for unit in option.chain.units:
            seconds = unit_seconds(unit, place.device, "repacked")
            if isinstance(seconds, Missing):
                return f"no rate is known for {seconds.type_name} weights on {place.name}"
        if home.flash is None:
            return f"no flash of {home.host_id} is known to read experts from"
        found: Candidate | None = None
        try:
            for weight_bytes in self._rooms(work, option, place):
                stage = plan_nested_stage(self.workload, work, option, place, weight_bytes)
                found = Candidate(
                    setting=option.setting, stages=(stage,), hops_decode_s=0.0,
                    hops_prefill_s=0.0, sent_bytes=0.0,
                    tokens_per_pass=self.goal.tokens_per_pass,
                )  # fmt: skip
                if not over_ceilings(found, self.goal):
                    return found
        except CapacityError as error:
            return found if found is not None else error.message
        return found or "no memory to try"

    def _rooms(self, work: NestedWork, option: Prepared, place: Place) -> Sequence[int | None]:
        """Return the memory for weights to try, in order: all, or where it counts little first."""
        if self.goal.minimise != "memory_bytes" and "memory_bytes" not in self.goal.ceilings:
            return (None,)
        try:
            plan_nested_stage(self.workload, work, option, place, 0)
        except CapacityError as error:
            least = error.needed_bytes or 0
            rooms = [int(least * (1 + spare)) for spare in _SPARES]
            return rooms if self.goal.minimise == "memory_bytes" else [*reversed(rooms)]
        return (None,)


def make_nested_plan(
    workload: LanguageWorkload,
    ask: NestedAsk,
    topology: Topology,
    goal: Goal,
    popularity: Popularity,
) -> Plan:
    """Decide the width of experts and where every weight lives, for the home host's processor.

    Without a choice by a person it is the widest width for all experts that satisfies the goal; of
    a model whose qualities were measured, the rule with the best one that does.

    Raises:
        ConfigError: the goal contradicts itself, or wants layers on other hosts.
        PlanError: nothing satisfies it; the message names each option and its limit.
    """
    goal.checked()
    check_power(topology, goal)
    away = [stay.host_id for stay in goal.stays if stay.host_id != topology.home]
    if away:
        raise ConfigError(
            f"--stay: layers are to stay on {away[0]}, and nested experts are computed at home",
            hint="leave it out",
        )
    if "nested_precision" not in goal.abilities:
        raise PlanError("the runtime that is planned for does not hold nested experts")
    case = _Case(workload, ask, topology, goal, popularity)
    failed: list[_Tried] = []
    for rule in ask.rules:
        tried = case.try_rule(rule)
        if tried.ways:
            return _plan(case, tried, failed)
        failed.append(tried)
    raise no_plan(topology, [reason for tried in failed for reason in tried.rejected])


def _plan(case: _Case, tried: _Tried, failed: Sequence[_Tried]) -> Plan:
    topology, goal = case.topology, case.goal
    chosen, others = tried.ways[0], distinct(tried.ways[1:], tried.ways[0])
    beside = [case.try_rule(rule) for rule in _neighbours(case.ask, tried.work.rule)]
    refused = {one.work.rule: one for one in failed} | {
        one.work.rule: one for one in beside if not one.ways
    }
    next_best = tuple(one.ways[0] for one in beside if one.ways)
    plain = tuple(
        PlainWay(f"llama.cpp alone on {stage.place.name}", None, "it does not read nested experts")
        for stage in chosen.stages
    )
    rejected = (*tried.rejected, *chain.from_iterable(one.rejected for one in refused.values()))
    return Plan(
        goal=goal, topology=topology, chosen=chosen, others=(*next_best, *others), plain=plain,
        binds=what_binds(chosen),
        reasons=(
            _width_reason(case.ask, tried, beside, tuple(refused.values())),
            *_share_reasons(tried.work), *decisions(chosen, others, plain, goal),
        ),
        rejected=(*rejected, *_unused(topology, chosen)),
        warnings=(
            *warnings_of(chosen, plain, goal), *_assumed_shares(tried.work),
            *assumed_routing(chosen, case.popularity),
        ),
    )  # fmt: skip


def _neighbours(ask: NestedAsk, rule: WidthRule) -> list[WidthRule]:
    """Return the widths for all experts next to a rule: its own ends, one bit less, one more."""
    low, high = rule.widths[0], rule.widths[-1]
    wanted = {low - 1, low, high, high + 1}
    same = (rule.widths, rule.cuts)
    return [r for r in ask.uniform if r.widths[0] in wanted and (r.widths, r.cuts) != same]


def _width_reason(
    ask: NestedAsk, tried: _Tried, beside: Sequence[_Tried], refused: Sequence[_Tried]
) -> Reason:
    """Say why experts have their bits, and what the next best bits would cost."""
    rule, chosen = tried.work.rule, tried.ways[0]
    if ask.asked is not None:
        why = ask.why
    elif rule == ask.uniform[0]:
        why = "the widest there is: nothing that was asked for needs fewer bits"
    elif ask.measured:
        why = "the best measured quality that satisfies the goal"
    else:
        why = "the widest that satisfies the goal"
    parts = [why, f"{_cost(chosen)}{_quality(rule)}"]
    for one in beside:
        if one.ways:
            other = one.work.rule
            parts.append(f"{other.words} bits would be {_cost(one.ways[0])}{_quality(other)}")
    for one in refused:
        reason = one.rejected[0].reason if one.rejected else "not possible"
        parts.append(f"{one.work.rule.words} bits: {' '.join(reason.split())}")
    return Reason("bits of experts", rule.words, "; ".join(parts))


def _cost(candidate: Candidate) -> str:
    stage = candidate.stages[0]
    return (
        f"{format_seconds(candidate.tpot_s)} a token, "
        f"{format_bytes(stage.forecast.read_bytes)} of it read, "
        f"peak {format_bytes(candidate.peak_bytes)}"
    )


def _quality(rule: WidthRule) -> str:
    return "" if rule.quality is None else f", quality {rule.quality:.4g} as measured"


def _share_reasons(work: NestedWork) -> list[Reason]:
    if len(work.rule.widths) == 1:
        return []
    pairs = zip(work.rule.widths, work.shares, strict=True)
    shares = ", ".join(f"{width} bits {100 * share:.0f} %" for width, share in reversed([*pairs]))
    measured = work.rule.bits_per_weight
    reason = (
        "assumed: routing weight falls with the rank r of a choice as 1 / r"
        if measured is None
        else f"as measured on a text: {measured:.3g} bits a weight, scales included"
    )
    return [Reason("share of each width", shares, reason)]


def _assumed_shares(work: NestedWork) -> tuple[str, ...]:
    if len(work.rule.widths) == 1 or work.rule.bits_per_weight is not None:
        return ()
    return (
        "how often experts are wanted in each width is assumed; edgert eval --calibrate-bits "
        "measures it",
    )


def _unused(topology: Topology, chosen: Candidate) -> list[Rejection]:
    """Name the devices that are left out: nested experts are computed on one processor at home."""
    used = {stage.place.name for stage in chosen.stages}
    names = [f"{h.host_id}/{d.device_id}" for h in topology.hosts for d in h.devices]
    reason = "nested experts are computed on one processor, at home"
    return [Rejection(name, reason) for name in names if name not in used]
