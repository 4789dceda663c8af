"""Two ends of a link within this process, with the frames and checks of real ones."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

from edgert.hosts.framed_link import FramedLink
from edgert.hosts.link import DEFAULT_LIMITS, LinkLimits

_PIPE_BYTES = 1 << 20


class _Pipe:
    """Bytes in one direction, bounded."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._chunks: deque[memoryview] = deque()
        self._n_bytes = 0
        self._changed = threading.Condition()
        self.closed = False

    def put(self, content: bytes | memoryview, until_s: float) -> None:
        while content:
            with self._changed:
                self._wait(lambda: self.closed or self._n_bytes < self._most_bytes, until_s)
                if self.closed:
                    raise BrokenPipeError("the other end is closed")
                n_now = min(len(content), self._most_bytes - self._n_bytes)
                self._chunks.append(memoryview(bytes(content[:n_now])))
                self._n_bytes += n_now
                self._changed.notify_all()
            content = content[n_now:]

    def take(self, target: memoryview, until_s: float) -> int:
        """Take what fits; 0 once it is closed and empty."""
        with self._changed:
            self._wait(lambda: self.closed or bool(self._chunks), until_s)
            n_taken = 0
            while self._chunks and n_taken < len(target):
                chunk = self._chunks.popleft()
                n_now = min(len(chunk), len(target) - n_taken)
                target[n_taken : n_taken + n_now] = chunk[:n_now]
                if n_now < len(chunk):
                    self._chunks.appendleft(chunk[n_now:])
                n_taken += n_now
            self._n_bytes -= n_taken
            self._changed.notify_all()
            return n_taken

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def _wait(self, ready: Callable[[], bool], until_s: float) -> None:
        if not self._changed.wait_for(ready, _left(until_s)):
            raise TimeoutError


def _left(until_s: float) -> float:
    return min(threading.TIMEOUT_MAX, max(0.0, until_s - time.monotonic()))


class MemoryChannel:
    """See `Channel`: one end of two pipes."""

    def __init__(self, incoming: _Pipe, outgoing: _Pipe) -> None:
        self._incoming = incoming
        self._outgoing = outgoing

    def read_into(self, target: memoryview, until_s: float) -> int:
        """See `Channel`."""
        return self._incoming.take(target, until_s)

    def write(self, content: bytes | memoryview, until_s: float) -> None:
        """See `Channel`."""
        self._outgoing.put(content, until_s)

    def close(self, linger_s: float = 0.0) -> None:
        """See `Channel`; what was written stays to be read."""
        del linger_s
        self._outgoing.close()
        self._incoming.close()


def memory_channels(pipe_bytes: int = _PIPE_BYTES) -> tuple[MemoryChannel, MemoryChannel]:
    """Return both ends of a channel that holds `pipe_bytes` in each direction."""
    there, back = _Pipe(pipe_bytes), _Pipe(pipe_bytes)
    return MemoryChannel(back, there), MemoryChannel(there, back)


def memory_pair(
    names: tuple[str, str] = ("near", "far"), limits: LinkLimits = DEFAULT_LIMITS
) -> tuple[FramedLink, FramedLink]:
    """Return the links of two hosts to each other.

    Args:
        names: Of the hosts; the first host's link is returned first, and its peer is the second.
        limits: Of both.
    """
    first, second = memory_channels()
    return FramedLink(first, names[1], limits), FramedLink(second, names[0], limits)
