"""A link over any byte channel: frames, their order, signs of life and errors of both sides.

Small frames leave and arrive in one piece by buffers made beforehand; large payloads are not copied
on the way out, nor into a buffer of the caller's.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from edgert.errors import EdgertError, LinkError, LinkTimeout
from edgert.hosts.frames import (
    HEADER_BYTES,
    SEQUENCE_END,
    FrameKind,
    decode_error,
    decode_header,
    encode_error,
    encode_header,
)
from edgert.hosts.link import DEFAULT_LIMITS, Channel, Frame, LinkLimits

if TYPE_CHECKING:
    from typing_extensions import Buffer

logger = logging.getLogger(__name__)

_JOINED_BYTES = 16 << 10  # a TLS record
_BUFFER_BYTES = 64 << 10
_LAST_WORDS_S = 0.5


class FramedLink:
    """See `Link`.

    Args:
        channel: Closed with the link.
        peer: The peer's name, for people.
        limits: What is taken, and for how long is waited.
    """

    def __init__(self, channel: Channel, peer: str, limits: LinkLimits = DEFAULT_LIMITS) -> None:
        self.peer = peer
        self.sent_bytes = 0
        self.received_bytes = 0
        self._channel = channel
        self._limits = limits
        self._failure: LinkError | None = None
        self._failing = threading.Lock()
        self._sending = threading.Lock()
        self._n_sent = self._n_received = 0
        self._owes_pong = False
        self._joined = memoryview(bytearray(_JOINED_BYTES))
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self._since_s = 0.0

    def send(self, kind: FrameKind, *parts: Buffer) -> None:
        """See `Link`."""
        with self._sending:
            self._send(kind, parts, time.monotonic() + self._limits.deadline_s)
        if self._owes_pong:
            self._answer()

    def receive(self, deadline_s: float | None = None) -> Frame:
        """See `Link`."""
        until_s = self._until(deadline_s)
        kind, n_bytes = self._next(None, until_s)
        if n_bytes > self._end - self._start:
            self._fill(n_bytes, until_s, kind.name)
        payload = self._buffer[self._start : self._start + n_bytes].toreadonly()
        self._start += n_bytes
        self.received_bytes += n_bytes
        return Frame(kind, payload)

    def receive_into(self, kind: FrameKind, target: Buffer, deadline_s: float | None = None) -> int:
        """See `Link`."""
        view = memoryview(target).cast("B")
        until_s = self._until(deadline_s)
        saw, n_bytes = self._next(kind, until_s)
        if saw is not kind or n_bytes > len(view):
            raise self._broken(
                f"{saw.name} of {n_bytes:,} bytes, wanted {kind.name} of {len(view):,} at most"
            )
        there = min(n_bytes, self._end - self._start)
        view[:there] = self._buffer[self._start : self._start + there]
        self._start += there
        while there < n_bytes:
            there += self._read(view[there:n_bytes], until_s, kind.name)
        self.received_bytes += n_bytes
        return n_bytes

    def fail(self, error: Exception) -> None:
        """See `Link`."""
        own = error if isinstance(error, EdgertError) else LinkError(f"{type(error).__name__}")
        self._fail(LinkError(f"{self.peer}: given up: {own.message}", hint=own.hint), tell=own)

    def close(self) -> None:
        """See `Link`."""
        gone = LinkError(f"{self.peer}: the link is closed")
        if self._failure is None and self._sending.acquire(timeout=_LAST_WORDS_S):
            try:
                with suppress(LinkError):
                    self._send(FrameKind.BYE, (), time.monotonic() + _LAST_WORDS_S)
            finally:
                self._sending.release()
        self._fail(gone)

    def _until(self, deadline_s: float | None) -> float:
        """Begin to wait; return until when."""
        self._since_s = time.monotonic()
        return self._since_s + (self._limits.deadline_s if deadline_s is None else deadline_s)

    def _send(self, kind: FrameKind, parts: tuple[Buffer, ...], until_s: float) -> None:
        """Send a frame; the caller holds the lock."""
        if self._failure is not None:
            raise _copy(self._failure)
        views = [memoryview(part) for part in parts]
        n_bytes = sum(view.nbytes for view in views)
        if n_bytes > self._limits.payload_bytes:
            most = self._limits.payload_bytes
            raise ValueError(f"{kind.name} of {n_bytes:,} bytes, {most:,} at most on this link")
        header = encode_header(kind, self._n_sent, n_bytes)
        begin_s = time.monotonic()
        try:
            self._write(header, views, until_s)
        except OSError as error:
            raise self._lost(error, f"takes no {kind.name}", begin_s) from error
        self._n_sent = (self._n_sent + 1) % SEQUENCE_END
        self.sent_bytes += HEADER_BYTES + n_bytes

    def _write(self, header: bytes, views: list[memoryview], until_s: float) -> None:
        """Write header and payload, in records that are full but for the last."""
        joined, filled = self._joined, HEADER_BYTES
        joined[:HEADER_BYTES] = header
        for view in views:
            rest = view.cast("B") if view.nbytes else memoryview(b"")
            while rest:
                if filled == 0 and len(rest) >= _JOINED_BYTES:
                    self._channel.write(rest, until_s)
                    break
                n_now = min(len(rest), _JOINED_BYTES - filled)
                joined[filled : filled + n_now] = rest[:n_now]
                filled, rest = filled + n_now, rest[n_now:]
                if filled == _JOINED_BYTES:
                    self._channel.write(joined, until_s)
                    filled = 0
        if filled:
            self._channel.write(joined[:filled], until_s)

    def _next(self, wanted: FrameKind | None, until_s: float) -> tuple[FrameKind, int]:
        """Read headers up to one that is the caller's business."""
        awaited = "a frame" if wanted is None else wanted.name
        while True:
            if self._failure is not None:
                raise _copy(self._failure)
            if self._end - self._start < HEADER_BYTES:
                self._fill(HEADER_BYTES, until_s, awaited)
            header = self._buffer[self._start : self._start + HEADER_BYTES]
            try:
                kind, n_bytes = decode_header(header, self._n_received, self._limits.payload_bytes)
            except LinkError as error:
                raise self._broken(error.message, error.hint) from error
            self._n_received = (self._n_received + 1) % SEQUENCE_END
            self._start += HEADER_BYTES
            self.received_bytes += HEADER_BYTES
            if kind is wanted:
                return kind, n_bytes
            if kind is FrameKind.PING:
                self._owes_pong = True
                self._answer()
            elif kind is FrameKind.ERROR:
                self._fill(n_bytes, until_s, kind.name)
                words = decode_error(self._buffer[self._start : self._start + n_bytes])
                raise self._fail(LinkError(f"{self.peer}: {words.message}", hint=words.hint))
            elif kind is FrameKind.BYE and wanted is not None:
                raise self._fail(LinkError(f"{self.peer}: left while {awaited} was awaited"))
            elif kind is not FrameKind.PONG:
                return kind, n_bytes

    def _answer(self) -> None:
        """Send a PONG that is due, or leave it to the thread that is sending just now."""
        while self._owes_pong and self._sending.acquire(blocking=False):
            try:
                if self._owes_pong:
                    self._owes_pong = False
                    self._send(FrameKind.PONG, (), time.monotonic() + self._limits.deadline_s)
            finally:
                self._sending.release()

    def _fill(self, n_bytes: int, until_s: float, awaited: str) -> None:
        """Read until `n_bytes` are there, and whatever arrived with them."""
        left = self._end - self._start
        if left == 0 or self._start + n_bytes > len(self._buffer):
            rest = bytes(self._buffer[self._start : self._end])
            if n_bytes > len(self._buffer):
                self._buffer = memoryview(bytearray(n_bytes))
            self._buffer[:left] = rest
            self._start, self._end = 0, left
        while self._end - self._start < n_bytes:
            self._end += self._read(self._buffer[self._end :], until_s, awaited)

    def _read(self, target: memoryview, until_s: float, awaited: str) -> int:
        begin_s = self._since_s
        if self._limits.silence_s is not None:
            begin_s = time.monotonic()
            until_s = min(until_s, begin_s + self._limits.silence_s)
        try:
            n_bytes = self._channel.read_into(target, until_s)
        except OSError as error:
            raise self._lost(error, f"is silent, awaited {awaited}", begin_s) from error
        if n_bytes == 0:
            raise self._fail(
                LinkError(f"{self.peer}: closed the connection while {awaited} was awaited")
            )
        return n_bytes

    def _broken(self, what: str, hint: str | None = None) -> LinkError:
        """Return the error of a peer that broke the protocol, and tell it."""
        told = LinkError(f"broke the protocol: {what}", hint=hint)
        return self._fail(LinkError(f"{self.peer}: {told.message}", hint=hint), tell=told)

    def _lost(self, error: OSError, what: str, begin_s: float) -> LinkError:
        """Return what a failed read or write means."""
        if isinstance(error, TimeoutError):
            waited_s = time.monotonic() - begin_s
            return self._fail(LinkTimeout(f"{self.peer}: {what} for {waited_s:.3g} s"))
        reason = error.strerror or str(error)
        return self._fail(LinkError(f"{self.peer}: {what}: {reason}"))

    def _fail(self, failure: LinkError, tell: EdgertError | None = None) -> LinkError:
        """Close for good and return the error to raise: the first one that failed the link."""
        with self._failing:
            first, self._failure = self._failure, self._failure or failure
        if first is not None:
            return _copy(first)
        linger_s = 0.0
        if tell is not None and self._sending.acquire(timeout=_LAST_WORDS_S):
            try:
                words = encode_error(tell)
                header = encode_header(FrameKind.ERROR, self._n_sent, len(words))
                self._write(header, [memoryview(words)], time.monotonic() + _LAST_WORDS_S)
                linger_s = _LAST_WORDS_S
            except OSError as error:
                logger.debug("%s: could not be told: %s", self.peer, error)
            finally:
                self._sending.release()
        self._channel.close(linger_s)
        return failure


def _copy(failure: LinkError) -> LinkError:
    return type(failure)(failure.message, hint=failure.hint)
