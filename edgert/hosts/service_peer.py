"""Another host behind a service link: sends it what it lacks, opens sessions, links to them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgert.errors import LinkError
from edgert.events import Listener, Notice, WorkProgress
from edgert.hosts.address import Address, parse_address
from edgert.hosts.heartbeat import Heartbeat
from edgert.hosts.hello import Terms
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.link import Link, LinkLimits
from edgert.hosts.service import connect_service
from edgert.hosts.service.limits import ServiceLimits
from edgert.hosts.service.progress import TransferProgress
from edgert.hosts.service.receiver import OFFER_AGAIN
from edgert.hosts.tls_link import connect
from edgert.packing.blobs import Blob

if TYPE_CHECKING:
    from partition.manifest import Transport

_OTHER_HOME_S = 600.0  # in which another home may send the same part
_LOOK_S = 0.2


_LEAST_SILENCE_S = 0.05


@dataclass(frozen=True, slots=True)
class PeerFiles:
    """What a host needs of a manifest.

    Attributes:
        manifest: Its canonical form.
        parts: Of the host's stages.
    """

    manifest: Blob
    parts: Sequence[Blob]


class ServicePeer:
    """A `Peer` behind a service.

    Args:
        address: HOST:PORT of its service.
        identity: Home's.
        peer: The one key that is accepted.
        files: What it needs.
        limits: Of links for steps.
        transport: Kind of those links: "exchange" is a socket of its own, "service" goes the way
            of the service, through what balances its load.
    """

    def __init__(
        self,
        address: str,
        identity: HostIdentity,
        peer: TrustedPeer,
        files: PeerFiles,
        limits: LinkLimits,
        transport: Transport | str = "exchange",
    ) -> None:
        short_s = min(ServiceLimits().deadline_s, limits.deadline_s)
        service = ServiceLimits(deadline_s=short_s, stall_s=limits.deadline_s, link=limits)
        self._client = connect_service(address, identity, peer, service)
        self._address = parse_address(address)
        self._identity = identity
        self._peer = peer
        self.files = files
        self._limits = limits
        self._kind = transport if isinstance(transport, str) else transport.kind
        self._exchange: str | None = None
        self._heartbeat: Heartbeat | None = None

    @property
    def name(self) -> str:
        """See `Peer`."""
        return self._client.name

    def open(self, session: str, host_id: str, listener: Listener) -> None:
        """See `Peer`."""
        self._client.session = session
        self._send(listener)
        request = {
            "session": session,
            "host": host_id,
            "manifest": self.files.manifest.sha256,
            "parts": [blob.sha256 for blob in self.files.parts],
        }
        for event in self._client.open(request):
            if event.get("ready") is True:
                self._exchange = self._exchange_address(event.get("exchange"))
                self._begin_heartbeat(event.get("silence_s"))
            else:
                listener(Notice(f"{self._peer.name}: opened {event.get('opened')}"))
        if self._exchange is None:
            raise LinkError(f"{self.name}: opened the session, but does not say where it listens")

    def link(self) -> Link:
        """See `Peer`."""
        link = self._connect()
        if self._heartbeat is not None:
            self._heartbeat.add(link)
        return link

    def close(self, session: str) -> None:
        """See `Peer`."""
        if self._heartbeat is not None:
            self._heartbeat.close()
        try:
            self._client.close_session(session)
        finally:
            self._client.close()

    def _connect(self) -> Link:
        if self._kind == "service":
            return self._client.run()
        if self._exchange is None:
            raise LinkError(f"{self.name}: no session is open")
        terms = Terms("home", "worker")
        return connect(self._exchange, self._identity, self._peer, terms, self._limits)

    def _begin_heartbeat(self, silence_s: object) -> None:
        """Send signs of life on links to come, as often as the host wants them."""
        if self._heartbeat is not None:
            self._heartbeat.close()
        is_time = isinstance(silence_s, int | float) and silence_s >= _LEAST_SILENCE_S
        self._heartbeat = Heartbeat(float(silence_s)) if is_time else None  # type: ignore[arg-type]

    def _send(self, listener: Listener) -> None:
        """Send what is missing there; what another home is sending just now is waited for."""
        blobs = {blob.sha256: blob for blob in (self.files.manifest, *self.files.parts)}
        until_s = time.monotonic() + _OTHER_HOME_S
        while True:
            try:
                return self._send_once(blobs, listener)
            except LinkError as error:
                if error.hint != OFFER_AGAIN or time.monotonic() > until_s:
                    raise
            time.sleep(_LOOK_S)

    def _send_once(self, blobs: Mapping[str, Blob], listener: Listener) -> None:
        from edgert.hosts.service.upload import send_blobs

        done: dict[str, int] = {}
        total_bytes = sum(blob.size_bytes for blob in blobs.values())
        is_sending = False

        def hear(progress: TransferProgress) -> None:
            nonlocal is_sending
            done[progress.sha256] = progress.done_bytes
            is_sending |= progress.done_bytes < progress.total_bytes
            if is_sending:
                done_bytes = sum(done.values())
                listener(WorkProgress(f"send to {self._peer.name}", done_bytes, total_bytes))

        send_blobs(self._client, list(blobs.values()), hear)

    def _exchange_address(self, told: object) -> str | None:
        """Return where its exchange links listen: its port, on the address that home uses."""
        if not isinstance(told, str):
            return None
        return str(Address(self._address.host, parse_address(told).port))
