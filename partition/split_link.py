"""What hidden states cost between the two sides of a model that is cut once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import log2

from devices.topology import Topology
from partition.candidates import Split
from partition.cost import link_hop
from partition.manifest import Codec
from partition.problem import Hop

# Of a value with a step for an error e, if values are normally distributed: their entropy is
# log2(sqrt(2 pi e)) - log2(sqrt(12)) - log2(e) bits, and the code takes at most 0.15 bits more.
_BITS_BESIDE_THE_BOUND = 0.2546 + 0.15
_COARSE_BITS = 2.15, 1.08  # less the second for the whole bound: fitted, for steps beyond a value
_HEAD_BYTES = 3.0  # of a message of one token


@dataclass(frozen=True, slots=True)
class SplitCodecs:
    """How hidden states may be written.

    Attributes:
        allowed: All but f32 lose precision.
        bound: Of the codec adaptive where none was calibrated.
        bounds: Those that were, by file at home and cut.
    """

    allowed: tuple[Codec, ...] = ("f32",)
    bound: float = 0.1
    bounds: Mapping[tuple[str, int], float] = field(default_factory=dict)

    def at(self, front: str, cut: int) -> tuple[Split, ...]:
        """Return the codecs for a cut."""
        return tuple(
            Split(codec, self.bounds.get((front, cut), self.bound) if codec == "adaptive" else None)
            for codec in self.allowed
        )


def hidden_bytes(split: Split, n_embd: int) -> float:
    """Return the bytes of one token's hidden state."""
    match split.codec:
        case "f32":
            return 4.0 * n_embd
        case "f16":
            return 2.0 * n_embd
        case "adaptive":
            bound = split.bound or 1.0
            coarse = _COARSE_BITS[0] - _COARSE_BITS[1] * bound
            return _HEAD_BYTES + n_embd * max(_BITS_BESIDE_THE_BOUND - log2(bound), coarse) / 8


def split_hops(
    topology: Topology, host_id: str, token_bytes: float, n_decoded: int, n_prompt: int
) -> Hop | None:
    """Return the way to a host and back; None without links.

    Hidden states of a whole prompt come back, as every row that went there does.
    """
    there, back = topology.link(topology.home, host_id), topology.link(host_id, topology.home)
    if there is None or back is None:
        return None
    sizes = token_bytes * n_decoded, token_bytes * n_prompt
    one, other = link_hop(there, *sizes), link_hop(back, *sizes)
    return Hop(
        one.decode_s + other.decode_s,
        one.prefill_s + other.prefill_s,
        one.sent_bytes + other.sent_bytes,
    )
