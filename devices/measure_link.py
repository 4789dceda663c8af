"""How fast two hosts talk: round trip of a small message and bandwidth each way, over TCP.

The peer answers a tiny protocol: a greeting both ways, then requests of one letter and a length.
The peer here listens on 127.0.0.1 only.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from devices.profile import Figure, Rate
from edgert.errors import ConfigError, LinkError, LinkTimeout

Clock = Callable[[], float]
Address = tuple[str, int]

GREETING = b"edgert-link-1\n"
MOST_REQUEST_BYTES = 16 << 20
_LOOPBACK = "127.0.0.1"
_HEADER = struct.Struct("!cI")
_ECHO, _SINK, _SOURCE = b"e", b"s", b"r"
_DONE = b"."
_CHUNK_BYTES = 1 << 18
_IDLE_S = 10.0


@dataclass(frozen=True, slots=True)
class LinkProbe:
    """How much is sent.

    Attributes:
        message_bytes: Size of the message that goes there and back.
        n_messages: The median counts.
        request_bytes: Size of one request for bandwidth.
        n_requests: Most of them each way; the median counts.
        most_s: Seconds each way after which requests stop.
        deadline_s: Seconds without progress after which the peer counts as gone.
    """

    message_bytes: int = 8 << 10
    n_messages: int = 64
    request_bytes: int = 4 << 20
    n_requests: int = 32
    most_s: float = 1.5
    deadline_s: float = 5.0


@dataclass(frozen=True, slots=True)
class LinkRates:
    """What was measured: a small message there and back, payload to the peer and from it."""

    round_trip_s: Figure
    to_peer: Rate
    from_peer: Rate


def measure_link(
    address: Address, probe: LinkProbe = LinkProbe(), clock: Clock = time.perf_counter
) -> LinkRates:
    """Measure the link to a peer that runs `loopback_peer`'s protocol.

    Raises:
        ConfigError: the host's name can be none.
        LinkError: the peer cannot be reached, is no such peer, or left.
        LinkTimeout: it did not answer before the deadline.
    """
    name = f"{address[0]}:{address[1]}"
    if not 0 < probe.request_bytes <= MOST_REQUEST_BYTES:
        raise ValueError(f"requests of {probe.request_bytes} bytes, wanted up to 16 MiB")
    try:
        with socket.create_connection(address, timeout=probe.deadline_s) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.sendall(GREETING)
            if _receive(link, len(GREETING)) != GREETING:
                raise LinkError(f"{name}: answers, but not as an edgert host")
            return _rates(link, probe, clock)
    except UnicodeError as error:  # labels that are empty or too long
        raise ConfigError(f"{name}: no name of a host", hint="HOST:PORT") from error
    except TimeoutError as error:
        raise LinkTimeout(f"{name}: no answer within {probe.deadline_s:g} s") from error
    except OSError as error:
        raise LinkError(f"{name}: {error.strerror or error}") from error


@contextmanager
def loopback_peer() -> Iterator[Address]:
    """Run a peer in a thread on 127.0.0.1, and stop it afterwards."""
    with socket.create_server((_LOOPBACK, 0)) as server:
        stopped = threading.Event()
        thread = threading.Thread(
            target=_accept, args=(server, stopped), name="link-peer", daemon=True
        )
        thread.start()
        try:
            yield _LOOPBACK, server.getsockname()[1]
        finally:
            stopped.set()
            with contextlib.suppress(OSError):
                socket.create_connection(server.getsockname(), timeout=1.0).close()  # wakes it
            thread.join(_IDLE_S)


def _rates(link: socket.socket, probe: LinkProbe, clock: Clock) -> LinkRates:
    message = bytes(probe.message_bytes)
    payload = bytes(probe.request_bytes)

    def echo() -> None:
        link.sendall(_HEADER.pack(_ECHO, len(message)) + message)
        _receive(link, len(message))

    def send() -> None:
        link.sendall(_HEADER.pack(_SINK, len(payload)))
        link.sendall(payload)
        if _receive(link, 1) != _DONE:
            raise LinkError("the peer broke the protocol")

    def fetch() -> None:
        link.sendall(_HEADER.pack(_SOURCE, len(payload)))
        _drain(link, len(payload))

    trips = _times(echo, probe.n_messages, probe.most_s, clock)
    there = _times(send, probe.n_requests, probe.most_s, clock)
    back = _times(fetch, probe.n_requests, probe.most_s, clock)
    middle, spread = _middle(trips)
    return LinkRates(
        round_trip_s=Figure(value=middle, origin="measured", spread=spread),
        to_peer=_rate(there, len(payload)),
        from_peer=_rate(back, len(payload)),
    )


def _times(act: Callable[[], None], n_times: int, most_s: float, clock: Clock) -> list[float]:
    """Time an action; the first time, which opens the window of TCP, does not count."""
    act()
    times: list[float] = []
    start_s = clock()
    while len(times) < n_times:
        before_s = clock()
        act()
        after_s = clock()
        times.append(after_s - before_s)
        if after_s - start_s > most_s:
            break
    return times


def _rate(times: list[float], n_bytes: int) -> Rate:
    middle, spread = _middle(times)
    return Rate(value=n_bytes / middle, origin="measured", spread=spread)


def _middle(times: list[float]) -> tuple[float, float]:
    """Return the median, and half the range of the middle four fifths over it."""
    ordered = sorted(times)
    outer = len(ordered) // 10
    times = ordered[outer : len(ordered) - outer]
    middle = statistics.median(times)
    if middle <= 0:
        raise LinkError("the clock did not move while bytes did")
    return middle, (max(times) - min(times)) / 2 / middle


def _receive(link: socket.socket, n_bytes: int) -> bytes:
    found = bytearray()
    while len(found) < n_bytes:
        chunk = link.recv(min(_CHUNK_BYTES, n_bytes - len(found)))
        if not chunk:
            raise LinkError("the peer closed the connection")
        found += chunk
    return bytes(found)


def _drain(link: socket.socket, n_bytes: int) -> None:
    """Receive and forget."""
    buffer = bytearray(_CHUNK_BYTES)
    left = n_bytes
    while left > 0:
        n_read = link.recv_into(buffer, min(_CHUNK_BYTES, left))
        if n_read == 0:
            raise LinkError("the peer closed the connection")
        left -= n_read


def _accept(server: socket.socket, stopped: threading.Event) -> None:
    while not stopped.is_set():
        try:
            link, _ = server.accept()
        except OSError:
            return
        with link:
            if not stopped.is_set():
                with contextlib.suppress(OSError, LinkError):
                    _serve(link)


def _serve(link: socket.socket) -> None:
    """Answer one peer until it leaves, is silent too long or asks for too much."""
    link.settimeout(_IDLE_S)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if _receive(link, len(GREETING)) != GREETING:
        return
    link.sendall(GREETING)
    while True:
        what, n_bytes = _HEADER.unpack(_receive(link, _HEADER.size))
        if n_bytes > MOST_REQUEST_BYTES:
            return
        match what:
            case b"e":
                link.sendall(_receive(link, n_bytes))
            case b"s":
                _drain(link, n_bytes)
                link.sendall(_DONE)
            case b"r":
                link.sendall(bytes(n_bytes))
            case _:
                return
