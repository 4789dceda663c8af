"""Ways to run a model with every layer shared between hosts, home among them: tensor parallelism.

A star whose hub is home sums what the hosts computed twice a layer (`partition.tensor_star`).
Shares are chosen by `partition.tensor_shares`, parts made by `partition.tensor_split`. Shares are
always the fastest ones; what a goal other than speed decides is which hosts take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, combinations, pairwise
from math import inf

from devices.profile import WeightLayout
from devices.topology import Topology
from edgert.errors import CapacityError, PlanError
from partition.build_problem import Place
from partition.candidates import Candidate, over_ceilings
from partition.cost import Missing, unit_seconds
from partition.forecast import forecast_stage
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.manifest import TensorShare, Tiers
from partition.popularity import Popularity
from partition.problem import Rejection
from partition.settings import settings
from partition.stage_plan import StagePlan
from partition.stage_tiers import (
    StageWeights,
    choose_tiers,
    resident_tiers,
    stage_weights,
    staging_bytes,
)
from partition.tensor_problem import (
    Ask,
    exchanges_of,
    fixed_bytes_of,
    flash_rate,
    head_part,
    host_bytes_of,
    overheads_at,
    pool_bytes,
    share_places,
    share_problem,
)
from partition.tensor_shares import MOST_HOSTS, ShareProblem, Shares, choose_shares
from partition.tensor_split import Part, share_groups, split_workload, why_not_split
from partition.units import UnitChain

OPTION = "every layer shared between hosts"
_EVERY_SET = 4  # other hosts, up to which every set of them is tried


def tensor_candidates(
    workload: LanguageWorkload, topology: Topology, goal: Goal, popularity: Popularity
) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    """Find the best shares for every setting, and why there are none."""
    if len(topology.hosts) < 2 or "tensor_parallel" not in goal.abilities:
        return (), ()
    reason = _not_wanted(topology, goal) or why_not_split(workload)
    if reason is not None:
        return (), (Rejection(OPTION, reason),)
    found: list[Candidate] = []
    rejected: list[Rejection] = []
    by_rows = "vocabulary_shards" in goal.abilities and "logits" in goal.may_leave
    heads = (False, True) if by_rows and not workload.spec.tied_embeddings else (False,)
    for setting in settings(goal, few=True):
        for head in heads:
            ask = Ask(workload, topology, goal, setting, popularity, head)
            try:
                found.append(_best(ask))
            except (PlanError, CapacityError) as error:
                label = f"{OPTION}, ubatch {setting.n_ubatch}, {setting.cache_type} KV"
                rejected.append(Rejection(label, error.message))
    return tuple(found), tuple(dict.fromkeys(rejected))


def _not_wanted(topology: Topology, goal: Goal) -> str | None:
    if len(topology.hosts) > MOST_HOSTS:
        return f"{len(topology.hosts)} hosts, {MOST_HOSTS} at most"
    if "hidden_states" not in goal.may_leave:
        return "hidden states may not leave home"
    if goal.stays:
        return "layers must stay on a host, and a share of each would leave it"
    return None


def _best(ask: Ask) -> Candidate:
    """Return the best way by the goal; where speed alone does not decide, of several sets of hosts.

    Raises:
        PlanError: no hosts hold the model together, or every way breaks a ceiling.
        CapacityError: a host does not hold its tensors as they are cut.
    """
    chain, goal = ask.chain(ask.workload), ask.goal
    places = share_places(ask, chain)
    problem = share_problem(ask, chain, places)
    if goal.minimise == "tpot_s" and not goal.ceilings:
        return _candidate(ask, chain, places, problem)
    tried, refused = [], []
    for chosen in host_sets(problem):
        hosts = tuple(problem.hosts[index] for index in chosen)
        only = replace(problem, hosts=hosts, least_hosts=len(hosts))
        try:
            tried.append(_candidate(ask, chain, [places[index] for index in chosen], only))
        except (PlanError, CapacityError) as error:
            refused.append(error)  # fewer hosts hold less: the largest set says what is missing
    if not tried:
        raise refused[-1]
    allowed = [candidate for candidate in tried if not over_ceilings(candidate, goal)]
    if not allowed:
        raise _over(tried, goal)
    return min(allowed, key=lambda found: (found.of(goal.minimise), found.tpot_s, found.name))


def host_sets(problem: ShareProblem) -> list[tuple[int, ...]]:
    """List sets of hosts to try, home in each, all hosts last.

    Of many hosts not every set, but home with each other one and with the fastest few of them.
    """
    others = range(1, len(problem.hosts))
    if len(others) <= _EVERY_SET:
        return [(0, *found) for n in others for found in combinations(others, n)]

    def seconds(index: int) -> float:
        host = problem.hosts[index]
        return host.decode_s + host.exchange_decode_s + host.transfer_decode_s

    ranked = sorted(others, key=seconds)
    sets = {(index,) for index in others} | {tuple(sorted(ranked[:n])) for n in others}
    return [(0, *found) for found in sorted(sets, key=lambda found: (len(found), found))]


def _over(tried: Sequence[Candidate], goal: Goal) -> PlanError:
    """Say by how much the nearest of the ways that were tried breaks a ceiling."""

    def excess(candidate: Candidate) -> float:
        return max(candidate.of(m) / most if most else inf for m, most in goal.ceilings.items())

    nearest = min(tried, key=excess)
    metric = over_ceilings(nearest, goal)[0]
    sets = f"{len(tried)} sets of hosts" if len(tried) > 1 else "one set of hosts"
    return PlanError(
        f"{metric} is {nearest.of(metric):.6g} at the nearest, at most "
        f"{goal.ceilings[metric]:.6g}; only the fastest shares of {sets} were tried"
    )


def _candidate(
    ask: Ask, chain: UnitChain, places: Sequence[Place], problem: ShareProblem
) -> Candidate:
    """Choose the fastest shares and forecast them.

    Raises:
        PlanError: no hosts hold the model together.
        CapacityError: a host does not hold its tensors as they are cut.
    """
    numbered = _numbered(choose_shares(problem), share_groups(ask.workload))
    stages = tuple(_stage(ask, places[host], share) for host, share in numbered)
    exchanges = exchanges_of(ask, chain)
    others = [stage.place.host.host_id for stage in stages[1:]]
    seconds = exchanges.seconds(ask.topology, others)
    layout: WeightLayout = "file" if stages[0].tiers.layout == "file" else "repacked"
    head = unit_seconds(chain.units[-1], stages[0].place.device, layout)
    head_s = (0.0, 0.0) if ask.by_rows or isinstance(head, Missing) else head
    return Candidate(
        setting=ask.setting,
        stages=stages,
        hops_decode_s=seconds[0],
        hops_prefill_s=seconds[1],
        sent_bytes=exchanges.sent_bytes(len(others)),
        tokens_per_pass=ask.goal.tokens_per_pass,
        parallel=True,
        head_decode_s=head_s[0],
        head_prefill_s=head_s[1],
    )


def _stage(ask: Ask, place: Place, share: TensorShare) -> StagePlan:
    """Cut the tensors of one host and decide which of them stay in memory."""
    home = place.at_home
    head = head_part(ask, home)
    thin = split_workload(ask.workload, Part(share, entrance=home, head=head))
    n_layers = len(thin.run_layers)
    units = ask.chain(thin).units
    weights = stage_weights(thin, 0, n_layers, head=True)
    overheads = overheads_at(ask, place, thin)
    fixed_bytes, host_bytes = fixed_bytes_of(place, overheads), host_bytes_of(place, overheads)
    kv_bytes = sum(unit.kept_bytes for unit in units)
    tiers = _tiers(ask, place, weights, pool_bytes(place) - fixed_bytes + host_bytes - kv_bytes)
    return StagePlan(
        place=place,
        first_layer=0,
        end_layer=n_layers,
        head=head != "none",
        weights=weights,
        tiers=tiers,
        kv_bytes=kv_bytes,
        fixed_bytes=fixed_bytes,
        buffer_bytes=overheads.buffer_bytes,
        forecast=forecast_stage(place, units, weights, tiers),
        share=share,
        host_bytes=host_bytes,
    )


def _tiers(ask: Ask, place: Place, weights: StageWeights, available_bytes: int) -> Tiers:
    repacked = place.device.kind == "cpu"
    staging = staging_bytes(weights) if repacked else 0
    if weights.every_bytes + staging <= available_bytes:
        return resident_tiers(weights, repacked=repacked)
    tiers, residency = choose_tiers(weights, available_bytes)
    if tiers.streamed and flash_rate(ask, place) is None:
        raise CapacityError(
            f"{place.name}: its share takes {weights.whole_bytes:,} bytes, {available_bytes:,} are "
            "left for it, and it cannot stream",
            needed_bytes=weights.whole_bytes,
            available_bytes=residency.pinned_bytes,
        )
    return tiers


def _numbered(shares: Shares, n_groups: int) -> Iterator[tuple[int, TensorShare]]:
    """Number the groups of the hosts that were chosen, home's first."""
    ends = accumulate((share.n_groups for share in shares.hosts), initial=0)
    for share, (first, end) in zip(shares.hosts, pairwise(ends), strict=True):
        yield share.host, TensorShare(first_group=first, end_group=end, n_groups=n_groups)
