"""Calls a host that serves: one method for each of its own, every wait with a deadline."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from edgert.errors import LinkError
from edgert.hosts.address import parse_address
from edgert.hosts.certificates import check_time
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.service.channel_options import client_options
from edgert.hosts.service.client_link import open_link
from edgert.hosts.service.diagnosis import diagnose
from edgert.hosts.service.handlers import BlobState, OfferedBlob
from edgert.hosts.service.limits import DEFAULT_SERVICE_LIMITS, ServiceLimits, disk_s
from edgert.hosts.service.messages import (
    SERVICE,
    check_versions,
    decode,
    decode_states,
    encode,
    encode_offer,
    path_of,
    routed,
)
from edgert.hosts.service.statuses import is_unreachable, link_error
from edgert.hosts.service.upload import Upload
from edgert.packing.blobs import Blob

_CHECK = "/grpc.health.v1.Health/Check"


def _never() -> bool:
    return False


def _unheard(n_bytes: int) -> None:
    del n_bytes


class ServiceClient:
    """A connection to one host, made at the first call and again after it broke.

    Calls may be made by several threads; each raises LinkError, naming peer and cause, or
    LinkTimeout. See `edgert.hosts.service.connect_service`.

    Attributes:
        session: Calls from now on belong to it, so that a balancer sends all to one replica.
    """

    def __init__(
        self,
        address: str,
        identity: HostIdentity,
        peer: TrustedPeer,
        limits: ServiceLimits = DEFAULT_SERVICE_LIMITS,
    ) -> None:
        self._place = parse_address(address)
        self.peer = peer
        self.name = f"{peer.name} ({self._place})"
        self._identity = identity
        self._limits = limits
        self.session: str | None = None
        check_time(peer.certificate_pem, peer.name)
        check_time(identity.certificate_pem, "this host")
        keys = grpc.ssl_channel_credentials(
            root_certificates=peer.certificate_pem,
            private_key=identity.key_pem,
            certificate_chain=identity.certificate_pem,
        )
        self._channel = grpc.secure_channel(str(self._place), keys, client_options(limits))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def status(self, deadline_s: float | None = None) -> dict[str, object]:
        """Return what the host says about itself."""
        return self._ask("Status", {}, deadline_s)

    def is_serving(self, deadline_s: float | None = None) -> bool:
        """Return whether the host takes new work, as load balancers ask it."""
        wait_s = self._limits.deadline_s if deadline_s is None else deadline_s
        check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(_CHECK)
        request = health_pb2.HealthCheckRequest(service=SERVICE).SerializeToString()
        try:
            content = check(request, timeout=wait_s)
        except grpc.RpcError as error:
            raise self._failed(error, "Check", wait_s) from error
        try:
            answer = health_pb2.HealthCheckResponse.FromString(content)
        except DecodeError as error:
            raise LinkError(f"{self.name}: answer to Check: {error}") from error
        return answer.status == health_pb2.HealthCheckResponse.SERVING

    def offer(
        self, blobs: Sequence[OfferedBlob], deadline_s: float | None = None
    ) -> tuple[BlobState, ...]:
        """Ask how much of some blobs the host has; only what was offered last can be uploaded.

        Args:
            blobs: Each once.
            deadline_s: Seconds (default: the limits', and time to hash what is there).
        """
        if deadline_s is None:
            deadline_s = self._limits.deadline_s + disk_s(sum(blob.size_bytes for blob in blobs))
        with self._naming():
            return decode_states(self._call("Offer", encode_offer(blobs), deadline_s), blobs)

    def upload(
        self,
        blob: Blob,
        begin_bytes: int,
        advance: Callable[[int], None] = _unheard,
        stopped: Callable[[], bool] = _never,
    ) -> None:
        """Send a blob that was offered; what arrived before a failure is continued later.

        Args:
            blob: Its `read` is called in another thread.
            begin_bytes: `BlobState.there_bytes`.
            advance: Told how many bytes more are on their way.
            stopped: Asked now and then whether to give up.

        Raises:
            Cancelled: `stopped` said so.
            LinkError: the host refuses it, or is gone.
            LinkTimeout: it takes nothing.
            ConfigError: the source cannot be read; FormatError: it is not what it was.
        """
        call: grpc.StreamUnaryMultiCallable[bytes, bytes] = self._channel.stream_unary(
            path_of("Upload")
        )
        upload = Upload(blob, begin_bytes, advance)
        try:
            upload.send(call, self.name, self._limits.stall_s, stopped, routed(self.session))
        except grpc.RpcError as error:
            raise self._failed(error, "Upload", self._limits.stall_s) from error

    def open(
        self, request: Mapping[str, object], deadline_s: float | None = None
    ) -> Iterator[dict[str, object]]:
        """Open a session; yields what the host reports, last that it is ready.

        Closing the iterator cancels.
        """
        wait_s = self._limits.open_s if deadline_s is None else deadline_s
        with self._naming():
            content = encode(request)
        method: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(
            path_of("Open")
        )
        call = method(content, timeout=wait_s, metadata=routed(self.session))
        try:
            with self._naming():
                for message in call:
                    check_versions(call.initial_metadata())
                    yield decode(message, "Open")
        except grpc.RpcError as error:
            raise self._failed(error, "Open", wait_s) from error
        finally:
            call.cancel()

    def close_session(self, session: str, deadline_s: float | None = None) -> None:
        """Close a session; does nothing if there is none."""
        self._ask("Close", {"session": session}, deadline_s)

    def run(self) -> FramedLink:
        """Open a link to the host's `run`; it lives until one side closes it."""
        call: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(
            path_of("Run")
        )
        try:
            return open_link(call, self.name, self._limits, routed(self.session))
        except grpc.RpcError as error:
            raise self._failed(error, "Run", self._limits.deadline_s) from error

    def close(self) -> None:
        """Cancel what is running and close; left to the end of the process where that is near."""
        # gRPC waits for a thread of its own there, which ends before what is closed last.
        if not sys.is_finalizing():
            self._channel.close()

    def _ask(
        self, method: str, request: Mapping[str, object], deadline_s: float | None
    ) -> dict[str, object]:
        wait_s = self._limits.deadline_s if deadline_s is None else deadline_s
        with self._naming():
            return decode(self._call(method, encode(request), wait_s), method)

    def _call(self, method: str, request: bytes, wait_s: float) -> bytes:
        call: grpc.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(
            path_of(method)
        )
        try:
            answer, facts = call.with_call(request, timeout=wait_s, metadata=routed(self.session))
        except grpc.RpcError as error:
            raise self._failed(error, method, wait_s) from error
        check_versions(facts.initial_metadata())
        return answer

    def _failed(self, error: grpc.RpcError, method: str, wait_s: float) -> LinkError:
        """Return what a failed call means; asks OpenSSL where gRPC does not say."""
        failure = link_error(error, self.name, method, wait_s)
        if not is_unreachable(error):
            return failure
        return diagnose(self._place, self._identity, self.peer, self._limits.handshake_s) or failure

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Name the peer in errors of messages."""
        try:
            yield
        except LinkError as error:
            if error.message.startswith(self.name):
                raise
            raise LinkError(f"{self.name}: {error.message}", hint=error.hint) from error
