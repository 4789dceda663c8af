"""Links to other hosts over mutual TLS 1.3: connecting, and both sides of the greeting.

Nothing here works without keys. Who listens speaks first once it knows the peer's key, so that who
connects learns why it was refused.
"""

from __future__ import annotations

import errno
import socket
import ssl
import time
from collections.abc import Mapping
from typing import NamedTuple

from edgert.errors import ConfigError, EdgertError, FormatError, LinkError, LinkTimeout
from edgert.hosts.address import Address, parse_address
from edgert.hosts.certificates import check_certificate, check_time
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.frames import FrameKind
from edgert.hosts.hello import Hello, Terms, check_hello, decode_hello, encode_hello, own_hello
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.link import DEFAULT_LIMITS, Link, LinkLimits
from edgert.hosts.tls_channel import PeerAlert, TlsChannel, set_up_socket
from edgert.hosts.tls_context import (
    ask_key,
    claimed_name,
    client_context,
    proven_key,
)

_MOST_HELLO_BYTES = 4 << 10
_NOT_YET_VALID, _EXPIRED = 9, 10  # X509_V_ERR_*
_ALERTS: Mapping[str, str] = {
    "TLSV1_ALERT_UNKNOWN_CA": "does not trust this host's key",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "wants a certificate",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "says this host's certificate has expired, by its clock",
    "SSLV3_ALERT_BAD_CERTIFICATE": "says this host's certificate is not valid, by its clock",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": "does not accept this host's certificate",
    "TLSV1_ALERT_DECRYPT_ERROR": "cannot read what arrived; it was changed on the way",
    "SSLV3_ALERT_BAD_RECORD_MAC": "cannot read what arrived; it was changed on the way",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "sent what was changed on the way",
    "TLSV1_ALERT_PROTOCOL_VERSION": "does not speak TLS 1.3",
    "UNSUPPORTED_PROTOCOL": "does not speak TLS 1.3",
    "WRONG_VERSION_NUMBER": "does not speak TLS",
    "HTTP_REQUEST": "does not speak TLS",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "shows no certificate",
}
_HINTS: Mapping[str, str] = {
    "TLSV1_ALERT_UNKNOWN_CA": "on that host: edgert keys trust NAME CERTIFICATE.pem, with this "
    "host's certificate (edgert keys host prints its path)",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "compare the clocks of both hosts",
    "SSLV3_ALERT_BAD_CERTIFICATE": "compare the clocks of both hosts",
}
_UNTRUSTED = "edgert keys trust NAME CERTIFICATE.pem, if that is the host you mean"


class Greeted(NamedTuple):
    """A peer that proved its key and said who it is."""

    link: Link
    peer: TrustedPeer
    hello: Hello


def connect(
    address: str,
    identity: HostIdentity,
    peer: TrustedPeer,
    terms: Terms,
    limits: LinkLimits = DEFAULT_LIMITS,
) -> Link:
    """Connect to a host whose key is known.

    Args:
        address: HOST:PORT.
        identity: This host's.
        peer: The one key that is accepted.
        terms: What this host is, and wants of the peer.
        limits: Of the link.

    Raises:
        ConfigError: no address, or a certificate that is not valid by this host's clock.
        LinkError: not reachable, another key, refused by the peer, or different from what is
            wanted; names peer and cause.
        LinkTimeout: no answer before the deadline.
    """
    place = parse_address(address)
    until_s = time.monotonic() + limits.handshake_s
    check_time(peer.certificate_pem, peer.name)
    check_time(identity.certificate_pem, "this host")
    name = f"{peer.name} ({place})"
    link = _dial(place, name, limits, until_s)
    try:
        context = client_context(identity, [peer.certificate_pem])
        secure = context.wrap_socket(
            link, do_handshake_on_connect=False, server_hostname=claimed_name(identity.fingerprint)
        )
    except (OSError, ValueError, EdgertError) as error:
        link.close()
        raise as_link_error(error, name) from error
    try:
        secure.settimeout(left(until_s))
        secure.do_handshake()
        check_key(proven_key(secure), peer, name)
    except (OSError, ValueError, FormatError, LinkError) as error:
        secure.close()
        if isinstance(error, ssl.SSLCertVerificationError):
            raise _unknown(error, peer, name, ask_key(place, until_s)) from error
        raise as_link_error(error, name) from error
    framed = FramedLink(TlsChannel(secure), name, limits)
    _greet_listener(framed, peer, own_hello(terms, identity.name), terms, until_s)
    return framed


def greet_client(
    link: FramedLink, peer: TrustedPeer, own: Hello, terms: Terms, until_s: float
) -> Hello:
    """Greet a peer that connected and proved its key.

    Raises:
        LinkError: what it said differs from what is wanted; both ends know why.
        LinkTimeout: it said nothing.
    """
    link.send(FrameKind.HELLO, encode_hello(own))
    hello = _hear(link, peer, own, terms, until_s)
    link.send(FrameKind.READY)
    return hello


def check_key(saw: str, peer: TrustedPeer, name: str) -> None:
    """Refuse a key other than the peer's.

    Raises:
        LinkError: names both fingerprints.
    """
    if saw != peer.fingerprint:
        raise LinkError(
            f"{name}: has key {saw}, wanted {peer.name}'s {peer.fingerprint}", hint=_UNTRUSTED
        )


def as_link_error(error: Exception, name: str) -> LinkError:
    """Return what a failed connection or handshake means."""
    if isinstance(error, LinkError):
        return error
    if isinstance(error, TimeoutError):
        return LinkTimeout(
            f"{name}: no greeting before the deadline",
            hint="it may be busy, or there is no edgert at that address",
        )
    reason = (error.reason or "") if isinstance(error, ssl.SSLError | PeerAlert) else ""
    if reason in _ALERTS:
        return LinkError(f"{name}: {_ALERTS[reason]}", hint=_HINTS.get(reason))
    if isinstance(error, ssl.SSLEOFError):
        return LinkError(f"{name}: closed the connection before its greeting")
    if isinstance(error, EdgertError):
        return LinkError(f"{name}: {error.message}", hint=error.hint)
    said = error.strerror if isinstance(error, OSError) else None
    return LinkError(f"{name}: {said or error}")


def left(until_s: float) -> float:
    """Return the seconds until a time of `time.monotonic`.

    Raises:
        TimeoutError: there are none.
    """
    left_s = until_s - time.monotonic()
    if left_s <= 0:
        raise TimeoutError(errno.ETIMEDOUT, "the deadline has passed")
    return left_s


def time_problem(error: ssl.SSLCertVerificationError, certificate_pem: bytes, whose: str) -> str:
    """Return what is wrong with the time of a certificate that OpenSSL refused, or nothing."""
    if error.verify_code in (_NOT_YET_VALID, _EXPIRED):
        try:
            check_time(certificate_pem, whose)
        except ConfigError as problem:
            return problem.message
    return ""


def _dial(place: Address, name: str, limits: LinkLimits, until_s: float) -> socket.socket:
    try:
        link = socket.create_connection(place, timeout=left(until_s))
    except UnicodeError as error:  # labels that are empty or too long
        raise ConfigError(f"{place}: no name of a host", hint="HOST:PORT") from error
    except TimeoutError as error:
        raise LinkTimeout(f"{name}: no answer within {limits.handshake_s:g} s") from error
    except OSError as error:
        raise LinkError(
            f"{name}: cannot connect: {error.strerror or error}",
            hint="start edgert there, or correct the address",
        ) from error
    set_up_socket(link, limits.deadline_s)
    return link


def _greet_listener(
    link: FramedLink, peer: TrustedPeer, own: Hello, terms: Terms, until_s: float
) -> None:
    try:
        _hear(link, peer, own, terms, until_s)
        link.send(FrameKind.HELLO, encode_hello(own))
        link.receive_into(FrameKind.READY, bytearray(), until_s - time.monotonic())
    except LinkError as error:
        cause = error.__cause__
        if isinstance(cause, PeerAlert) and cause.reason in _ALERTS:
            raise as_link_error(cause, link.peer) from error
        raise


def _hear(link: FramedLink, peer: TrustedPeer, own: Hello, terms: Terms, until_s: float) -> Hello:
    """Take the peer's greeting and check it; a refusal is told to the peer."""
    words = bytearray(_MOST_HELLO_BYTES)
    n_bytes = link.receive_into(FrameKind.HELLO, words, until_s - time.monotonic())
    host, _ = check_certificate(peer.certificate_pem, peer.name)
    try:
        hello = decode_hello(words[:n_bytes])
        check_hello(hello, own, terms, host)
    except LinkError as error:
        link.fail(error)
        raise LinkError(f"{link.peer}: {error.message}", hint=error.hint) from error
    return hello


def _unknown(
    error: ssl.SSLCertVerificationError, peer: TrustedPeer, name: str, saw: str | None
) -> LinkError:
    problem = time_problem(error, peer.certificate_pem, peer.name)
    if problem:
        return LinkError(f"{name}: {problem}", hint="compare the clocks of both hosts")
    key = "a key that is not trusted" if saw is None else f"key {saw}"
    return LinkError(
        f"{name}: has {key}, wanted {peer.fingerprint} ({error.verify_message})", hint=_UNTRUSTED
    )
