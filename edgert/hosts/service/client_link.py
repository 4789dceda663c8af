"""The home end of a link over a stream."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator

import grpc

from edgert.errors import LinkError, LinkTimeout
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.service.limits import ServiceLimits
from edgert.hosts.service.message_pump import MessagePump
from edgert.hosts.service.messages import Metadata, check_versions
from edgert.hosts.service.statuses import link_error
from edgert.hosts.service.stream_link import Outgoing, StreamChannel

_NUDGE_S = 0.1


def open_link(
    stream: grpc.StreamStreamMultiCallable[bytes, bytes],
    peer: str,
    limits: ServiceLimits,
    metadata: Metadata,
) -> FramedLink:
    """Begin a call and return the link over it, once the host has let it in.

    Args:
        stream: The method.
        peer: The peer's name, for people.
        limits: Of the link, and for letting in.
        metadata: What is said first.

    Raises:
        grpc.RpcError: the call failed.
        LinkError: the host is of another version.
        LinkTimeout: it does not answer.
    """
    outgoing, over = Outgoing(), threading.Event()
    call = stream(outgoing, metadata=metadata)
    greeted = _Greeting(call, call)
    pump = MessagePump(greeted.messages(), lambda: _why(call, peer))

    def gone() -> None:
        outgoing.abort(_why(call, peer))
        over.set()

    if not call.add_callback(gone):
        gone()

    def end(linger_s: float) -> None:
        until_s = time.monotonic() + linger_s
        outgoing.wait_until_empty(until_s)
        if not over.wait(max(0.0, until_s - time.monotonic())):
            call.cancel()

    try:
        greeted.wait(peer, limits.deadline_s, outgoing.nudge)
    except BaseException:
        call.cancel()
        raise
    return FramedLink(StreamChannel(pump, outgoing, end), peer, limits.link)


class _Greeting:
    """The messages of a call, behind its initial metadata, which is read first."""

    def __init__(self, call: grpc.Call, messages: Iterable[bytes]) -> None:
        self._call = call
        self._messages = messages
        self._is_there = threading.Event()
        self._is_lost = False
        self._refusal: LinkError | None = None

    def wait(self, peer: str, deadline_s: float, nudge: Callable[[], None]) -> None:
        """Wait to be let in; nudge whatever is between until then."""
        until_s = time.monotonic() + deadline_s
        while not self._is_there.wait(_NUDGE_S) and time.monotonic() < until_s:
            nudge()
        if not self._is_there.is_set():
            raise LinkTimeout(
                f"{peer}: no answer to Run within {deadline_s:g} s",
                hint="it may be busy, or there is no edgert at that address",
            )
        if self._is_lost and isinstance(self._call, grpc.RpcError):
            raise self._call
        if self._refusal is not None:
            raise LinkError(f"{peer}: {self._refusal.message}", hint=self._refusal.hint)

    def messages(self) -> Iterator[bytes]:
        """Read metadata, then messages; in the pump's thread."""
        facts = self._call.initial_metadata()
        try:
            self._is_lost = not facts and self._call.code() is not grpc.StatusCode.OK
            if not self._is_lost:
                check_versions(facts)
        except LinkError as error:
            self._refusal = error
        finally:
            self._is_there.set()
        yield from self._messages


def _why(call: grpc.Call, peer: str) -> str:
    """Return why a call ended, without the peer's name."""
    if call.code() is grpc.StatusCode.OK or not isinstance(call, grpc.RpcError):
        return "the peer ended the call"
    error = link_error(call, peer, "Run", 0.0)
    return error.message.removeprefix(f"{peer}: ")
