"""Makes and checks the certificates of hosts: self-signed, ECDSA P-256.

A certificate is its own root, and trust is in its key: see `fingerprint_of`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from edgert.errors import ConfigError, FormatError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate, CertificateBuilder

SERVER_NAME = "edgert"  # every certificate is valid for it, whatever the address

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}")
_BACKDATED = timedelta(days=7)  # clocks of boards without a battery are late
_VALID = timedelta(days=20 * 365)
_NOT_ONE = "edgert keys host prints the path of a host's certificate"


def check_name(name: str) -> str:
    """Return a host's name if it is one.

    Raises:
        ConfigError: it is none.
    """
    if not _NAME.fullmatch(name):
        raise ConfigError(
            f"host name {name[:80]!r}, wanted a-z, 0-9, dot, dash and underscore, 64 at most",
            hint="choose a name such as kitchen-1",
        )
    return name


def new_key() -> bytes:
    """Make a private key in PEM. ECDSA P-256, because gRPC's TLS takes no Ed25519."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1()).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def new_certificate(key_pem: bytes, name: str, place: str, now: datetime | None = None) -> bytes:
    """Make the certificate of a key in PEM.

    Args:
        key_pem: Of `new_key`.
        name: The host's.
        place: Where the key is from, for errors.
        now: The time it is made at (default: the clock's).

    Raises:
        FormatError: the key is none.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.x509.oid import NameOID

    key = _private_key(key_pem, place)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, check_name(name))])
    start = (now or datetime.now(UTC)) - _BACKDATED
    builder = (
        x509.CertificateBuilder(subject_name=subject, issuer_name=subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + _VALID)
    )
    signed = _extended(builder, key, name).sign(key, hashes.SHA256())
    return signed.public_bytes(serialization.Encoding.PEM)


def _extended(
    builder: CertificateBuilder, key: EllipticCurvePrivateKey, name: str
) -> CertificateBuilder:
    """Add what OpenSSL and BoringSSL want of a root that is its own leaf."""
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    usage = x509.KeyUsage(
        digital_signature=True, key_cert_sign=True, content_commitment=False,
        key_encipherment=False, data_encipherment=False, key_agreement=False, crl_sign=False,
        encipher_only=False, decipher_only=False,
    )  # fmt: skip
    purposes = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    names = dict.fromkeys((SERVER_NAME, name))
    public = key.public_key()
    return (
        builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        .add_extension(x509.SubjectAlternativeName(map(x509.DNSName, names)), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
    )


def check_certificate(certificate_pem: bytes, place: str) -> tuple[str, str]:
    """Return host name and fingerprint of a certificate of `new_certificate`.

    Raises:
        FormatError: it is another sort of certificate, or none.
    """
    certificate = _read(certificate_pem, place)
    with _refused(place):
        name = _host_name(certificate)
        certificate.verify_directly_issued_by(certificate)
        return name, fingerprint_of(_der(certificate))


def check_key(key_pem: bytes, certificate_pem: bytes, place: str) -> None:
    """Refuse a private key that is none, or another than the certificate's.

    Raises:
        FormatError: names the file.
    """
    public = _private_key(key_pem, place).public_key()
    if public != _read(certificate_pem, place).public_key():
        raise FormatError(
            "not the key of the certificate beside it",
            path=place,
            hint="restore both, or move both away and make a new identity: edgert keys host",
        )


def check_time(certificate_pem: bytes, whose: str, now: datetime | None = None) -> None:
    """Refuse a certificate that is not valid yet, or not any more.

    Args:
        certificate_pem: Of `new_certificate`.
        whose: The host's name, for errors.
        now: What this host's clock says (default: the clock).

    Raises:
        ConfigError: says what the clock says, and what the certificate does.
    """
    certificate = _read(certificate_pem, whose)
    now = now or datetime.now(UTC)
    start, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if start <= now <= end:
        return
    state = "not valid yet: it is from" if now < start else "expired: it was valid until"
    raise ConfigError(
        f"certificate of {whose} is {state} {_day(start if now < start else end)}, "
        f"this host's clock says {_day(now)}",
        hint="set the clock of this host, or of the host that made the certificate and make it "
        "again",
    )


def fingerprint_of(certificate_der: bytes) -> str:
    """Return the SHA-256 of the public key of a certificate (DER SubjectPublicKeyInfo) as hex.

    Raises:
        FormatError: it is no certificate.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    with _refused("certificate"):
        key = x509.load_der_x509_certificate(certificate_der).public_key()
        spki = key.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    return hashlib.sha256(spki).hexdigest()


def _read(certificate_pem: bytes, place: str) -> Certificate:
    from cryptography import x509

    with _refused(place):
        found = x509.load_pem_x509_certificates(certificate_pem)
    if len(found) != 1:
        raise FormatError(f"{len(found)} certificates, wanted one", path=place, hint=_NOT_ONE)
    return found[0]


def _host_name(certificate: Certificate) -> str:
    """Return the name, or raise ValueError with what is wrong."""
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509 import BasicConstraints
    from cryptography.x509.oid import NameOID

    key = certificate.public_key()
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise ValueError("its key is not ECDSA P-256")  # noqa: TRY004 - of content, not of a call
    constraints = certificate.extensions.get_extension_for_class(BasicConstraints).value
    if not constraints.ca or constraints.path_length != 0:
        raise ValueError("it is not its own root")
    names = certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if len(names) != 1 or not _NAME.fullmatch(str(names[0].value)):
        raise ValueError("its common name is no host's")
    return str(names[0].value)


def _private_key(key_pem: bytes, place: str) -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    hint = "restore it, or move it away and make a new identity: edgert keys host"
    with _refused(place, "not a private key of a host", hint):
        key = serialization.load_pem_private_key(key_pem, password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey) or not isinstance(key.curve, ec.SECP256R1):
        raise FormatError("not an ECDSA P-256 key", path=place, hint=hint)
    return key


@contextmanager
def _refused(
    place: str, what: str = "not a certificate of a host", hint: str = _NOT_ONE
) -> Iterator[None]:
    """Turn what `cryptography` raises for what it cannot read, or disproves, into FormatError."""
    from cryptography import x509
    from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

    wrong = (
        ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion, x509.DuplicateExtension,
        x509.ExtensionNotFound, x509.UnsupportedGeneralNameType,
    )  # fmt: skip
    try:
        yield
    except InvalidSignature as error:
        raise FormatError(f"{what}: not signed by its own key", path=place, hint=hint) from error
    except wrong as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise FormatError(f"{what}: {reason}", path=place, hint=hint) from error


def _der(certificate: Certificate) -> bytes:
    from cryptography.hazmat.primitives import serialization

    return certificate.public_bytes(serialization.Encoding.DER)


def _day(time: datetime) -> str:
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")
