"""Which sets of hosts could share every layer, ranked by what their shares would take.

Estimates from `partition.tensor_shares`, cheap next to cutting and forecasting every stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf

from edgert.errors import CapacityError, PlanError
from partition.build_problem import Place
from partition.problem import BY_TOKEN, Metric
from partition.tensor_problem import Ask, pool_bytes
from partition.tensor_shares import HostShare, ShareProblem, Shares, choose_shares
from partition.tensor_star import Exchanges

_EVERY_SET = 4  # other hosts, up to which every set of them is tried
# An estimate this much above a ceiling may be below it once tensors are cut.
_NEAR = 1.05


@dataclass(frozen=True, slots=True)
class HostSet:
    """Hosts that would share every layer.

    Attributes:
        hosts: Their indices, home's 0 first.
        shares: The fastest ones, of all places.
        n_equal: Sets that differ in nothing but names, this one counted.
        estimate: By the metric of the goal.
    """

    hosts: tuple[int, ...]
    shares: Shares
    n_equal: int
    estimate: float = 0.0


def ranked_sets(
    ask: Ask,
    exchanges: Exchanges,
    places: Sequence[Place],
    problem: ShareProblem,
    kinds: Sequence[int],
) -> tuple[list[HostSet], dict[tuple[int, ...], PlanError | CapacityError]]:
    """Choose shares for sets of hosts, those first that seem best by the goal.

    Args:
        ask: What is asked.
        exchanges: Between hosts.
        places: The hosts, home first.
        problem: What a share costs each of them.
        kinds: The same number for places of equal profiles.

    Returns:
        Sets that hold the model, and why others do not.
    """
    found: list[tuple[tuple[float, ...], HostSet]] = []
    refused: dict[tuple[int, ...], PlanError | CapacityError] = {}
    for equal in _equal_sets(problem, kinds):
        # Equal ways are told apart by their names alone.
        hosts = min(equal, key=lambda hosts: [f"{places[host].name} " for host in hosts])
        only = replace(
            problem, hosts=tuple(problem.hosts[host] for host in hosts), least_hosts=len(hosts)
        )
        try:
            shares = choose_shares(only)
        except PlanError as error:
            refused[equal[-1]] = error
            continue
        own = tuple(replace(share, host=hosts[share.host]) for share in shares.hosts)
        option = HostSet(hosts, replace(shares, hosts=own), len(equal))
        rank = _rank(ask, exchanges, places, problem, option)
        found.append((rank, replace(option, estimate=rank[1])))
    return [option for _, option in sorted(found, key=lambda pair: pair[0])], refused


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


def _equal_sets(problem: ShareProblem, kinds: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """Group sets of hosts whose profiles and links are the same, one after another."""
    alike: list[int] = []
    for index, host in enumerate(problem.hosts):
        same = (
            other
            for other in range(index)
            if kinds[other] == kinds[index]
            and replace(problem.hosts[other], name=host.name) == host
        )
        alike.append(next(same, index))
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for hosts in host_sets(problem):
        groups.setdefault(tuple(alike[host] for host in hosts), []).append(hosts)
    return list(groups.values())


def _rank(
    ask: Ask, exchanges: Exchanges, places: Sequence[Place], problem: ShareProblem, option: HostSet
) -> tuple[float, ...]:
    """Order by the goal; what clearly breaks a ceiling comes last, the nearest to it first."""

    def of(metric: Metric) -> float:
        by_pass = _of_a_pass(exchanges, places, problem, option, metric)
        return by_pass / (ask.goal.tokens_per_pass if metric in BY_TOKEN else 1.0)

    limits = ask.goal.ceilings.items()
    excess = max((of(m) / most if most else inf for m, most in limits), default=0.0)
    beyond = excess if excess > _NEAR else 0.0
    return beyond, of(ask.goal.minimise), of("tpot_s"), float(len(option.hosts))


def _of_a_pass(
    exchanges: Exchanges,
    places: Sequence[Place],
    problem: ShareProblem,
    option: HostSet,
    metric: Metric,
) -> float:
    match metric:
        case "tpot_s":
            return option.shares.tpot_s
        case "ttft_s":
            return option.shares.ttft_s
        case "memory_bytes":
            return sum(_bytes(places, problem, share) for share in option.shares.hosts)
        case "energy_j":
            return sum(_joules(places, share) for share in option.shares.hosts)
        case "sent_bytes":
            return exchanges.sent_bytes(len(option.hosts) - 1)


def _bytes(places: Sequence[Place], problem: ShareProblem, share: HostShare) -> float:
    """Return the memory of a share without what loading takes."""
    host = problem.hosts[share.host]
    sizes = host.sizes[share.n_groups - 1]
    window_bytes = sizes.window_bytes if share.pinned_bytes < sizes.weight_bytes else 0.0
    fixed_bytes = pool_bytes(places[share.host]) - host.capacity_bytes
    return fixed_bytes + share.n_groups * problem.group_kv_bytes + share.pinned_bytes + window_bytes


def _joules(places: Sequence[Place], share: HostShare) -> float:
    power = places[share.host].device.power_w
    return share.decode_s * (inf if power is None else power.value)
