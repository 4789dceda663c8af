"""Service links over gRPC: control, transfer of packed shards, and streams behind load balancers.

gRPC is an extra (`edgert[hosts]`) and is loaded by what needs it only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.service.handlers import Handlers
from edgert.hosts.service.limits import DEFAULT_SERVICE_LIMITS, ServiceLimits
from edgert.hosts.service.require import require_grpc

if TYPE_CHECKING:
    from edgert.hosts.service.client import ServiceClient
    from edgert.hosts.service.receiver import BlobReceiver
    from edgert.hosts.service.server import ServiceServer


def serve(
    address: str,
    identity: HostIdentity,
    trusted: Sequence[TrustedPeer],
    handlers: Handlers,
    receiver: BlobReceiver,
    limits: ServiceLimits = DEFAULT_SERVICE_LIMITS,
) -> ServiceServer:
    """Answer trusted hosts until `close`; mutual TLS, whatever the address.

    Args:
        address: HOST:PORT; port 0 lets the system choose.
        identity: This host's.
        trusted: Who is let in; at least one.
        handlers: What this host does when it is asked.
        receiver: Takes blobs.
        limits: Of calls and links.

    Raises:
        ConfigError: gRPC is not installed, nobody is trusted, this host's certificate is not valid
            by its clock, or the address cannot be listened on.
    """
    require_grpc()
    from edgert.hosts.service.server import ServiceServer

    return ServiceServer(address, identity, trusted, handlers, receiver, limits)


def connect_service(
    address: str,
    identity: HostIdentity,
    peer: TrustedPeer,
    limits: ServiceLimits = DEFAULT_SERVICE_LIMITS,
) -> ServiceClient:
    """Return a client of a host that serves; nothing is sent before the first call.

    Args:
        address: HOST:PORT, of the host or of what balances the load of several with one identity.
        identity: This host's.
        peer: The one key that is accepted.
        limits: Of calls and links.

    Raises:
        ConfigError: gRPC is not installed, no address, or a certificate that is not valid by this
            host's clock.
    """
    require_grpc()
    from edgert.hosts.service.client import ServiceClient

    return ServiceClient(address, identity, peer, limits)
