"""What hosts that share every layer exchange: partial sums, over a star whose hub is home."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devices.topology import LinkProfile, Topology
from partition.cost import allreduce_s

_PER_LAYER = 2  # after attention and after the FFN
# Home hands out the embedded tokens: one of the two ways of an exchange.
_ENTRANCE = 0.5
# The best candidates of every part of the vocabulary come home: the other way, and fewer bytes.
_CANDIDATES = 0.5
# Two hosts send to each other at once what is no larger (`edgert.hosts.allreduce.Pair`).
_AT_ONCE_BYTES = 32 << 10
# What a host's own work on a sum takes: 0.09 ms alone, up to 0.25 ms between products whose
# weights have flushed the caches (scripts/bench_hosts.py).
_HOST_S = 150e-6


@dataclass(frozen=True, slots=True)
class Exchanges:
    """What is exchanged in one pass; each token of it has sums of its own.

    Attributes:
        n_layers: Of the model.
        token_bytes: Partial sums of one token.
        n_prompt: Tokens of the prompt.
        n_sweeps: Micro-batches that it is computed in, each with exchanges of its own.
        by_rows: Whether each host computes the output of a part of the vocabulary.
        n_decoded: Tokens of a pass while decoding: the last one, and those drafted after it.
    """

    n_layers: int
    token_bytes: int
    n_prompt: int
    n_sweeps: int
    by_rows: bool = False
    n_decoded: int = 1

    @property
    def n_pass(self) -> float:
        """Exchanges of one pass over the layers."""
        candidates = _CANDIDATES if self.by_rows else 0.0
        return _PER_LAYER * self.n_layers + _ENTRANCE + candidates

    def seconds(self, topology: Topology, others: Sequence[str]) -> tuple[float, float]:
        """Return the seconds of a pass's exchanges while decoding, and of the prompt's.

        Args:
            topology: Its home is the hub.
            others: The hosts around it, at least one.
        """
        trips = {host: _both_ways(topology, host)[0].round_trip_s.value for host in others}
        rate = min(link_rate(topology, host) for host in others)
        decoded_bytes, sweep_bytes = self._sum_bytes
        pair = self.pair_factors if len(trips) == 1 else (1.0, 1.0)
        own_s = self.own_s
        return (
            self.n_pass * pair[0] * allreduce_s(trips, decoded_bytes, rate) + own_s[0],
            self.n_pass * self.n_sweeps * pair[1] * allreduce_s(trips, sweep_bytes, rate)
            + own_s[1],
        )

    @property
    def own_s(self) -> tuple[float, float]:
        """What hosts' own work on all sums takes, while decoding and of the prompt."""
        return self.n_pass * _HOST_S, self.n_pass * self.n_sweeps * _HOST_S

    @property
    def pair_factors(self) -> tuple[float, float]:
        """What of a star's exchanges two hosts take: half where each sends at once."""
        decoded, sweep = (0.5 if n <= _AT_ONCE_BYTES else 1.0 for n in self._sum_bytes)
        return decoded, sweep

    @property
    def _sum_bytes(self) -> tuple[float, float]:
        """Of one sum while decoding, and of the prompt."""
        sweep_bytes = self.n_prompt * self.token_bytes / max(1, self.n_sweeps)
        return float(self.n_decoded * self.token_bytes), sweep_bytes

    def latency_s(self, topology: Topology, host: str) -> tuple[float, float]:
        """Return what a host's round trips take, however many hosts there are."""
        trips_s = self.n_pass * _both_ways(topology, host)[0].round_trip_s.value
        return trips_s, self.n_sweeps * trips_s

    def transfer_s(self, topology: Topology, host: str) -> tuple[float, float]:
        """Return what a host's sums take of the hub's link, there and back."""
        moved_s = 2 * self.n_pass * self.token_bytes / link_rate(topology, host)
        return self.n_decoded * moved_s, self.n_prompt * moved_s

    def sent_bytes(self, n_others: int) -> float:
        """Return what one pass of decoding sends over all links, both ways."""
        return 2 * self.n_pass * n_others * self.n_decoded * self.token_bytes


def reachable(topology: Topology, host: str) -> bool:
    """Whether home and a host have links both ways."""
    home = topology.home
    pairs = ((home, host), (host, home))
    return host == home or all(topology.link(one, other) is not None for one, other in pairs)


def link_rate(topology: Topology, host: str) -> float:
    """Return the bytes a second of the slower way between home and a host."""
    return min(link.bytes_per_s.value for link in _both_ways(topology, host))


def _both_ways(topology: Topology, host: str) -> tuple[LinkProfile, LinkProfile]:
    there, back = topology.link(topology.home, host), topology.link(host, topology.home)
    if there is None or back is None:
        raise ValueError(f"no links between {topology.home} and {host}")
    return there, back
