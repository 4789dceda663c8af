"""The methods of a host that serves, from messages to its handlers and back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import grpc

from edgert.errors import LinkError, LinkTimeout
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.service.admission import Admission, Caller, greet
from edgert.hosts.service.handlers import Handlers
from edgert.hosts.service.limits import CHUNK_BYTES, ServiceLimits
from edgert.hosts.service.message_pump import MessagePump
from edgert.hosts.service.messages import (
    SERVICE,
    decode,
    decode_offer,
    encode,
    encode_states,
    hash_of,
    session_of,
    size_of,
)
from edgert.hosts.service.receiver import BlobReceiver
from edgert.hosts.service.stream_link import Outgoing, StreamChannel


class Calls:
    """Each method is called in a thread of gRPC's pool.

    Args:
        handlers: What is done.
        receiver: Where uploads go.
        admission: Who may call.
        limits: How long is waited.
    """

    def __init__(
        self,
        handlers: Handlers,
        receiver: BlobReceiver,
        admission: Admission,
        limits: ServiceLimits,
    ) -> None:
        self._handlers = handlers
        self._receiver = receiver
        self._admission = admission
        self._limits = limits
        self._runs = ThreadPoolExecutor(limits.most_calls, "service-run")

    def handler(self) -> grpc.GenericRpcHandler:
        """Return what gRPC calls."""
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Status": grpc.unary_unary_rpc_method_handler(self._status),
                "Offer": grpc.unary_unary_rpc_method_handler(self._offer),
                "Upload": grpc.stream_unary_rpc_method_handler(self._upload),
                "Open": grpc.unary_stream_rpc_method_handler(self._open),
                "Close": grpc.unary_unary_rpc_method_handler(self._close),
                "Run": grpc.stream_stream_rpc_method_handler(self._run),
            },
        )

    def close(self) -> None:
        """Let links that are still running end by themselves; their calls are over."""
        self._runs.shutdown(wait=False)

    def _status(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._admission.short("Status", context) as caller:
            decode(request, "Status")
            return encode(self._handlers.status(caller.peer))

    def _offer(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._admission.short("Offer", context) as caller:
            blobs = decode_offer(request)
            self._handlers.offer(caller.peer, blobs)
            return encode_states(self._receiver.offer(caller.peer.name, blobs))

    def _close(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        with self._admission.short("Close", context) as caller:
            self._handlers.close(caller.peer, session_of(decode(request, "Close")))
            return encode({})

    def _upload(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        with self._admission.long("Upload", context) as caller:
            pump = MessagePump(requests)
            try:
                header = decode(self._take(pump) or b"", "Upload")
                begin_bytes = size_of(header, "begin_bytes")
                sha256 = hash_of(header, "Upload")
                self._receiver.receive(caller.peer.name, sha256, begin_bytes, self._chunks(pump))
            finally:
                pump.drop()
            return encode({})

    def _chunks(self, pump: MessagePump) -> Iterator[bytes]:
        while (chunk := self._take(pump)) is not None:
            if len(chunk) > CHUNK_BYTES:
                raise LinkError(f"a piece of {len(chunk):,} bytes, wanted {CHUNK_BYTES:,} at most")
            yield chunk

    def _take(self, pump: MessagePump) -> bytes | None:
        try:
            return pump.take(time.monotonic() + self._limits.stall_s)
        except TimeoutError as error:
            raise LinkTimeout(f"nothing arrived for {self._limits.stall_s:g} s") from error
        except ConnectionError as error:
            raise LinkError(f"{error}; what arrived is kept") from error

    def _open(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        with self._admission.long("Open", context) as caller:
            for event in self._handlers.open(caller.peer, decode(request, "Open")):
                yield encode(event)

    def _run(self, requests: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        with self._admission.admitted("Run", context) as caller:
            self._admission.begin()
            greet(context)
            outgoing, pump = Outgoing(), MessagePump(requests)
            is_active = context.add_callback(outgoing.abort)
            channel = StreamChannel(pump, outgoing, _ending(outgoing, context))
            link = FramedLink(channel, caller.name, self._limits.link)
            work = self._runs.submit(self._work, caller, link)
            work.add_done_callback(self._forget)
            if not is_active:
                outgoing.abort()
            yield from outgoing
            if context.is_active():
                work.result()

    def _forget(self, work: Future[None]) -> None:
        del work
        self._admission.end()

    def _work(self, caller: Caller, link: FramedLink) -> None:
        try:
            self._handlers.run(caller.peer, link)
        except Exception as error:
            link.fail(error)
            raise
        finally:
            link.close()


def _ending(outgoing: Outgoing, context: grpc.ServicerContext) -> Callable[[float], None]:
    """Return what waits until all has left, and ends a call whose peer does not take it."""

    def end(linger_s: float) -> None:
        if not outgoing.wait_until_empty(time.monotonic() + linger_s):
            context.cancel()

    return end
