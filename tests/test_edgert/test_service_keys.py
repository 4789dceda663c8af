"""Who gets past the handshake of service links, and what is said to those who do not."""

from __future__ import annotations

import importlib.util
import re
import socket
import ssl
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import pytest

from edgert.errors import ConfigError, LinkError
from edgert.hosts.certificates import new_certificate
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.service import connect_service, serve
from edgert.hosts.service.messages import own_versions, path_of
from edgert.hosts.service.receiver import BlobReceiver
from edgert.hosts.service.require import REQUIREMENTS, require_grpc
from host_identities import Host, make_host
from service_hosts import LIMITS, FakeHandlers, Pair, pair_of

ROOT = Path(__file__).parent.parent.parent
LONG_AGO = datetime.now(UTC) - timedelta(days=30 * 365)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with pair_of(tmp_path) as pair:
        yield pair


def test_unknown_key_does_not_get_past_the_handshake(pair: Pair) -> None:
    stranger = make_host("home")  # the same name, another key
    with (
        connect_service(
            pair.server.address, stranger.identity, pair.worker.known, LIMITS
        ) as client,
        pytest.raises(LinkError, match=r"^worker .*does not trust this host's key") as caught,
    ):
        client.status()
    assert "edgert keys trust" in (caught.value.hint or "")
    assert pair.server.refusals == ()  # no call has begun


def test_links_and_uploads_of_an_unknown_key_fail_alike(pair: Pair) -> None:
    stranger = make_host("stranger").identity
    with connect_service(pair.server.address, stranger, pair.worker.known, LIMITS) as client:
        for call in (client.run, client.is_serving, lambda: list(client.open({}))):
            with pytest.raises(LinkError, match=r"^worker .*does not trust this host's key"):
                call()


def test_worker_with_another_key_is_refused_naming_both(pair: Pair) -> None:
    other = make_host("worker").known
    with (
        connect_service(pair.server.address, pair.home.identity, other, LIMITS) as client,
        pytest.raises(LinkError) as caught,
    ):
        client.status()
    assert pair.worker.known.fingerprint in caught.value.message
    assert other.fingerprint in caught.value.message


def test_caller_without_a_certificate_does_not_get_in(pair: Pair) -> None:
    keys = grpc.ssl_channel_credentials(pair.worker.identity.certificate_pem)
    options = [("grpc.ssl_target_name_override", "edgert")]
    with (
        grpc.secure_channel(pair.server.address, keys, options) as channel,
        pytest.raises(grpc.RpcError) as caught,
    ):
        channel.unary_unary(path_of("Status"))(b"{}", timeout=20, metadata=own_versions())
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_caller_without_tls_gets_nothing(pair: Pair) -> None:
    host, _, port = pair.server.address.rpartition(":")
    with socket.create_connection((host, int(port)), timeout=20) as plain:
        plain.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9))
        assert b"edgert" not in plain.recv(1 << 16)


def test_key_signed_by_a_trusted_one_is_not_trusted(pair: Pair) -> None:
    """A host's certificate is a root; what it vouches for still has another key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    imposter, own = make_host("imposter"), pair.home.identity
    key = serialization.load_pem_private_key(own.key_pem, None)
    theirs = x509.load_pem_x509_certificate(imposter.identity.certificate_pem)
    root = x509.load_pem_x509_certificate(own.certificate_pem)
    signed = (
        x509.CertificateBuilder(root.subject, theirs.subject, theirs.public_key(), 7)
        .not_valid_before(theirs.not_valid_before_utc)
        .not_valid_after(theirs.not_valid_after_utc)
        .sign(key, hashes.SHA256())  # type: ignore[arg-type] - it is a P-256 key
    )
    content = signed.public_bytes(serialization.Encoding.PEM)
    keys = grpc.ssl_channel_credentials(
        pair.worker.identity.certificate_pem, imposter.identity.key_pem, content
    )
    options = [("grpc.ssl_target_name_override", "edgert")]
    with (
        grpc.secure_channel(pair.server.address, keys, options) as channel,
        pytest.raises(grpc.RpcError),
    ):
        channel.unary_unary(path_of("Status"))(b"{}", timeout=20, metadata=own_versions())
    assert all("is not trusted" in refusal.message for refusal in pair.server.refusals)


def expired(host: Host) -> Host:
    """Give a host a certificate of long ago, for the key that it has."""
    own = host.identity
    certificate = new_certificate(own.key_pem, own.name, own.name, LONG_AGO)
    return Host(HostIdentity(own.name, certificate, own.key_pem, own.fingerprint))


def test_expired_certificates_are_refused_before_anything_is_sent(pair: Pair) -> None:
    old = expired(make_host("old"))
    with pytest.raises(ConfigError, match="this host is expired"):
        connect_service(pair.server.address, old.identity, pair.worker.known)
    with pytest.raises(ConfigError, match="certificate of old is expired"):
        connect_service(pair.server.address, pair.home.identity, old.known)
    with pytest.raises(ConfigError, match="this host is expired"):
        serve(
            "127.0.0.1:0", old.identity, [pair.home.known], FakeHandlers(),
            BlobReceiver(pair.folder),
        )  # fmt: skip


def test_expired_certificate_of_a_caller_does_not_get_in(tmp_path: Path) -> None:
    home = expired(make_host("home"))
    worker = make_host("worker")
    with serve(
        "127.0.0.1:0", worker.identity, [home.known], FakeHandlers(), BlobReceiver(tmp_path), LIMITS
    ) as server:
        keys = grpc.ssl_channel_credentials(
            worker.identity.certificate_pem, home.identity.key_pem, home.identity.certificate_pem
        )
        options = [("grpc.ssl_target_name_override", "edgert")]
        with (
            grpc.secure_channel(server.address, keys, options) as channel,
            pytest.raises(grpc.RpcError) as caught,
        ):
            channel.unary_unary(path_of("Status"))(b"{}", timeout=20, metadata=own_versions())
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_expired_certificate_of_a_worker_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks differ: the worker thinks it is valid; home looks at its clock in the handshake."""
    home, worker = make_host("home"), expired(make_host("worker"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("edgert.hosts.service.server.check_time", lambda *_: None)
        server = serve(
            "127.0.0.1:0", worker.identity, [home.known], FakeHandlers(), BlobReceiver(tmp_path),
            LIMITS,
        )  # fmt: skip
    monkeypatch.setattr("edgert.hosts.service.client.check_time", lambda *_: None)
    with (
        server,
        connect_service(server.address, home.identity, worker.known, LIMITS) as client,
        pytest.raises(LinkError, match=r"^worker .*certificate of worker is expired"),
    ):
        client.status()


@pytest.mark.parametrize("address", ["127.0.0.1:0", "0.0.0.0:0", "[::1]:0"])
def test_nothing_listens_where_nobody_is_trusted(tmp_path: Path, address: str) -> None:
    with pytest.raises(ConfigError, match="nobody is trusted"):
        serve(address, make_host("w").identity, [], FakeHandlers(), BlobReceiver(tmp_path))


def test_address_that_is_taken_is_named(pair: Pair) -> None:
    with pytest.raises(ConfigError, match=rf"^{re.escape(pair.server.address)}: cannot listen"):
        serve(
            pair.server.address, pair.worker.identity, [pair.home.known], FakeHandlers(),
            BlobReceiver(pair.folder),
        )  # fmt: skip


def test_address_where_nobody_listens_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    home, worker = make_host("home"), make_host("worker")
    with (
        connect_service(address, home.identity, worker.known, LIMITS) as client,
        pytest.raises(LinkError, match=rf"^worker \({address}\): cannot connect: .*refused"),
    ):
        client.status()


def test_peer_that_speaks_no_grpc_is_a_link_error() -> None:
    """It has the right key, and ends every connection behind its handshake."""
    home, worker = make_host("home"), make_host("worker")
    answer = _end_connections(worker, home.known)
    with (
        connect_service(next(answer), home.identity, worker.known, LIMITS) as client,
        pytest.raises(LinkError, match=r"^worker "),
    ):
        client.status()
    answer.close()  # type: ignore[attr-defined] - it is a generator


def _end_connections(worker: Host, home: TrustedPeer) -> Iterator[str]:
    from edgert.hosts.tls_context import server_context
    from host_identities import in_thread

    context = server_context(worker.identity, [home.certificate_pem])
    context.set_alpn_protocols(["h2"])
    with socket.create_server(("127.0.0.1", 0)) as server:

        def take() -> None:
            while True:
                plain, _ = server.accept()
                try:
                    context.wrap_socket(plain, server_side=True).close()
                except (OSError, ssl.SSLError):
                    plain.close()

        in_thread(take)
        yield f"127.0.0.1:{server.getsockname()[1]}"
        server.shutdown(socket.SHUT_RDWR)


def test_there_is_no_insecure_channel_anywhere() -> None:
    sources = sorted((ROOT / "edgert").rglob("*.py"))
    assert [path for path in sources if re.search(r"insecure|local_.*cred", path.read_text())] == []


def test_missing_grpc_is_an_error_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ConfigError, match="not installed") as caught:
        require_grpc()
    hint = caught.value.hint or ""
    assert hint.startswith(f"{sys.executable} -m pip install 'grpcio>=")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(REQUIREMENTS) <= set(project["optional-dependencies"]["hosts"])


def test_everything_but_service_links_is_imported_without_grpc() -> None:
    code = (
        "import sys, importlib, pkgutil, edgert\n"
        "sys.modules['grpc'] = sys.modules['grpc_health'] = None\n"
        "import edgert.hosts, edgert.hosts.service, edgert.hosts.service.receiver\n"
        "import edgert.hosts.service.messages, edgert.hosts.listener, edgert.cli.main, edgert.api\n"
        "for module in pkgutil.iter_modules(edgert.hosts.__path__):\n"
        "    importlib.import_module(f'edgert.hosts.{module.name}')\n"
        "print('done')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )  # fmt: skip
    assert (done.stdout, done.stderr) == ("done\n", "")
