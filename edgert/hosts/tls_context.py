"""TLS as links use it: version 1.3, both sides with certificates, roots exactly those trusted."""

from __future__ import annotations

import os
import socket
import ssl
import time
from collections.abc import Iterable

from edgert.errors import FormatError
from edgert.hosts.address import Address
from edgert.hosts.certificates import SERVER_NAME, fingerprint_of
from edgert.hosts.identity import HostIdentity

_HALF = 32


def server_context(identity: HostIdentity, roots: Iterable[bytes]) -> ssl.SSLContext:
    """Return the context of who listens, for certificates in PEM.

    Raises:
        FormatError: OpenSSL does not take a certificate.
    """
    context = _context(ssl.PROTOCOL_TLS_SERVER, identity, roots)
    context.num_tickets = 0
    return context


def client_context(identity: HostIdentity, roots: Iterable[bytes]) -> ssl.SSLContext:
    """Return the context of who connects; the peer is checked by its key, not by a name.

    Raises:
        FormatError: OpenSSL does not take a certificate.
    """
    return _context(ssl.PROTOCOL_TLS_CLIENT, identity, roots)


def claimed_name(fingerprint: str) -> str:
    """Return the server name by which a client says which key it has.

    A server that refuses a certificate never gets to see it; with this it can name the key.
    """
    return f"{fingerprint[:_HALF]}.{fingerprint[_HALF:]}.{SERVER_NAME}"


def claimed_key(server_name: str | None) -> str | None:
    """Return the key that a client claims to have; proves nothing."""
    key = (server_name or "").removesuffix(f".{SERVER_NAME}").replace(".", "")
    return key if len(key) == 2 * _HALF and set(key) <= set("0123456789abcdef") else None


def proven_key(link: ssl.SSLSocket) -> str:
    """Return the fingerprint of the key that a peer has proven to have.

    Raises:
        FormatError: it has shown no certificate.
    """
    certificate = link.getpeercert(binary_form=True)
    if certificate is None:
        raise FormatError("no certificate")
    return fingerprint_of(certificate)


def ask_key(address: Address, until_s: float) -> str | None:
    """Ask a server for its key without telling anything, to name it in an error.

    Returns:
        The fingerprint; None if it does not answer so.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    left_s = max(0.01, until_s - time.monotonic())
    try:
        with (
            socket.create_connection(address, timeout=left_s) as plain,
            context.wrap_socket(plain, server_hostname=SERVER_NAME) as link,
        ):
            return proven_key(link)
    except (OSError, ValueError, FormatError):
        return None


def _context(kind: int, identity: HostIdentity, roots: Iterable[bytes]) -> ssl.SSLContext:
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_COMPRESSION | ssl.OP_NO_TICKET
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        _load_identity(context, identity)
        for root in roots:
            context.load_verify_locations(cadata=root.decode("ascii"))
    except (ssl.SSLError, ValueError) as error:
        raise FormatError(
            f"OpenSSL takes no such key or certificate: {error}",
            hint="edgert keys host makes an identity",
        ) from error
    return context


def _load_identity(context: ssl.SSLContext, identity: HostIdentity) -> None:
    """Hand over the key by a file in memory: OpenSSL's wrapper takes files only."""
    number = os.memfd_create("identity", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(number), "wb") as stream:
            stream.write(identity.key_pem + b"\n" + identity.certificate_pem)
        context.load_cert_chain(f"/proc/self/fd/{number}")
    finally:
        os.close(number)
