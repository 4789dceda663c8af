"""The planner: workload, topology and goal in, one plan with its reasons out. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from devices.topology import Topology
from edgert.errors import ConfigError, PlanError
from partition.baselines import PlainWay, plain_ways
from partition.candidate_search import candidates
from partition.candidates import Candidate, over_ceilings
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.popularity import Popularity
from partition.problem import SHORT_METRICS, TIE_SHARE, Metric, Rejection
from partition.reasons import Reason, decisions, split_reason, warnings_of, what_binds
from partition.settings import Prepared, prepare
from partition.tensor_candidates import tensor_candidates

_MOST_REASONS = 8
_ASSUMED = Popularity()


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
    check_power(topology, goal)
    prepared = prepare(workload, topology, goal, popularity)
    found, rejected = _ways(workload, topology, goal, prepared, popularity)
    plain = plain_ways(workload, topology, goal, prepared, popularity)
    executable = [*found, *(way.candidate for way in plain if way.candidate is not None)]
    allowed, broken = within_ceilings(executable, goal)
    if not allowed:
        raise no_plan(topology, (*rejected, *broken))
    ways = ranked(allowed, goal)
    chosen, others = ways[0], distinct(ways[1:], ways[0])
    return Plan(
        goal=goal, topology=topology, chosen=chosen, others=others, plain=plain,
        binds=what_binds(chosen),
        reasons=(*split_reason(chosen, found), *decisions(chosen, others, plain, goal)),
        rejected=(*rejected, *broken),
        warnings=(
            *warnings_of(chosen, plain, goal), *stopped_early(chosen, goal),
            *assumed_routing(chosen, popularity),
        ),
    )  # fmt: skip


def stopped_early(chosen: Candidate, goal: Goal) -> tuple[str, ...]:
    """Say that the search could not look at everything."""
    if chosen.gap <= TIE_SHARE:
        return ()
    return (
        f"the search stopped early: at most {100 * chosen.gap:.2g} % from the best "
        f"{SHORT_METRICS[goal.minimise]}",
    )


def assumed_routing(chosen: Candidate, popularity: Popularity) -> tuple[str, ...]:
    """Say that what a cache of experts saves is not known."""
    if popularity.kind == "trace" or not any(stage.tiers.cached for stage in chosen.stages):
        return ()
    return (
        "which experts tokens want is assumed: texts come back to few of them, so decoding is "
        "mostly faster; edgert bench --routing-trace FILE records it for --routing-trace",
    )


def frontier(
    workload: LanguageWorkload,
    topology: Topology,
    goal: Goal,
    metrics: Sequence[Metric],
    popularity: Popularity = _ASSUMED,
) -> tuple[Candidate, ...]:
    """Return the candidates that no other beats in all of `metrics`, best of the first first.

    Energy is compared only where it is known; a candidate that uses a device of unknown power has
    an infinite one.

    Raises:
        ConfigError: the goal contradicts itself.
        PlanError: nothing satisfies it.
    """
    goal.checked()
    check_power(topology, goal)
    every: list[Candidate] = []
    rejected: list[Rejection] = []
    prepared = prepare(workload, topology, goal, popularity)
    known = [metric for metric in metrics if metric != "energy_j" or _knows_power(topology)]
    for metric in known:
        asked = replace(goal, minimise=metric)
        found, refused = _ways(workload, topology, asked, prepared, popularity)
        plain = plain_ways(workload, topology, asked, prepared, popularity)
        executable = [*found, *(way.candidate for way in plain if way.candidate is not None)]
        allowed, broken = within_ceilings(executable, goal)
        every += allowed
        rejected += [*refused, *broken]
    if not every:
        raise no_plan(topology, rejected)
    kept = [one for one in every if not any(_beats(other, one, known) for other in every)]
    unique = {tuple(one.of(metric) for metric in known): one for one in kept}
    return tuple(unique[key] for key in sorted(unique))


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


def check_power(topology: Topology, goal: Goal) -> None:
    """Refuse a goal of energy where nothing is known about power."""
    if goal.minimise != "energy_j" and "energy_j" not in goal.ceilings:
        return
    if not _knows_power(topology):
        where = "minimise" if goal.minimise == "energy_j" else "ceilings.energy_j"
        raise ConfigError(
            f"$.goal.{where}: energy, and no device has a known power_w",
            hint="give power_w in a --topology file, or choose another --goal",
        )


def _knows_power(topology: Topology) -> bool:
    devices = (device for host in topology.hosts for device in host.devices)
    return any(device.power_w is not None for device in devices)


def within_ceilings(
    found: Sequence[Candidate], goal: Goal
) -> tuple[list[Candidate], list[Rejection]]:
    """Tell ways within the goal's ceilings from the others, which say what they are above."""
    allowed, broken = [], []
    for candidate in found:
        over = over_ceilings(candidate, goal)
        if over:
            reason = (
                f"{over[0]} is {candidate.of(over[0]):.6g}, at most {goal.ceilings[over[0]]:.6g}"
            )
            broken.append(Rejection(candidate.name, reason))
        else:
            allowed.append(candidate)
    return allowed, broken


def ranked(found: Sequence[Candidate], goal: Goal) -> list[Candidate]:
    """Order by the goal; within the slack a better prefill (or decode) comes first."""
    second: Metric = "ttft_s" if goal.minimise != "ttft_s" else "tpot_s"
    best: dict[str, float] = {}
    for candidate in found:
        kind, value = candidate.setting.cache_type, candidate.of(goal.minimise)
        best[kind] = min(value, best.get(kind, value))
    slack = goal.ttft_slack if goal.minimise in ("tpot_s", "ttft_s") else 0.0

    def rank(candidate: Candidate) -> tuple[int, bool, float, float, str]:
        preference = goal.cache_types.index(candidate.setting.cache_type)
        value = candidate.of(goal.minimise)
        beyond = value > best[candidate.setting.cache_type] * (1 + slack + TIE_SHARE)
        if beyond:
            return preference, True, value, candidate.of(second), candidate.name
        return preference, False, candidate.of(second), value, candidate.name

    return sorted(found, key=rank)


def distinct(ways: Sequence[Candidate], chosen: Candidate) -> tuple[Candidate, ...]:
    """Return the next best of ranked ways, none twice and none like the chosen one."""
    seen, kept = {chosen.name}, []
    for candidate in ways:
        if candidate.name not in seen:
            seen.add(candidate.name)
            kept.append(candidate)
    return tuple(kept[:_MOST_REASONS])


def no_plan(topology: Topology, rejected: Sequence[Rejection]) -> PlanError:
    """Return the error that names each option and why it is none."""
    found = list(dict.fromkeys((item.option, _one_line(item.reason)) for item in rejected))
    lines = [f"  {option}: {reason}" for option, reason in found[:_MOST_REASONS]]
    more = len(found) - len(lines)
    lines += [f"  and {more} more"] if more > 0 else []
    hosts = ", ".join(host.host_id for host in topology.hosts)
    return PlanError(
        "no plan satisfies the goal on " + hosts + ":\n" + "\n".join(lines),
        hint="raise --memory or a ceiling, lower -c, or allow --cache-types q8_0",
    )


def _one_line(reason: str) -> str:
    """Join what a search said in lines, without its headline."""
    lines = [line.strip() for line in reason.splitlines()]
    return "; ".join(lines[1:] if len(lines) > 1 else lines)


def _beats(other: Candidate, one: Candidate, metrics: Sequence[Metric]) -> bool:
    pairs = [(other.of(metric), one.of(metric)) for metric in metrics]
    return all(a <= b * (1 + TIE_SHARE) for a, b in pairs) and any(
        a < b * (1 - TIE_SHARE) for a, b in pairs
    )
