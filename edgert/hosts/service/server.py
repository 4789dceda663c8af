"""A host that serves others: gRPC over mutual TLS, with the standard health service."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Self

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from edgert.errors import ConfigError, LinkError
from edgert.hosts.address import Address, parse_address
from edgert.hosts.certificates import check_time
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.service.admission import Admission
from edgert.hosts.service.calls import Calls
from edgert.hosts.service.channel_options import server_options
from edgert.hosts.service.handlers import Handlers
from edgert.hosts.service.limits import DEFAULT_SERVICE_LIMITS, ServiceLimits
from edgert.hosts.service.messages import SERVICE
from edgert.hosts.service.receiver import BlobReceiver

_SHORT_CALLS = 16  # at a time, beside those that are counted
_GRACE_S = 5.0


class ServiceServer:
    """Answers trusted hosts until it is closed; see `edgert.hosts.service.serve`."""

    def __init__(
        self,
        address: str,
        identity: HostIdentity,
        trusted: Sequence[TrustedPeer],
        handlers: Handlers,
        receiver: BlobReceiver,
        limits: ServiceLimits = DEFAULT_SERVICE_LIMITS,
    ) -> None:
        place = parse_address(address)
        if not trusted:
            raise ConfigError(
                f"{place}: nobody is trusted, so nobody could connect",
                hint="edgert keys trust NAME CERTIFICATE.pem",
            )
        check_time(identity.certificate_pem, "this host")
        n_calls = limits.most_calls + _SHORT_CALLS
        self._admission = Admission(trusted, limits.most_calls)
        self._calls = Calls(handlers, receiver, self._admission, limits)
        self._health = health.HealthServicer()
        self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self._threads = ThreadPoolExecutor(n_calls, "service-call")
        self._server = grpc.server(
            self._threads,
            handlers=[self._calls.handler()],
            options=server_options(limits, n_calls),
            maximum_concurrent_rpcs=n_calls,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._closing = threading.Lock()
        self.address = str(Address(place.host, self._listen(place, identity, trusted)))
        self._server.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def refusals(self) -> tuple[LinkError, ...]:
        """How the last calls that failed ended, oldest first; each names peer and cause."""
        return self._admission.refusals

    def drain(self) -> None:
        """Tell load balancers to send no one, and begin nothing long; running calls go on."""
        self._admission.drain()
        self._health.enter_graceful_shutdown()

    def close(self, grace_s: float = _GRACE_S) -> None:
        """Stop: running calls get `grace_s` seconds, then they are cancelled."""
        with self._closing:
            self.drain()
            self._server.stop(grace_s).wait()
            self._threads.shutdown(wait=False)
            self._calls.close()

    def _listen(
        self, place: Address, identity: HostIdentity, trusted: Sequence[TrustedPeer]
    ) -> int:
        """Return the port."""
        keys = grpc.ssl_server_credentials(
            [(identity.key_pem, identity.certificate_pem)],
            root_certificates=b"\n".join(peer.certificate_pem for peer in trusted),
            require_client_auth=True,
        )
        try:
            return self._server.add_secure_port(str(place), keys)
        except RuntimeError as error:
            raise ConfigError(
                f"{place}: cannot listen", hint="choose an address of this host, a free port"
            ) from error
