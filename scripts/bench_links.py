"""Round trip of a small message over TCP, Python's ssl and both kinds of links, on loopback.

Each peer is a process of its own. The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import platform
import socket
import ssl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

from edgert.errors import ConfigError, LinkError
from edgert.hosts.frames import FrameKind
from edgert.hosts.hello import Terms
from edgert.hosts.identity import HostIdentity, TrustedPeer, create_identity
from edgert.hosts.link import Link
from edgert.hosts.listener import listen
from edgert.hosts.service import connect_service, serve
from edgert.hosts.service.handlers import OfferedBlob
from edgert.hosts.service.receiver import BlobReceiver
from edgert.hosts.tls_context import client_context, server_context
from edgert.hosts.tls_link import connect

Trip = Callable[[], None]

_LOOPBACK = "127.0.0.1"
_WARM_UP = 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bytes", type=int, default=8 << 10, help="size of the message")
    parser.add_argument("--trips", type=int, default=2000, help="round trips of a repetition")
    parser.add_argument("--repetitions", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        identity = create_identity(Path(folder), "bench")
    found: dict[str, list[float]] = {"tcp": [], "ssl": [], "link": [], "service": []}
    for _ in range(options.repetitions):  # in turn, so that all see the same machine
        for kind, times in found.items():
            times.append(_measure(kind, identity, options.bytes, options.trips))
    medians = {kind: statistics.median(times) for kind, times in found.items()}
    print(f"{platform.machine()}, {options.bytes:,} bytes there and back, us")
    for kind, times in found.items():
        print(f"{kind:>7}  {medians[kind]:6.1f}  ({min(times):.1f} to {max(times):.1f})")
    record = {
        "message_bytes": options.bytes,
        "round_trip_us": {kind: round(value, 2) for kind, value in medians.items()},
        "link_over_ssl": round(medians["link"] / medians["ssl"], 3),
        "service_over_link": round(medians["service"] / medians["link"], 3),
    }
    print(json.dumps(record))


def _measure(kind: str, identity: HostIdentity, n_bytes: int, n_trips: int) -> float:
    """Return the median round trip in microseconds."""
    processes = multiprocessing.get_context("spawn")  # gRPC does not survive a fork
    near, far = processes.Pipe()
    peer = processes.Process(target=_serve, args=(kind, identity, n_bytes, far))
    peer.start()
    far.close()
    address: str = near.recv()
    message = memoryview(bytearray(n_bytes))
    if kind == "link":
        link = connect(address, identity, _self(identity), Terms("bench"))
        trip = _link_trip(link, message)
        median = _median_us(trip, n_trips)
        link.close()
    elif kind == "service":
        with connect_service(address, identity, _self(identity)) as client:
            link = client.run()
            median = _median_us(_link_trip(link, message), n_trips)
            link.close()
        near.send(None)
    else:
        end = _end(address, identity if kind == "ssl" else None)
        with end:
            median = _median_us(_socket_trip(end, message), n_trips)
    peer.join()
    return median


def _median_us(trip: Trip, n_trips: int) -> float:
    for _ in range(_WARM_UP):
        trip()
    times = []
    for _ in range(n_trips):
        start = time.perf_counter()
        trip()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6


def _serve(kind: str, identity: HostIdentity, n_bytes: int, ready: Connection) -> None:
    """Send every message back until the other end leaves."""
    message = memoryview(bytearray(n_bytes))
    if kind == "link":
        listener = listen(f"{_LOOPBACK}:0", identity, [_self(identity)], Terms("bench"))
        ready.send(listener.address)
        _echo_link(listener.accept().link, message)
        listener.close()
        return
    if kind == "service":
        with tempfile.TemporaryDirectory() as folder:
            receiver = BlobReceiver(Path(folder))
            trusted = [_self(identity)]
            with serve(f"{_LOOPBACK}:0", identity, trusted, _Echo(n_bytes), receiver) as server:
                ready.send(server.address)
                ready.recv()
        return
    with socket.create_server((_LOOPBACK, 0)) as server:
        ready.send("{}:{}".format(*server.getsockname()))
        end, _ = server.accept()
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if kind == "ssl":
            context = server_context(identity, [identity.certificate_pem])
            end = context.wrap_socket(end, server_side=True)
        with end:
            while _receive(end, message):
                end.sendall(message)


class _Echo:
    """See `Handlers`; is asked for links only."""

    def __init__(self, n_bytes: int) -> None:
        self._n_bytes = n_bytes

    def status(self, peer: TrustedPeer) -> Mapping[str, object]:
        return {"peer": peer.name}

    def offer(self, peer: TrustedPeer, blobs: tuple[OfferedBlob, ...]) -> None:
        raise ConfigError(f"{peer.name} offers {len(blobs)} blobs to a benchmark")

    def open(
        self, peer: TrustedPeer, request: Mapping[str, object]
    ) -> Iterator[Mapping[str, object]]:
        raise ConfigError(f"{peer.name} opens {len(request)} things in a benchmark")

    def close(self, peer: TrustedPeer, session: str) -> None:
        raise ConfigError(f"{peer.name} closes {session} in a benchmark")

    def run(self, peer: TrustedPeer, link: Link) -> None:
        del peer
        _echo_link(link, memoryview(bytearray(self._n_bytes)))


def _echo_link(link: Link, message: memoryview) -> None:
    try:
        while True:
            link.receive_into(FrameKind.TENSOR, message)
            link.send(FrameKind.TENSOR, message)
    except LinkError:
        link.close()


def _end(address: str, identity: HostIdentity | None) -> socket.socket | ssl.SSLSocket:
    host, _, port = address.rpartition(":")
    end = socket.create_connection((host, int(port)))
    end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if identity is None:
        return end
    return client_context(identity, [identity.certificate_pem]).wrap_socket(end)


def _socket_trip(end: socket.socket, message: memoryview) -> Trip:
    def trip() -> None:
        end.sendall(message)
        _receive(end, message)

    return trip


def _link_trip(link: Link, message: memoryview) -> Trip:
    def trip() -> None:
        link.send(FrameKind.TENSOR, message)
        link.receive_into(FrameKind.TENSOR, message)

    return trip


def _receive(end: socket.socket, target: memoryview) -> bool:
    there = 0
    while there < len(target):
        n_now = end.recv_into(target[there:])
        if n_now == 0:
            return False
        there += n_now
    return True


def _self(identity: HostIdentity) -> TrustedPeer:
    return TrustedPeer(identity.name, identity.certificate_pem, identity.fingerprint)


if __name__ == "__main__":
    main()
