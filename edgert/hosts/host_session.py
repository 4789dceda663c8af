"""Home's session on another host: opened, attached to, and opened anew where it was lost."""

from __future__ import annotations

import secrets
import threading
from typing import Protocol

from edgert.errors import FormatError, LinkError
from edgert.events import Listener
from edgert.hosts.frames import FrameKind
from edgert.hosts.link import Link
from edgert.hosts.session import Attach, read_attached


class Peer(Protocol):
    """Another host, as home reaches it."""

    @property
    def name(self) -> str:
        """For people."""

    def open(self, session: str, host_id: str, listener: Listener) -> None:
        """Send what is missing there and open a session; LinkError names host and cause."""

    def link(self) -> Link:
        """Open one more link for the session's parts."""

    def close(self, session: str) -> None:
        """End a session and the way to the host."""


class HostSession:
    """Parts of one host that are open for home. Thread-safe.

    Args:
        peer: The host.
        host_id: As the manifest calls it.
        listener: Hears what happens.
    """

    def __init__(self, peer: Peer, host_id: str, listener: Listener) -> None:
        self.host_id = host_id
        self._peer = peer
        self.listener = listener
        self._key = secrets.token_hex(16)
        self._renewing = threading.Lock()

    @property
    def key(self) -> str:
        """The session's name, which only the two ends know."""
        return self._key

    def open(self) -> None:
        """Send what the host lacks and open the session; LinkError names host and cause."""
        self._peer.open(self._key, self.host_id, self.listener)

    def attach(self, part: str, *, resume: bool = False) -> tuple[Link, int]:
        """Return a link to a part, and what was done there last.

        Raises:
            LinkError: the host or the session is gone.
        """
        link = self._peer.link()
        try:
            link.send(FrameKind.CONTROL, Attach(self._key, part, resume).to_bytes())
            return link, read_attached(link.receive())
        except FormatError as error:
            failure = LinkError(f"{link.peer}: sent {error.message}")
            link.fail(failure)
            raise failure from error
        except BaseException:
            link.close()
            raise

    def renew(self, lost: str) -> None:
        """Open another session in place of a lost one, unless that was done already.

        Args:
            lost: Key of the session that is gone.

        Raises:
            LinkError: the host cannot be reached, or refuses.
        """
        with self._renewing:
            if lost == self._key:
                key = secrets.token_hex(16)
                self._peer.open(key, self.host_id, self.listener)
                self._key = key

    def close(self) -> None:
        """End it; a host that is gone is passed over."""
        try:
            self._peer.close(self._key)
        except LinkError:
            return  # and so is the session


class PartReach:
    """See `Reach`: one part of a session.

    Args:
        session: Open.
        part: Its name there.
    """

    def __init__(self, session: HostSession, part: str) -> None:
        self._session = session
        self._part = part
        self._key = session.key

    def resume(self) -> tuple[Link, int]:
        """See `Reach`."""
        if self._session.key != self._key:
            raise LinkError(f"the session on {self._session.host_id} is another one now")
        return self._session.attach(self._part, resume=True)

    def renew(self) -> Link:
        """See `Reach`."""
        self._session.renew(self._key)
        link, _ = self._session.attach(self._part)
        self._key = self._session.key
        return link
