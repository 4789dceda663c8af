"""Links over TLS: who is let in, and the error that each end gets otherwise."""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

import edgert
from edgert.errors import ConfigError, LinkError, LinkTimeout
from edgert.hosts.address import parse_address
from edgert.hosts.certificates import fingerprint_of, new_key
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.frames import FrameKind
from edgert.hosts.hello import Hello, Terms, decode_hello, encode_hello
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.listener import Listener, listen
from edgert.hosts.tls_channel import PeerAlert, TlsChannel
from edgert.hosts.tls_context import claimed_name, client_context
from edgert.hosts.tls_link import Greeted, as_link_error, connect
from host_identities import PATIENT, SHORT, Host, in_thread, make_host

ANY = "127.0.0.1:0"
HUB, WORKER = Terms("hub", peer_role="worker"), Terms("worker", peer_role="hub")


@pytest.fixture(scope="module")
def hub() -> Host:
    return make_host("hub")


@pytest.fixture(scope="module")
def worker() -> Host:
    return make_host("worker")


@pytest.fixture
def listener(hub: Host, worker: Host) -> Iterator[Listener]:
    terms = replace(HUB, manifest="aa" * 32)
    with closing(listen(ANY, hub.identity, [worker.known], terms, SHORT)) as found:
        yield found


def refused(listener: Listener, what: str = "") -> LinkError:
    """Wait for the listener's own error, with some text, about a peer it refused."""
    for _ in range(500):
        for error in listener.refusals:
            if what in error.message:
                return error
        with pytest.raises(LinkTimeout):
            listener.accept(0.02)
    raise TimeoutError(what)


def test_accepted_peer_is_known_by_its_key_and_said_what_it_is(
    listener: Listener, hub: Host, worker: Host
) -> None:
    link = connect(listener.address, worker.identity, hub.known, WORKER, SHORT)
    greeted = listener.accept(20)
    assert greeted.peer == worker.known
    assert greeted.hello == Hello(edgert.__version__, 1, "worker", "worker", None)
    assert greeted.link.peer.startswith("worker (127.0.0.1:")
    assert link.peer == f"hub ({listener.address})"
    link.close()
    greeted.link.close()


def test_unknown_key_is_named_on_both_ends(
    listener: Listener, hub: Host, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = make_host("stranger")
    with pytest.raises(LinkError, match=r"hub .* does not trust this host's key") as caught:
        connect(listener.address, stranger.identity, hub.known, WORKER, SHORT)
    assert "edgert keys trust" in str(caught.value.hint)
    error = refused(listener)
    assert stranger.identity.fingerprint in error.message
    assert "is not trusted" in error.message
    assert "edgert keys trust" in str(error.hint)
    assert [r.levelname for r in caplog.records if stranger.identity.fingerprint in r.message] == [
        "WARNING"
    ]


def test_listener_with_another_key_is_named_on_both_ends(
    listener: Listener, hub: Host, worker: Host
) -> None:
    other = replace(make_host("hub").known)
    with pytest.raises(LinkError) as caught:
        connect(listener.address, worker.identity, other, WORKER, SHORT)
    assert f"has key {hub.identity.fingerprint}, wanted {other.fingerprint}" in caught.value.message
    assert refused(listener, "does not trust this host's key").message.startswith("127.0.0.1:")


def raw_link(address: str, identity: HostIdentity, peer: TrustedPeer) -> FramedLink:
    """Do the handshake and nothing more."""
    context = client_context(identity, [peer.certificate_pem])
    link = context.wrap_socket(plain(address), server_hostname=claimed_name(identity.fingerprint))
    return FramedLink(TlsChannel(link), peer.name, SHORT)


def test_certificate_that_a_trusted_key_signed_for_another_is_refused(
    listener: Listener, hub: Host, worker: Host
) -> None:
    """Its root is trusted, so that the handshake ends well; the key decides."""
    key = load_pem_private_key(new_key(), None)
    own = load_pem_private_key(worker.identity.key_pem, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(own, ec.EllipticCurvePrivateKey)
    issuer = x509.load_pem_x509_certificate(worker.identity.certificate_pem)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "leaf")])
    leaf = (
        x509.CertificateBuilder(issuer.subject, name, key.public_key(), 1)
        .not_valid_before(issuer.not_valid_before_utc)
        .not_valid_after(issuer.not_valid_after_utc)
        .sign(own, hashes.SHA256())
        .public_bytes(Encoding.PEM)
    )
    key_pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    chain = leaf + worker.identity.certificate_pem
    forged = HostIdentity("leaf", chain, key_pem, "00" * 32)
    with (
        closing(raw_link(listener.address, forged, hub.known)) as link,
        pytest.raises(LinkError, match=r"reports LinkError: key \w{64} is not trusted"),
    ):
        link.receive()
    fingerprint = fingerprint_of(ssl.PEM_cert_to_DER_cert(leaf.decode()))
    assert f"key {fingerprint} is not trusted" in refused(listener).message


@pytest.mark.parametrize(
    ("change", "here", "there"),
    [
        ({"peer_role": "relay"}, "role of hub is hub, wanted relay", "reports LinkError: role of"),
        ({"role": "spy"}, "reports LinkError: role of worker is spy", "role of worker is spy"),
        ({"manifest": "bb" * 32}, f"manifest of hub is {'aa' * 32}", "manifest of hub is aaaa"),
    ],
)
def test_what_differs_is_named_on_both_ends(
    listener: Listener, hub: Host, worker: Host, change: dict[str, str], here: str, there: str
) -> None:
    with pytest.raises(LinkError, match=here) as caught:
        connect(listener.address, worker.identity, hub.known, replace(WORKER, **change), SHORT)
    assert caught.value.message.startswith(f"hub ({listener.address})")
    error = refused(listener)
    assert there in error.message
    assert error.message.startswith("worker (127.0.0.1:")


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"edgert": "0.0.9"}, f"edgert of worker is 0.0.9, wanted {edgert.__version__}"),
        ({"protocol": 2}, "protocol of worker is 2, wanted 1"),
        ({"host": "other"}, "host of worker is other, wanted worker"),
        ({"role": "a" * 200}, "greeting: a field is not what was wanted"),
        ({"protocol": True}, "greeting: a field is not what was wanted"),
    ],
)
def test_greetings_that_differ_are_refused_on_both_ends(
    listener: Listener, hub: Host, worker: Host, facts: dict[str, str | int], message: str
) -> None:
    right = asdict(Hello(edgert.__version__, 1, "worker", "worker"))
    with closing(raw_link(listener.address, worker.identity, hub.known)) as link:
        assert link.receive().kind is FrameKind.HELLO
        link.send(FrameKind.HELLO, json.dumps(right | facts).encode())
        with pytest.raises(LinkError, match=f"reports LinkError: {message}"):
            link.receive()
    assert message in refused(listener).message


def test_greetings_are_read_strictly() -> None:
    good = encode_hello(Hello("0.1.0", 1, "a", "b"))
    assert decode_hello(good) == Hello("0.1.0", 1, "a", "b")
    for wrong in (b"", b"[]", b"{}", good[:-1], good.replace(b"host", b"hoax"), b"\xff"):
        with pytest.raises(LinkError, match="greeting: "):
            decode_hello(wrong)


def plain(address: str) -> socket.socket:
    place = parse_address(address)
    return socket.create_connection((place.host, place.port), timeout=20)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"GET / HTTP/1.1\r\n\r\n", "does not speak TLS"),
        (b"EDGX" + bytes(16), "does not speak TLS"),
        (b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00", "127.0.0.1"),
        (b"", "closed the connection before its greeting"),
    ],
)
def test_who_speaks_no_tls_is_refused(listener: Listener, content: bytes, message: str) -> None:
    with plain(listener.address) as client:
        client.sendall(content)
        if not content:
            client.close()
        assert message in refused(listener).message


def test_tls_without_a_certificate_or_of_an_old_version_is_refused(listener: Listener) -> None:
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
    old.maximum_version = ssl.TLSVersion.TLSv1_2
    with plain(listener.address) as client, pytest.raises(ssl.SSLError):
        old.wrap_socket(client)
    assert "does not speak TLS 1.3" in refused(listener).message
    bare = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bare.check_hostname, bare.verify_mode = False, ssl.CERT_NONE
    with (
        plain(listener.address) as client,
        bare.wrap_socket(client) as link,
        pytest.raises(ssl.SSLError, match="certificate required"),
    ):
        link.recv(1)
    assert refused(listener, "shows no certificate").hint is None


def test_slow_strangers_hold_nobody_up(listener: Listener, hub: Host, worker: Host) -> None:
    strangers = [plain(listener.address) for _ in range(40)]
    link = connect(listener.address, worker.identity, hub.known, WORKER, PATIENT)
    greeted = listener.accept(20)
    assert greeted.peer == worker.known
    link.close()
    greeted.link.close()
    for stranger in strangers:
        stranger.close()


def test_listener_that_hears_nobody_says_whom_it_refused_last(listener: Listener) -> None:
    with pytest.raises(LinkTimeout, match=r"no host within 0\.01 s$"):
        listener.accept(0.01)
    with plain(listener.address) as client:
        client.sendall(b"hello hello hello")
        refused(listener)
    with pytest.raises(LinkTimeout, match=r"refused last: .* does not speak TLS"):
        listener.accept(0.01)


def test_closed_listener_lets_nobody_in_and_wakes_who_waits(hub: Host, worker: Host) -> None:
    listener = listen(ANY, hub.identity, [worker.known], HUB, SHORT)
    waiting: list[Future[Greeted]] = [in_thread(lambda: listener.accept(20)) for _ in range(2)]
    listener.close()
    for future in waiting:
        assert "the listener is closed" in str(future.exception(20))
    with pytest.raises(LinkError, match="cannot connect"):
        connect(listener.address, worker.identity, hub.known, WORKER, SHORT)


def test_peer_that_answers_nothing_is_a_timeout(hub: Host, worker: Host) -> None:
    limits = replace(SHORT, handshake_s=0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(LinkTimeout, match=r"hub .*: no greeting before the deadline"):
            connect(address, worker.identity, hub.known, WORKER, limits)
    with (
        closing(listen(ANY, hub.identity, [worker.known], HUB, limits)) as listener,
        plain(listener.address),
    ):
        assert isinstance(refused(listener), LinkTimeout)


@pytest.mark.parametrize("shift", [timedelta(days=30), timedelta(days=-7310)])
def test_certificates_of_another_time_are_refused_here_and_by_the_peer(
    hub: Host, worker: Host, shift: timedelta
) -> None:
    odd = make_host("odd", datetime.now(UTC) + shift)
    state = "not valid yet" if shift > timedelta(0) else "expired"
    with pytest.raises(ConfigError, match=f"certificate of this host is {state}"):
        listen(ANY, odd.identity, [worker.known], HUB, SHORT)
    with pytest.raises(ConfigError, match=f"certificate of odd is {state}"):
        connect("127.0.0.1:1", worker.identity, odd.known, WORKER, SHORT)
    with closing(listen(ANY, hub.identity, [odd.known], HUB, SHORT)) as listener:
        with pytest.raises(ConfigError, match=f"certificate of this host is {state}"):
            connect(listener.address, odd.identity, hub.known, WORKER, SHORT)
        # As from a host whose own clock is right by that certificate.
        with (
            closing(raw_link(listener.address, odd.identity, hub.known)) as link,
            pytest.raises(LinkError) as caught,
        ):
            link.receive()
        alert = caught.value.__cause__
        assert isinstance(alert, PeerAlert)
        assert "by its clock" in as_link_error(alert, "hub").message
        error = refused(listener)
        assert f"certificate of odd is {state}" in error.message
        assert "this host's clock says" in error.message


@pytest.mark.parametrize(
    "address", ["", "host", "host:", ":7000", "host:x", "host:70000", "::1:7000", "a b:1", "[::1]"]
)
def test_addresses_that_are_none_are_refused(hub: Host, worker: Host, address: str) -> None:
    with pytest.raises(ConfigError, match="wanted HOST:PORT"):
        listen(address, hub.identity, [worker.known], HUB)
    with pytest.raises(ConfigError, match="wanted HOST:PORT"):
        connect(address, worker.identity, hub.known, WORKER)


@pytest.mark.parametrize("address", [ANY, "0.0.0.0:0", "[::1]:0"])
def test_nothing_listens_where_nobody_is_trusted(hub: Host, address: str) -> None:
    nobody: list[TrustedPeer] = []
    with pytest.raises(ConfigError, match="nobody is trusted") as caught:
        listen(address, hub.identity, nobody, HUB)
    assert "edgert keys trust" in str(caught.value.hint)


def test_address_that_is_taken_is_named(listener: Listener, hub: Host, worker: Host) -> None:
    with pytest.raises(ConfigError, match=f"{listener.address}: cannot listen: "):
        listen(listener.address, hub.identity, [worker.known], HUB)
