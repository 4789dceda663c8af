"""Identities of hosts: who can read them, whom they trust, and what is no certificate."""

from __future__ import annotations

import json
import ssl
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from edgert.cli import main
from edgert.errors import ConfigError, FormatError
from edgert.hosts.certificates import check_certificate
from edgert.hosts.identity import (
    create_identity,
    find_peer,
    forget,
    load_identity,
    trust,
    trusted_peers,
)
from edgert.signing import new_key
from host_identities import make_host, write_identity

PEM = serialization.Encoding.PEM
NOW = datetime(2026, 5, 1, tzinfo=UTC)


def test_identity_is_its_owners_only_and_is_read_again(tmp_path: Path) -> None:
    made = create_identity(tmp_path / "hosts", "kitchen-1")
    assert stat.S_IMODE((tmp_path / "hosts/key.pem").stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "hosts").stat().st_mode) == 0o700
    assert load_identity(tmp_path / "hosts") == made
    assert made.name == "kitchen-1"
    assert "PRIVATE" not in repr(made)
    with pytest.raises(ConfigError, match="has an identity already"):
        create_identity(tmp_path / "hosts", "kitchen-1")


def test_fingerprint_is_the_hash_of_the_public_key_and_survives_a_new_certificate(
    tmp_path: Path,
) -> None:
    made = create_identity(tmp_path, "one")
    certificate = x509.load_pem_x509_certificate(made.certificate_pem)
    spki = certificate.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    digest = hashes.Hash(hashes.SHA256())
    digest.update(spki)
    assert made.fingerprint == digest.finalize().hex()
    (tmp_path / "certificate.pem").unlink()
    again = create_identity(tmp_path, "one")  # as after an interruption between both files
    assert again.fingerprint == made.fingerprint
    assert again.certificate_pem != made.certificate_pem


def test_certificate_is_its_own_root_for_twenty_years_and_from_some_days_ago() -> None:
    host = make_host("one", NOW)
    certificate = x509.load_pem_x509_certificate(host.identity.certificate_pem)
    assert NOW - certificate.not_valid_before_utc == timedelta(days=7)
    lasts = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert lasts == timedelta(days=7300)
    constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert (constraints.critical, constraints.value) == (True, x509.BasicConstraints(True, 0))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["edgert", "one"]
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=host.identity.certificate_pem.decode())
    assert context.cert_store_stats() == {"x509": 1, "crl": 0, "x509_ca": 1}


@pytest.mark.parametrize("name", ["", "-a", "A", "a b", "a/b", "..", "ä", "a" * 65, "a\n"])
def test_names_that_are_none_are_refused(tmp_path: Path, name: str) -> None:
    certificate = make_host("one").identity.certificate_pem
    for act in (
        lambda: create_identity(tmp_path / "new", name),
        lambda: trust(tmp_path, name, certificate),
        lambda: forget(tmp_path, name),
    ):
        with pytest.raises(ConfigError, match="host name"):
            act()
    assert list(tmp_path.iterdir()) == []


def test_trusted_hosts_are_listed_found_and_forgotten(tmp_path: Path) -> None:
    hosts = {name: make_host(name) for name in ("b", "a")}
    for name, host in hosts.items():
        assert trust(tmp_path, name, host.identity.certificate_pem) == host.known
    peers = trusted_peers(tmp_path)
    assert [peer.name for peer in peers] == ["a", "b"]
    assert find_peer(peers, "a") == find_peer(peers, hosts["a"].identity.fingerprint)
    with pytest.raises(ConfigError, match="no trusted host has the name or key c"):
        find_peer(peers, "c")
    forget(tmp_path, "a")
    assert trusted_peers(tmp_path) == (hosts["b"].known,)
    with pytest.raises(ConfigError, match="a is not trusted"):
        forget(tmp_path, "a")
    assert trusted_peers(tmp_path / "nowhere") == ()


def test_one_name_has_one_key_and_one_key_one_name(tmp_path: Path) -> None:
    first, second = make_host("first"), make_host("second")
    trust(tmp_path, "a", first.identity.certificate_pem)
    trust(tmp_path, "a", first.identity.certificate_pem)
    with pytest.raises(
        ConfigError, match=f"a is trusted already, with key {first.known.fingerprint}"
    ):
        trust(tmp_path, "a", second.identity.certificate_pem)
    with pytest.raises(ConfigError, match="b would have"):
        trust(tmp_path, "b", first.identity.certificate_pem)
    assert [peer.name for peer in trusted_peers(tmp_path)] == ["a"]
    (tmp_path / "trusted/b.pem").write_bytes(first.identity.certificate_pem)
    with pytest.raises(ConfigError, match="a and b have the same key"):
        trusted_peers(tmp_path)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (NOW + timedelta(days=9), r"not valid yet: it is from 2026-05-03 .*clock says 2026-05-01"),
        (NOW - timedelta(days=7301), r"expired: it was valid until 2026-04-\d\d .*2026-05-01"),
    ],
)
def test_certificate_of_another_time_says_whose_clock_says_what(
    tmp_path: Path, made: datetime, message: str
) -> None:
    host = make_host("late", made)
    with pytest.raises(ConfigError, match=f"certificate of late is {message}"):
        trust(tmp_path, "late", host.identity.certificate_pem, NOW)
    write_identity(host, tmp_path)
    with pytest.raises(ConfigError, match=rf"certificate of this host .*{message}"):
        load_identity(tmp_path, NOW)


def test_keys_that_others_can_read_are_refused(tmp_path: Path) -> None:
    create_identity(tmp_path, "one")
    (tmp_path / "key.pem").chmod(0o640)
    with pytest.raises(ConfigError, match=r"key\.pem: others than its owner can read") as caught:
        load_identity(tmp_path)
    assert "chmod 600" in str(caught.value.hint)


@pytest.mark.parametrize("name", ["key.pem", "certificate.pem", "trusted", "trusted/a.pem"])
def test_links_out_of_the_folder_are_not_followed(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "hosts"
    create_identity(folder, "one")
    trust(folder, "a", make_host("a").identity.certificate_pem)
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="a link to another place"):
        (load_identity(folder), trusted_peers(folder))


def test_key_of_another_certificate_is_refused(tmp_path: Path) -> None:
    write_identity(make_host("one"), tmp_path)
    (tmp_path / "certificate.pem").write_bytes(make_host("one").identity.certificate_pem)
    with pytest.raises(FormatError, match="not the key of the certificate beside it"):
        load_identity(tmp_path)
    new_key(tmp_path / "ed25519.pem")
    (tmp_path / "ed25519.pem").replace(tmp_path / "key.pem")
    with pytest.raises(FormatError, match="not an ECDSA P-256 key"):
        load_identity(tmp_path)


def foreign(name: str = "one", *, curve: bool = True, ca: bool = True, own: bool = True) -> bytes:
    """Make a certificate that lacks something."""
    key = ec.generate_private_key(ec.SECP256R1())
    public = (key if curve else ed25519.Ed25519PrivateKey.generate()).public_key()
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer = subject if own else x509.Name([])
    return (
        x509.CertificateBuilder(subject_name=subject, issuer_name=issuer, public_key=public)
        .serial_number(1)
        .not_valid_before(NOW)
        .not_valid_after(NOW + timedelta(days=9))
        .add_extension(x509.BasicConstraints(ca, 0 if ca else None), critical=True)
        .sign(key, hashes.SHA256())
        .public_bytes(PEM)
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a certificate of a host"),
        (b"-----BEGIN CERTIFICATE-----\nQUJD\n-----END CERTIFICATE-----\n", "not a certificate"),
        (foreign(curve=False), "its key is not ECDSA P-256"),
        (foreign(ca=False), "it is not its own root"),
        (foreign(own=False), "not a certificate of a host"),
        (foreign("No Name"), "its common name is no host's"),
        (foreign() * 2, "2 certificates, wanted one"),
        (b"x" * (1 << 17), "more than 65,536 bytes"),
    ],
    ids=range(8),
)
def test_what_is_no_certificate_of_a_host_is_never_trusted(
    tmp_path: Path, content: bytes, message: str
) -> None:
    with pytest.raises(FormatError, match=message):
        trust(tmp_path, "one", content, NOW)
    assert trusted_peers(tmp_path) == ()
    (tmp_path / "trusted").mkdir(exist_ok=True)
    (tmp_path / "trusted/one.pem").write_bytes(content)
    with pytest.raises(FormatError):
        trusted_peers(tmp_path)


def test_flipped_bits_of_a_certificate_never_leave_its_key_trusted() -> None:
    content = make_host("one").identity.certificate_pem
    found = x509.load_pem_x509_certificate(content).public_bytes(serialization.Encoding.DER)
    for position in range(0, len(found), 3):
        flipped = bytearray(found)
        flipped[position] ^= 0x10
        with pytest.raises(FormatError):
            check_certificate(ssl.DER_cert_to_PEM_cert(bytes(flipped)).encode(), "one")


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_keys_command_makes_shows_trusts_lists_and_forgets(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    code, out, err = outcome(capsys, "keys", "host", "near")
    own = load_identity(tmp_path / "hosts")
    path = tmp_path / "hosts/certificate.pem"
    assert (code, out) == (0, f"near  {own.fingerprint}\n{path}\n")
    assert "edgert keys trust near certificate.pem" in err
    facts = {"name": "near", "fingerprint": own.fingerprint}
    shown = json.loads(outcome(capsys, "keys", "host", "--json")[1])
    assert shown == {**facts, "certificate": str(path)}
    far = make_host("far")
    (tmp_path / "far.pem").write_bytes(far.identity.certificate_pem)
    line = f"far  {far.known.fingerprint}\n"
    assert outcome(capsys, "keys", "trust", "far", str(tmp_path / "far.pem")) == (0, line, "")
    both = (0, f"near  {own.fingerprint}  (this host)\n{line}", "")
    assert outcome(capsys, "keys", "list") == both
    listed = json.loads(outcome(capsys, "keys", "list", "--json")[1])
    assert listed["host"] == facts
    assert [peer["name"] for peer in listed["trusted"]] == ["far"]
    assert outcome(capsys, "keys", "forget", "far") == (0, "far\n", "")
    assert outcome(capsys, "keys", "forget", "far")[0] == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["host", "Near"], "host name 'Near'"),
        (["trust", "far"], "no certificate named"),
        (["trust", "far", "gone.pem"], "gone.pem: cannot read the certificate"),
        (["forget"], "wanted forget and a name"),
        (["list", "far"], "takes nothing more"),
        (["host", "near", "more"], "takes one name"),
    ],
)
def test_keys_command_names_what_is_wrong(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, out, err = outcome(capsys, "keys", *arguments)
    assert (code, out) == (2, "")
    assert message in err


def test_host_has_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "keys", "host", "near")[0] == 0
    code, _, err = outcome(capsys, "keys", "host", "other")
    assert code == 2
    assert "this host is near already" in err
