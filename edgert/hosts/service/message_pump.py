"""Takes messages of a gRPC stream in a thread of its own, so that waiting has a deadline."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import grpc

_MOST_BYTES = 4 << 20


def _lost() -> str:
    return "the call was cancelled or lost"


class MessagePump:
    """The incoming half of a stream, bounded: what is not taken is not asked for.

    Args:
        messages: Of gRPC; ends or raises when the call does.
        why: Says why it raised.
    """

    def __init__(self, messages: Iterator[bytes], why: Callable[[], str] = _lost) -> None:
        self._messages = messages
        self._why = why
        self._waiting: deque[bytes] = deque()
        self._n_bytes = 0
        self._changed = threading.Condition()
        self._is_over = self._is_unwanted = False
        self._broken = ""
        threading.Thread(target=self._pump, name="service-pump", daemon=True).start()

    def take(self, until_s: float) -> bytes | None:
        """Wait for a message; None is the end.

        Args:
            until_s: A time of `time.monotonic`.

        Raises:
            TimeoutError: none came.
            ConnectionError: the call was cancelled or lost.
        """
        with self._changed:
            if not self._waiting and not self._is_over:
                left_s = min(threading.TIMEOUT_MAX, max(0.0, until_s - time.monotonic()))
                if not self._changed.wait_for(lambda: self._waiting or self._is_over, left_s):
                    raise TimeoutError
            if self._waiting:
                message = self._waiting.popleft()
                self._n_bytes -= len(message)
                if self._n_bytes + len(message) >= _MOST_BYTES:
                    self._changed.notify_all()
                return message
            if self._broken:
                raise ConnectionAbortedError(self._broken)
            return None

    def drop(self, broken: str = "") -> None:
        """Drop what is there and what will come, so that the call can end; wake who waits."""
        with self._changed:
            self._is_unwanted = self._is_over = True
            self._broken = self._broken or broken
            self._waiting.clear()
            self._n_bytes = 0
            self._changed.notify_all()

    def _pump(self) -> None:
        broken = ""
        try:
            for message in self._messages:
                self._put(message)
        except grpc.RpcError:
            broken = self._why()
        with self._changed:
            self._is_over = True
            self._broken = self._broken or broken
            self._changed.notify_all()

    def _put(self, message: bytes) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_unwanted or self._n_bytes < _MOST_BYTES)
            if not self._is_unwanted:
                self._waiting.append(message)
                self._n_bytes += len(message)
                self._changed.notify_all()
