"""What service links take, and how long they wait."""

from __future__ import annotations

from dataclasses import dataclass

from edgert.hosts.link import DEFAULT_LIMITS, LinkLimits

MOST_JSON_BYTES = 8 << 20
CHUNK_BYTES = 1 << 20
# gRPC's own limit is higher, so that a little too much is refused in our words.
MOST_MESSAGE_BYTES = MOST_JSON_BYTES + (1 << 20)

_SLOWEST_BYTES_PER_S = 50_000_000  # a board that hashes and syncs what it has


@dataclass(frozen=True, slots=True)
class ServiceLimits:
    """Limits of one end.

    Attributes:
        deadline_s: Seconds for a short call: Status, Offer, Close.
        open_s: Seconds for Open, which loads a model.
        stall_s: Seconds in which an upload must get on.
        handshake_s: Seconds for a connection and its handshake.
        most_calls: Opens, uploads and links that a server serves at a time.
        link: Of links over `run`.
    """

    deadline_s: float = 10.0
    open_s: float = 900.0
    stall_s: float = 30.0
    handshake_s: float = 5.0
    most_calls: int = 16
    link: LinkLimits = DEFAULT_LIMITS

    def __post_init__(self) -> None:
        waits = (self.deadline_s, self.open_s, self.stall_s, self.handshake_s)
        if min(waits) <= 0 or self.most_calls <= 0:
            raise ValueError(f"{self}, wanted positive figures")


DEFAULT_SERVICE_LIMITS = ServiceLimits()


def disk_s(n_bytes: int) -> float:
    """Return the seconds that a slow host may need to hash or sync so many bytes."""
    return n_bytes / _SLOWEST_BYTES_PER_S
