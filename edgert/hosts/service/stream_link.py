"""Links over a gRPC stream, for what stands behind load balancers: see `Channel`."""

from __future__ import annotations

import errno
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

from edgert.hosts.service.limits import CHUNK_BYTES
from edgert.hosts.service.message_pump import MessagePump

if TYPE_CHECKING:
    from typing_extensions import Buffer

_MOST_BYTES = 4 << 20
_FLUSH_S = 1.0


class Outgoing:
    """The outgoing half of a stream, bounded: the messages that gRPC iterates over."""

    def __init__(self) -> None:
        self._waiting: deque[bytes] = deque()
        self._n_bytes = 0
        self._changed = threading.Condition()
        self._is_over = self._is_empty = False
        self._broken = ""

    def put(self, content: Buffer, until_s: float) -> None:
        """Add bytes that may change once this returns.

        Raises:
            TimeoutError: not all was taken.
            ConnectionError: the call ended.
        """
        rest = memoryview(content).cast("B")
        while rest:
            with self._changed:
                if not self._wait(lambda: self._is_over or self._n_bytes < _MOST_BYTES, until_s):
                    raise TimeoutError
                if self._is_over:
                    raise BrokenPipeError(errno.EPIPE, self._broken or "the stream is closed")
                message = bytes(rest[:CHUNK_BYTES])
                self._waiting.append(message)
                self._n_bytes += len(message)
                self._changed.notify_all()
            rest = rest[len(message) :]

    def nudge(self) -> None:
        """Have a message without bytes leave: nginx 1.22 may hold back what a call began with."""
        with self._changed:
            self._waiting.append(b"")
            self._changed.notify_all()

    def finish(self) -> None:
        """Take no more; what is there still leaves."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()

    def abort(self, broken: str = "the call was cancelled or lost") -> None:
        """Take no more and drop what is there."""
        with self._changed:
            self._is_over = self._is_empty = True
            self._broken = self._broken or broken
            self._waiting.clear()
            self._n_bytes = 0
            self._changed.notify_all()

    def wait_until_empty(self, until_s: float) -> bool:
        """Wait until gRPC has taken everything; False if it has not."""
        with self._changed:
            return self._wait(lambda: self._is_empty, until_s)

    def __iter__(self) -> Outgoing:
        return self

    def __next__(self) -> bytes:
        """Wait for bytes to send: all that are there, as far as a message holds them."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_over)
            if not self._waiting:
                self._is_empty = True  # and what was taken before has been sent
                self._changed.notify_all()
                raise StopIteration
            message = self._waiting.popleft()
            if self._waiting and len(message) + len(self._waiting[0]) <= CHUNK_BYTES:
                message = self._join(message)
            self._n_bytes -= len(message)
            self._changed.notify_all()
            return message

    def _join(self, message: bytes) -> bytes:
        joined = bytearray(message)
        while self._waiting and len(joined) + len(self._waiting[0]) <= CHUNK_BYTES:
            joined += self._waiting.popleft()
        return bytes(joined)

    def _wait(self, ready: Callable[[], bool], until_s: float) -> bool:
        left_s = min(threading.TIMEOUT_MAX, max(0.0, until_s - time.monotonic()))
        return self._changed.wait_for(ready, left_s)


class StreamChannel:
    """See `Channel`: one end of a call whose messages are bytes in order.

    Args:
        incoming: What the peer sends.
        outgoing: What gRPC sends.
        end: Ends the call; given the seconds in which what was written last may still arrive.
    """

    def __init__(
        self, incoming: MessagePump, outgoing: Outgoing, end: Callable[[float], None]
    ) -> None:
        self._incoming = incoming
        self._outgoing = outgoing
        self._end = end
        self._rest = memoryview(b"")
        self._closing = threading.Lock()
        self._is_closed = False

    def read_into(self, target: memoryview, until_s: float) -> int:
        """See `Channel`."""
        while not self._rest:
            message = self._incoming.take(until_s)
            if message is None:
                return 0
            self._rest = memoryview(message)
        n_bytes = min(len(target), len(self._rest))
        target[:n_bytes] = self._rest[:n_bytes]
        self._rest = self._rest[n_bytes:]
        return n_bytes

    def write(self, content: Buffer, until_s: float) -> None:
        """See `Channel`."""
        self._outgoing.put(content, until_s)

    def close(self, linger_s: float = 0.0) -> None:
        """See `Channel`."""
        with self._closing:
            if self._is_closed:
                return
            self._is_closed = True
        self._outgoing.finish()
        self._incoming.drop("the link is closed")
        self._end(max(linger_s, _FLUSH_S))
