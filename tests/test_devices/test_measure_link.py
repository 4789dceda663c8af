"""The link probe over loopback, and peers that are silent, rude or gone."""

from __future__ import annotations

import itertools
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from devices.measure_link import (
    GREETING,
    MOST_REQUEST_BYTES,
    Address,
    LinkProbe,
    loopback_peer,
    measure_link,
)
from edgert.errors import ConfigError, LinkError, LinkTimeout

QUICK = LinkProbe(n_messages=3, request_bytes=1 << 16, n_requests=3, most_s=100.0, deadline_s=5.0)


@contextmanager
def peer(answer: Callable[[socket.socket], None]) -> Iterator[Address]:
    """A peer that does one thing with its first connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            link, _ = server.accept()
            with link:
                answer(link)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()
        thread.join(10)


def test_rates_are_bytes_over_the_clocks_seconds() -> None:
    looks = itertools.count()
    with loopback_peer() as address:
        rates = measure_link(address, QUICK, lambda: next(looks) * 0.25)
    assert rates.round_trip_s.value == 0.25
    assert rates.to_peer.value == rates.from_peer.value == (1 << 16) / 0.25
    assert {rates.to_peer.origin, rates.round_trip_s.origin} == {"measured"}


def test_peer_listens_on_loopback_only_and_stops() -> None:
    with loopback_peer() as address:
        assert address[0] == "127.0.0.1"
        measure_link(address, QUICK)
    with pytest.raises(LinkError):
        measure_link(address, QUICK)


def test_peer_serves_the_next_after_one_that_talks_nonsense() -> None:
    with loopback_peer() as address:
        for nonsense in (b"GET / HTTP/1.1\r\n\r\n", GREETING + b"x\xff\xff\xff\xff", b""):
            with socket.create_connection(address) as link:
                link.sendall(nonsense)
        assert measure_link(address, QUICK).to_peer.value > 0


def test_peer_does_not_make_what_is_too_large() -> None:
    with loopback_peer() as address, socket.create_connection(address, timeout=5) as link:
        request = b"r" + (MOST_REQUEST_BYTES + 1).to_bytes(4, "big")
        link.sendall(GREETING + request)
        received = b""
        while chunk := link.recv(1 << 16):
            received += chunk
    assert received == GREETING


def test_nobody_there_is_an_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
    with pytest.raises(LinkError, match=str(address[1])):
        measure_link(address, QUICK)


@pytest.mark.parametrize("name", ["a..b", "x" * 64 + ".example", "."])
def test_name_that_no_host_can_have_is_a_wrong_request(name: str) -> None:
    with pytest.raises(ConfigError, match="no name of a host"):
        measure_link((name, 80), QUICK)


def test_silent_peer_is_a_timeout() -> None:
    stop = threading.Event()
    with peer(lambda _link: stop.wait(10) and None) as address:
        with pytest.raises(LinkTimeout, match="no answer within"):
            measure_link(address, LinkProbe(deadline_s=0.05))
        stop.set()


def test_other_program_is_no_peer() -> None:
    with (
        peer(lambda link: link.sendall(b"220 mail ready\r\n")) as address,
        pytest.raises(LinkError, match="not as an edgert host"),
    ):
        measure_link(address, QUICK)


def test_peer_that_leaves_is_an_error() -> None:
    with (
        peer(lambda link: link.sendall(GREETING)) as address,
        pytest.raises(LinkError),
    ):
        measure_link(address, QUICK)


def test_request_beyond_the_protocol_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match="16 MiB"):
        measure_link(("127.0.0.1", 1), LinkProbe(request_bytes=MOST_REQUEST_BYTES + 1))
