"""Ways to run a model with every layer shared between hosts, home among them: tensor parallelism.

A star whose hub is home sums what the hosts computed twice a layer (`partition.tensor_star`).
Shares are chosen by `partition.tensor_shares`, parts made by `partition.tensor_split`. Shares are
always the fastest ones; what a goal other than speed decides is which hosts take part.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from math import inf

from devices.profile import WeightLayout
from devices.topology import Topology
from edgert.errors import CapacityError, PlanError
from partition.build_problem import Place
from partition.candidates import Candidate, over_ceilings
from partition.cost import Missing, unit_seconds
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.manifest import TensorShare
from partition.popularity import Popularity
from partition.problem import Rejection
from partition.settings import settings
from partition.tensor_problem import Ask, exchanges_of, share_places, share_problem
from partition.tensor_sets import ranked_sets
from partition.tensor_shares import MOST_HOSTS, Shares, choose_shares
from partition.tensor_split import share_groups, why_not_split
from partition.tensor_stages import StageCuts
from partition.units import UnitChain

OPTION = "every layer shared between hosts"
_FEW_SETS = 3  # of hosts, that are cut and forecast
_FAR = 1.1  # an estimate that much above the best one is not worth it


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
    cuts = StageCuts()
    heads = (False, True) if by_rows and not workload.spec.tied_embeddings else (False,)
    for setting in settings(goal, few=True):
        for head in heads:
            ask = Ask(workload, topology, goal, setting, popularity, head)
            try:
                found.append(_best(ask, cuts))
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


def _best(ask: Ask, cuts: StageCuts) -> Candidate:
    """Return the best way by the goal; where speed alone does not decide, of several sets of hosts.

    Sets are ranked by what their shares would take; only the first few are cut and forecast, and
    more where those break a ceiling.

    Raises:
        PlanError: no hosts hold the model together, or every way breaks a ceiling.
        CapacityError: a host does not hold its tensors as they are cut.
    """
    chain, goal = ask.chain(ask.workload), ask.goal
    places = share_places(ask, chain)
    problem = share_problem(ask, chain, places)
    if goal.minimise == "tpot_s" and not goal.ceilings:
        return _candidate(ask, chain, cuts, places, choose_shares(problem))
    kinds = [cuts.kind_of(place.host) for place in places]
    options, refused = ranked_sets(ask, exchanges_of(ask, chain), places, problem, kinds)
    tried: list[Candidate] = []
    allowed: list[Candidate] = []
    for option in options:
        far = option.estimate > _FAR * options[0].estimate
        if allowed and (far or len(tried) >= _FEW_SETS):
            break
        try:
            found = _candidate(ask, chain, cuts, places, option.shares)
        except CapacityError as error:
            refused[option.hosts] = error
            continue
        tried.append(found)
        allowed += [] if over_ceilings(found, goal) else [found]
    if not tried:
        # Fewer hosts hold less: the largest set says what is missing.
        raise refused[max(refused, key=lambda hosts: (len(hosts), hosts))]
    if not allowed:
        raise _over(tried, sum(option.n_equal for option in options), goal)
    return min(allowed, key=lambda found: (found.of(goal.minimise), found.tpot_s, found.name))


def _over(tried: Sequence[Candidate], n_sets: int, goal: Goal) -> PlanError:
    """Say by how much the nearest of the ways that were tried breaks a ceiling."""

    def excess(candidate: Candidate) -> float:
        return max(candidate.of(m) / most if most else inf for m, most in goal.ceilings.items())

    nearest = min(tried, key=excess)
    metric = over_ceilings(nearest, goal)[0]
    sets = f"{n_sets} sets of hosts" if n_sets > 1 else "one set of hosts"
    return PlanError(
        f"{metric} is {nearest.of(metric):.6g} at the nearest, at most "
        f"{goal.ceilings[metric]:.6g}; only the fastest shares of {sets} were tried"
    )


def _candidate(
    ask: Ask, chain: UnitChain, cuts: StageCuts, places: Sequence[Place], shares: Shares
) -> Candidate:
    """Cut and forecast the stages of chosen shares.

    Raises:
        CapacityError: a host does not hold its tensors as they are cut.
    """
    numbered = _numbered(shares, share_groups(ask.workload))
    stages = tuple(cuts.stage(ask, places[host], share) for host, share in numbered)
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


def _numbered(shares: Shares, n_groups: int) -> Iterator[tuple[int, TensorShare]]:
    """Number the groups of the hosts that were chosen, home's first."""
    ends = accumulate((share.n_groups for share in shares.hosts), initial=0)
    for share, (first, end) in zip(shares.hosts, pairwise(ends), strict=True):
        yield share.host, TensorShare(first_group=first, end_group=end, n_groups=n_groups)
