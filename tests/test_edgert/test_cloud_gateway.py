"""Whom a gateway speaks for, and what keeps a session on one replica."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import grpc
import pytest

from edgert.hosts.service import serve
from edgert.hosts.service.messages import (
    CLIENT_CERTIFICATE_KEY,
    ROUTE_KEY,
    decode,
    own_versions,
    path_of,
    routed,
)
from edgert.hosts.service.receiver import BlobReceiver
from edgert.hosts.service.server import ServiceServer
from host_identities import Host, make_host
from service_hosts import LIMITS, FakeHandlers, pair_of

EDGE, OTHER, GATEWAY, STRANGER = (make_host(name) for name in ("edge", "other", "gw", "stranger"))
CLOUD = make_host("cloud")


@contextmanager
def replica(folder: Path) -> Iterator[ServiceServer]:
    trusted = [EDGE.known, OTHER.known, replace(GATEWAY.known, is_gateway=True)]
    receiver = BlobReceiver(folder, margin_bytes=0)
    with serve("127.0.0.1:0", CLOUD.identity, trusted, FakeHandlers(), receiver, LIMITS) as server:
        yield server
        server.close(0)


def who(server: ServiceServer, caller: Host, *shown: bytes) -> object:
    """Ask for the status as a caller, with certificates in metadata; return whose call it was."""
    own = caller.identity
    keys = grpc.ssl_channel_credentials(
        CLOUD.identity.certificate_pem, own.key_pem, own.certificate_pem
    )
    options = [("grpc.ssl_target_name_override", "edgert"), ("grpc.enable_http_proxy", 0)]
    metadata = [*own_versions(), *((CLIENT_CERTIFICATE_KEY, quote(pem)) for pem in shown)]
    with grpc.secure_channel(server.address, keys, options) as channel:
        ask: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(path_of("Status"))
        return decode(ask(b"{}", timeout=20, metadata=metadata), "Status")["peer"]


def test_a_call_that_a_gateway_passes_on_is_that_of_whose_certificate_it_shows(
    tmp_path: Path,
) -> None:
    with replica(tmp_path) as server:
        assert who(server, GATEWAY, EDGE.identity.certificate_pem) == "edge"
        assert who(server, GATEWAY, OTHER.identity.certificate_pem) == "other"


def test_nobody_but_a_gateway_speaks_for_others(tmp_path: Path) -> None:
    with replica(tmp_path) as server:
        assert who(server, EDGE, OTHER.identity.certificate_pem) == "edge"


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ([], "does not say whose"),
        ([EDGE, OTHER], "does not say whose"),
        ([STRANGER], "is not trusted"),
        ([GATEWAY], "call of the gateway"),
    ],
)
def test_a_gateway_that_shows_nobody_known_is_refused(
    shown: list[Host], words: str, tmp_path: Path
) -> None:
    with replica(tmp_path) as server:
        with pytest.raises(grpc.RpcError) as caught:
            who(server, GATEWAY, *(host.identity.certificate_pem for host in shown))
        assert words in str(caught.value.details())


@pytest.mark.parametrize("content", [b"", b"nothing", b"\xff" * 40, b"-----BEGIN CERTIFICATE-----"])
def test_what_is_no_certificate_is_refused(content: bytes, tmp_path: Path) -> None:
    with replica(tmp_path) as server, pytest.raises(grpc.RpcError) as caught:
        who(server, GATEWAY, content)
    assert caught.value.code() is grpc.StatusCode.ABORTED


def test_calls_of_a_session_say_the_same_and_not_its_name(tmp_path: Path) -> None:
    session = "ab" * 16
    metadata = dict(routed(session))
    assert metadata[ROUTE_KEY] == dict(routed(session))[ROUTE_KEY] != dict(routed("cd" * 16))
    assert session not in str(metadata)
    assert ROUTE_KEY not in dict(routed(None))
    with pair_of(tmp_path) as pair:  # both ends take it
        pair.client.session = session
        assert pair.client.status()["peer"] == "home"
        assert list(pair.client.open({"a": 1}))[-1] == {"ready": True}
        pair.client.run().close()
