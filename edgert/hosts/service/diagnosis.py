"""Finds out why a host cannot be reached: of handshakes gRPC says little, OpenSSL all."""

from __future__ import annotations

import socket
import ssl
import time

from edgert.errors import EdgertError, LinkError
from edgert.hosts.address import Address
from edgert.hosts.certificates import SERVER_NAME
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.tls_channel import PeerAlert
from edgert.hosts.tls_context import ask_key, client_context, proven_key
from edgert.hosts.tls_link import as_link_error, check_key, left, time_problem


def diagnose(
    place: Address, identity: HostIdentity, peer: TrustedPeer, deadline_s: float
) -> LinkError | None:
    """Return why mutual TLS with a peer fails, naming it; None if it does not fail just now."""
    name = f"{peer.name} ({place})"
    until_s = time.monotonic() + deadline_s
    try:
        plain = socket.create_connection(place, timeout=left(until_s))
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return LinkError(
            f"{name}: cannot connect: {reason or error}",
            hint="start edgert there, or correct the address",
        )
    try:
        context = client_context(identity, [peer.certificate_pem])
        context.set_alpn_protocols(["h2"])
        with context.wrap_socket(plain, server_hostname=SERVER_NAME) as link:
            check_key(proven_key(link), peer, name)
            link.settimeout(left(until_s))
            if not link.recv(1):  # gRPC refuses a client after its handshake, without a word
                return LinkError(
                    f"{name}: ended the handshake: it does not trust this host's key, or says that "
                    "this host's certificate is not valid by its clock",
                    hint="on that host: edgert keys trust NAME CERTIFICATE.pem, with this host's "
                    "certificate; and compare the clocks of both hosts",
                )
    except ssl.SSLCertVerificationError as error:
        problem = time_problem(error, peer.certificate_pem, peer.name)
        if problem:
            return LinkError(f"{name}: {problem}", hint="compare the clocks of both hosts")
        saw = ask_key(place, until_s)
        key = "a key that is not trusted" if saw is None else f"key {saw}"
        return LinkError(
            f"{name}: has {key}, wanted {peer.fingerprint}",
            hint="edgert keys trust NAME CERTIFICATE.pem, if that is the host you mean",
        )
    except ssl.SSLError as error:
        return as_link_error(PeerAlert(error), name)
    except TimeoutError:
        return None
    except (OSError, ValueError, EdgertError) as error:
        return as_link_error(error, name)
    finally:
        plain.close()
    return None
