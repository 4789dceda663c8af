"""Exchange links: what their users see, their limits, and the byte channel beneath.

One thread may receive on a link while others send; `FramedLink` is the implementation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

from edgert.hosts.frames import MOST_FRAME_BYTES, FrameKind

if TYPE_CHECKING:
    from typing_extensions import Buffer


class Frame(NamedTuple):
    """A received frame; the payload is valid until the link receives again."""

    kind: FrameKind
    payload: memoryview


@dataclass(frozen=True, slots=True)
class LinkLimits:
    """What a link takes, and how long it waits.

    Attributes:
        payload_bytes: Largest payload of a frame.
        deadline_s: Seconds for a frame to arrive, or to be taken by the peer.
        silence_s: Seconds without a single byte after which the peer counts as gone, while
            something is awaited; only for peers that send signs of life (PING).
        handshake_s: Seconds for a connection and all its greetings.
    """

    payload_bytes: int = 64 << 20
    deadline_s: float = 30.0
    silence_s: float | None = None
    handshake_s: float = 5.0

    def __post_init__(self) -> None:
        waits = (self.deadline_s, self.handshake_s, 1 if self.silence_s is None else self.silence_s)
        if not 0 < self.payload_bytes <= MOST_FRAME_BYTES or min(waits) <= 0:
            raise ValueError(f"{self}, wanted positive figures and payloads up to 1 GiB")


DEFAULT_LIMITS = LinkLimits()


class Link(Protocol):
    """A connection to one trusted peer. A link that failed stays failed."""

    @property
    def peer(self) -> str:
        """The peer's name, for people."""

    @property
    def sent_bytes(self) -> int:
        """Headers and payloads sent so far."""

    @property
    def received_bytes(self) -> int:
        """Headers and payloads received so far."""

    def send(self, kind: FrameKind, *parts: Buffer) -> None:
        """Send one frame whose payload is all parts, one after the other.

        Args:
            kind: What it is.
            parts: Contiguous; they may change once this returns.

        Raises:
            LinkError: the peer left, or the link failed before.
            LinkTimeout: the peer takes nothing.
        """

    def receive(self, deadline_s: float | None = None) -> Frame:
        """Wait for the next frame; PING is answered on the way.

        Args:
            deadline_s: Seconds, may be endless (default: the link's).

        Raises:
            LinkError: the peer left, reports an error, or broke the protocol.
            LinkTimeout: nothing came before the deadline.
        """

    def receive_into(self, kind: FrameKind, target: Buffer, deadline_s: float | None = None) -> int:
        """Wait for a frame of one kind, put its payload into a buffer and return its bytes.

        Args:
            kind: Any other kind breaks the protocol.
            target: Writable and contiguous, as large as the payload may be.
            deadline_s: Seconds (default: the link's).

        Raises:
            LinkError: as `receive`, and for another kind or a larger payload.
            LinkTimeout: nothing came before the deadline.
        """

    def fail(self, error: Exception) -> None:
        """Tell the peer why this side gives up, as far as it listens, and close."""

    def close(self) -> None:
        """Say goodbye, unless the link failed, and close; does nothing the second time."""


class Channel(Protocol):
    """Bytes to a peer and from it, in order; reading and writing may be two threads'."""

    def read_into(self, target: memoryview, until_s: float) -> int:
        """Read at least one byte; 0 is the end.

        Args:
            target: Where to.
            until_s: A time of `time.monotonic`.

        Raises:
            TimeoutError: no byte came.
            OSError: the connection broke.
        """

    def write(self, content: bytes | memoryview, until_s: float) -> None:
        """Write all of it.

        Raises:
            TimeoutError: not all was taken.
            OSError: the connection broke.
        """

    def close(self, linger_s: float = 0.0) -> None:
        """Wake whoever reads or writes, and close.

        Args:
            linger_s: Seconds in which the peer may still read what was written last.
        """
