"""A worker that serves, with handlers that a test can hold up, and a home that calls it."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc

from edgert.errors import CapacityError, EdgertError
from edgert.hosts.frames import FrameKind
from edgert.hosts.identity import TrustedPeer
from edgert.hosts.link import Link
from edgert.hosts.service import ServiceLimits, connect_service, serve
from edgert.hosts.service.client import ServiceClient
from edgert.hosts.service.handlers import OfferedBlob
from edgert.hosts.service.progress import TransferProgress
from edgert.hosts.service.receiver import BlobReceiver
from edgert.hosts.service.server import ServiceServer
from edgert.packing.blobs import Blob
from host_identities import PATIENT, Host, make_host

LIMITS = ServiceLimits(deadline_s=20.0, open_s=20.0, stall_s=20.0, link=PATIENT)
MB = 1 << 20


class FakeHandlers:
    """Answers at once, unless `held`; remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: dict[str, object] = {"free_bytes": 5}
        self.held = threading.Event()
        self.let_go = threading.Event()
        self.is_slow = False
        self.failure: EdgertError | None = None
        self.closed: list[tuple[str, str]] = []
        self.events_closed = threading.Event()
        self.run_with: Callable[[Link], None] = echo
        self.run_ended = threading.Event()
        self.run_error: BaseException | None = None

    def status(self, peer: TrustedPeer) -> Mapping[str, object]:
        self._hold()
        return {"peer": peer.name, **self.answer}

    def offer(self, peer: TrustedPeer, blobs: tuple[OfferedBlob, ...]) -> None:
        del peer, blobs
        self._hold()

    def open(
        self, peer: TrustedPeer, request: Mapping[str, object]
    ) -> Iterator[Mapping[str, object]]:
        try:
            yield {"peer": peer.name, "request": dict(request)}
            self._hold()
            yield {"ready": True}
        finally:
            self.events_closed.set()

    def close(self, peer: TrustedPeer, session: str) -> None:
        self.closed.append((peer.name, session))

    def run(self, peer: TrustedPeer, link: Link) -> None:
        del peer
        try:
            self.run_with(link)
        except BaseException as error:
            self.run_error = error
            raise
        finally:
            self.run_ended.set()

    def _hold(self) -> None:
        if self.is_slow:
            self.held.set()
            self.let_go.wait(20)
        if self.failure is not None:
            raise self.failure


def echo(link: Link) -> None:
    """Answer every frame until the peer leaves."""
    while (frame := link.receive()).kind is not FrameKind.BYE:
        link.send(FrameKind.RESULT, frame.payload)


NO_ROOM = CapacityError(
    "model needs 9 bytes, 5 are free\x1b[31m", needed_bytes=9, hint="choose a smaller one"
)


@dataclass
class Pair:
    """A worker, and the home that it trusts."""

    home: Host
    worker: Host
    handlers: FakeHandlers
    server: ServiceServer
    client: ServiceClient
    folder: Path

    def raw(self) -> grpc.Channel:
        """Connect without any of our own rules."""
        own = self.home.identity
        keys = grpc.ssl_channel_credentials(
            self.worker.identity.certificate_pem, own.key_pem, own.certificate_pem
        )
        options = [("grpc.ssl_target_name_override", "edgert"), ("grpc.enable_http_proxy", 0)]
        return grpc.secure_channel(self.server.address, keys, options)


@contextmanager
def pair_of(
    folder: Path,
    limits: ServiceLimits = LIMITS,
    *,
    margin_bytes: int = 0,
    listener: Callable[[TransferProgress], None] = lambda _: None,
) -> Iterator[Pair]:
    """Start a worker on an ephemeral port, and a client of it."""
    home, worker, handlers = make_host("home"), make_host("worker"), FakeHandlers()
    receiver = BlobReceiver(folder, margin_bytes=margin_bytes, listener=listener)
    with (
        serve("127.0.0.1:0", worker.identity, [home.known], handlers, receiver, limits) as server,
        connect_service(server.address, home.identity, worker.known, limits) as client,
    ):
        yield Pair(home, worker, handlers, server, client, folder)
        handlers.let_go.set()
        server.close(0)


def blob_of(content: bytes, sha256: str | None = None) -> Blob:
    """Describe content, under its own hash or a wrong one."""

    def read(offset: int) -> Iterator[bytes]:
        for start in range(offset, len(content), MB):
            yield content[start : start + MB]

    return Blob(sha256 or hashlib.sha256(content).hexdigest(), len(content), "test", read)


def eventually(holds: Callable[[], bool]) -> None:
    """Wait for what another thread is about to do."""
    until_s = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < until_s, "it did not happen"
        time.sleep(0.005)
