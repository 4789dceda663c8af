"""How many groups of KV heads each host computes when every layer is split between hosts.

A share is a whole number of KV-head groups with the heads and FFN columns that go with them. Every
host also holds the bytes that are not split. All hosts wait for the slowest one in each layer, so a
token takes the largest share's seconds plus the exchanges. Exact, for up to 8 hosts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from edgert.errors import PlanError

MOST_HOSTS = 8


@dataclass(frozen=True, slots=True)
class ShareBytes:
    """Memory of a host's weights with a number of groups.

    Attributes:
        weight_bytes: All of them.
        floor_bytes: Of these, what is in memory even where the others stream.
        window_bytes: Needed as soon as anything streams.
    """

    weight_bytes: float
    floor_bytes: float = 0.0
    window_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class ShareHost:
    """A host that could take a share.

    Attributes:
        name: For messages.
        decode_s: Computing one token if it had every group.
        prefill_s: Computing the prompt if it had every group.
        capacity_bytes: For weights, KV cache and window.
        sizes: Of its weights with 1 group, 2, and so on; no fewer bytes with more groups.
        flash_bytes_per_s: Rate at which weights stream in; None when they cannot.
        n_sweeps: Over the weights in a prefill.
        exchange_decode_s: All exchanges of one token between it and the hub of the star, such as
            2 * n_layers * (2 * latency + bytes / bandwidth); 0 for the hub itself.
        exchange_prefill_s: The same for the prompt.
        transfer_decode_s: What of a token's exchanges takes longer the more hosts there are: the
            hub's link carries the data of every other host; 0 for the hub itself.
        transfer_prefill_s: The same for the prompt.
    """

    name: str
    decode_s: float
    prefill_s: float
    capacity_bytes: float
    sizes: tuple[ShareBytes, ...]
    flash_bytes_per_s: float | None = None
    n_sweeps: int = 1
    exchange_decode_s: float = 0.0
    exchange_prefill_s: float = 0.0
    transfer_decode_s: float = 0.0
    transfer_prefill_s: float = 0.0


@dataclass(frozen=True, slots=True)
class ShareProblem:
    """What is split between whom.

    Attributes:
        hosts: 1 to 8; using fewer is allowed.
        n_groups: KV-head groups, at least 1.
        group_kv_bytes: KV cache of one group, over all layers.
        hub: Host that must take part, the hub of the star; None for any.
        least_hosts: That take part.
        own_s: What hosts' own work on the exchanges takes, of a token and of the prompt.
        pair_factors: What of the exchanges two hosts take, of a token and of the prompt.
    """

    hosts: tuple[ShareHost, ...]
    n_groups: int
    group_kv_bytes: float
    hub: int | None = None
    least_hosts: int = 1
    own_s: tuple[float, float] = (0.0, 0.0)
    pair_factors: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True, slots=True)
class HostShare:
    """What one host gets: groups, the weight bytes it pins, and its seconds without exchanges."""

    host: int
    n_groups: int
    pinned_bytes: float
    decode_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class Shares:
    """A split: its hosts in the order of the problem, and what a token and the prompt take."""

    hosts: tuple[HostShare, ...]
    tpot_s: float
    ttft_s: float


def choose_shares(problem: ShareProblem) -> Shares:
    """Choose hosts and shares so that TPOT is least.

    Ties: fewer hosts, then the earlier ones.

    Raises:
        ValueError: not 1 to 8 hosts, no group, or not the sizes of every number of groups.
        PlanError: no hosts hold all groups together; the message says what each could hold.
    """
    if not 1 <= len(problem.hosts) <= MOST_HOSTS or problem.n_groups < 1:
        raise ValueError(
            f"wanted 1 to {MOST_HOSTS} hosts and at least 1 group, "
            f"got {len(problem.hosts)} and {problem.n_groups}"
        )
    if any(len(host.sizes) != problem.n_groups for host in problem.hosts):
        raise ValueError(f"wanted the sizes of 1 to {problem.n_groups} groups of every host")
    options = [_options(problem, host) for host in range(len(problem.hosts))]
    best: Shares | None = None
    for n_hosts in range(problem.least_hosts, min(len(options), problem.n_groups) + 1):
        for hosts in combinations(range(len(options)), n_hosts):
            if problem.hub is not None and problem.hub not in hosts:
                continue
            if best is not None and _exchange_s(problem, hosts)[0] >= best.tpot_s:
                continue
            counts = _split([options[host] for host in hosts], problem.n_groups)
            if counts is None:
                continue
            found = _shares(
                problem, [options[h][n - 1] for h, n in zip(hosts, counts, strict=True)]
            )
            if best is None or found.tpot_s < best.tpot_s:
                best = found
    if best is None:
        raise _impossible(problem, options)
    return best


def host_share(problem: ShareProblem, host: int, n_groups: int) -> HostShare | None:
    """Return what a number of groups costs a host, None where it cannot hold them."""
    option = problem.hosts[host]
    sizes = option.sizes[n_groups - 1]
    weight_bytes = sizes.weight_bytes
    room = option.capacity_bytes - n_groups * problem.group_kv_bytes
    part = n_groups / problem.n_groups
    decode_s, prefill_s = part * option.decode_s, part * option.prefill_s
    if weight_bytes <= room:
        return HostShare(host, n_groups, weight_bytes, decode_s, prefill_s)
    pinned_bytes = room - sizes.window_bytes
    if not option.flash_bytes_per_s or pinned_bytes < sizes.floor_bytes:
        return None
    streaming_s = (weight_bytes - pinned_bytes) / option.flash_bytes_per_s
    return HostShare(
        host,
        n_groups,
        pinned_bytes,
        max(decode_s, streaming_s),
        max(prefill_s, option.n_sweeps * streaming_s),
    )


def _options(problem: ShareProblem, host: int) -> list[HostShare]:
    """List the shares a host can hold: 1 group, 2, and so on, each slower than the one before."""
    found = []
    for n_groups in range(1, problem.n_groups + 1):
        share = host_share(problem, host, n_groups)
        if share is None:
            break  # more groups need more memory
        found.append(share)
    return found


def _split(options: Sequence[Sequence[HostShare]], n_groups: int) -> list[int] | None:
    """Give every host at least one group so that the slowest is fastest; None if they are full."""
    if not all(options) or sum(map(len, options)) < n_groups:
        return None
    slowest = max(host[0].decode_s for host in options)
    thresholds = sorted(
        {share.decode_s for host in options for share in host if share.decode_s >= slowest}
    )
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(_within(options, thresholds[middle])) >= n_groups:
            high = middle
        else:
            low = middle + 1
    counts = _within(options, thresholds[low])
    for _ in range(sum(counts) - n_groups):
        # The slowest host has most to gain.
        shares = [(options[i][n - 1].decode_s, i) for i, n in enumerate(counts) if n > 1]
        counts[max(shares)[1]] -= 1
    return counts


def _within(options: Sequence[Sequence[HostShare]], threshold: float) -> list[int]:
    return [sum(share.decode_s <= threshold for share in host) for host in options]


def _shares(problem: ShareProblem, shares: Sequence[HostShare]) -> Shares:
    exchange_decode_s, exchange_prefill_s = _exchange_s(problem, [share.host for share in shares])
    return Shares(
        tuple(shares),
        max(share.decode_s for share in shares) + exchange_decode_s,
        max(share.prefill_s for share in shares) + exchange_prefill_s,
    )


def _exchange_s(problem: ShareProblem, indices: Sequence[int]) -> tuple[float, float]:
    """Return the seconds of a star of these hosts, for a token and for the prompt."""
    hosts, n_others = [problem.hosts[index] for index in indices], len(indices) - 1
    if not n_others:
        return 0.0, 0.0
    decode_s = max(host.exchange_decode_s for host in hosts)
    prefill_s = max(host.exchange_prefill_s for host in hosts)
    decode_s += n_others * max(host.transfer_decode_s for host in hosts)
    prefill_s += n_others * max(host.transfer_prefill_s for host in hosts)
    pair = problem.pair_factors if n_others == 1 else (1.0, 1.0)
    return pair[0] * decode_s + problem.own_s[0], pair[1] * prefill_s + problem.own_s[1]


def _impossible(problem: ShareProblem, options: Sequence[Sequence[HostShare]]) -> PlanError:
    kv_bytes = problem.n_groups * problem.group_kv_bytes
    lines = [
        f"{host.name}: holds {len(found)} of {problem.n_groups} groups, "
        f"has {host.capacity_bytes:,.0f} bytes; all need "
        f"{host.sizes[-1].weight_bytes + kv_bytes:,.0f}"
        + ("" if host.flash_bytes_per_s else ", and it cannot stream")
        for host, found in sorted(
            zip(problem.hosts, options, strict=True), key=lambda pair: -len(pair[1])
        )
    ]
    return PlanError(
        "\n".join(("no hosts hold all KV-head groups together", *lines)),
        hint="lower the bits or the context, or allow another host",
    )
