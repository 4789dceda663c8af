"""What a host that serves is asked to do; implemented by the worker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from edgert.hosts.identity import TrustedPeer
from edgert.hosts.link import Link


@dataclass(frozen=True, slots=True)
class OfferedBlob:
    """A blob that a peer has for this host."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class BlobState:
    """How much of an offered blob a host has.

    Attributes:
        there_bytes: All of it if it is whole; else an upload continues there.
    """

    sha256: str
    size_bytes: int
    there_bytes: int
    is_whole: bool


class Handlers(Protocol):
    """Called in threads of the server, several at a time.

    An `EdgertError` ends the call and is told to the peer. What they return is written as JSON.
    """

    def status(self, peer: TrustedPeer) -> Mapping[str, object]:
        """Return what this host is and does; must not wait."""

    def offer(self, peer: TrustedPeer, blobs: tuple[OfferedBlob, ...]) -> None:
        """Refuse blobs by raising, before room for them is looked for."""

    def open(
        self, peer: TrustedPeer, request: Mapping[str, object]
    ) -> Iterator[Mapping[str, object]]:
        """Open a session; yield progress, and last that it is ready.

        A generator is closed at its next event when the peer gives up.
        """

    def close(self, peer: TrustedPeer, session: str) -> None:
        """Close a session of this peer; does nothing if there is none."""

    def run(self, peer: TrustedPeer, link: Link) -> None:
        """Work for a peer over a link until it leaves; the link is closed afterwards."""
