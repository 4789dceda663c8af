"""A link over any byte channel: frames, their order, signs of life and errors of both sides.

Small frames leave in one piece and arrive in a buffer made beforehand; large payloads are copied
neither on the way out nor, into a buffer of the caller's, on the way in.
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

_RECORD_BYTES = 16 << 10  # of TLS
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
        self._silence_s = limits.silence_s
        self._most_bytes = limits.payload_bytes
        self._deadline_s = limits.deadline_s
        self._failure: LinkError | None = None
        self._failing = threading.Lock()
        self._sending = threading.Lock()
        self._n_sent = self._n_received = 0
        self._owes_pong = False
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._start = self._end = 0
        self._since_s = 0.0

    def send(self, kind: FrameKind, *parts: Buffer) -> None:
        """See `Link`."""
        with self._sending:
            self._send(kind, parts, time.monotonic() + self._deadline_s)
        if self._owes_pong:
            self._answer()

    def receive(self, deadline_s: float | None = None) -> Frame:
        """See `Link`."""
        until_s = self._until(deadline_s)
        kind, n_bytes = self._next(None, until_s)
        self._fill(n_bytes, until_s, kind)
        payload = self._buffer[self._start : self._start + n_bytes].toreadonly()
        self._start += n_bytes
        self.received_bytes += n_bytes
        return Frame(kind, payload)

    def receive_into(self, kind: FrameKind, target: Buffer, deadline_s: float | None = None) -> int:
        """See `Link`."""
        view = memoryview(target)
        if view.format != "B" or view.ndim != 1:
            view = view.cast("B") if view.nbytes else memoryview(bytearray())
        until_s = self._until(deadline_s)
        saw, n_bytes = self._next(kind, until_s)
        if saw is not kind or n_bytes > len(view):
            raise self._broken(
                f"{saw.name} of {n_bytes:,} bytes, wanted {kind.name} of {len(view):,} at most"
            )
        start = self._start
        end = start + n_bytes
        if end <= self._end:
            view[:n_bytes] = self._buffer[start:end]
            self._start = end
        else:
            there = self._end - start
            view[:there] = self._buffer[start : self._end]
            self._start = self._end
            while there < n_bytes:
                there += self._read(view[there:n_bytes], until_s, kind)
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
        return self._since_s + (self._deadline_s if deadline_s is None else deadline_s)

    def _send(self, kind: FrameKind, parts: tuple[Buffer, ...], until_s: float) -> None:
        """Send a frame; the caller holds the lock."""
        if self._failure is not None:
            raise _copy(self._failure)
        n_bytes = 0
        for part in parts:
            view = memoryview(part)
            n_bytes += view.nbytes
            if not view.c_contiguous:
                raise ValueError(f"{kind.name} of a part that does not lie in one piece")
        if n_bytes > self._most_bytes:
            raise ValueError(
                f"{kind.name} of {n_bytes:,} bytes, {self._most_bytes:,} at most on this link"
            )
        header = encode_header(kind, self._n_sent, n_bytes)
        try:
            if n_bytes <= _RECORD_BYTES - HEADER_BYTES:
                self._channel.write(b"".join((header, *parts)), until_s)
            else:
                self._write_large(header, parts, until_s)
        except OSError as error:
            begin_s = until_s - self._deadline_s
            raise self._lost(error, f"takes no {kind.name}", begin_s) from error
        except BaseException:  # a frame in part: what follows would be taken for the rest of it
            self._fail(LinkError(f"{self.peer}: interrupted while {kind.name} was sent"))
            raise
        self._n_sent = (self._n_sent + 1) % SEQUENCE_END
        self.sent_bytes += HEADER_BYTES + n_bytes

    def _write_large(self, header: bytes, parts: tuple[Buffer, ...], until_s: float) -> None:
        """Write small parts together, and large ones as they lie."""
        small: list[Buffer] = [header]
        n_small = HEADER_BYTES
        for part in parts:
            whole = memoryview(part)
            if not whole.nbytes:
                continue
            rest = whole.cast("B")
            n_now = min(len(rest), _RECORD_BYTES - n_small)
            small.append(rest[:n_now])
            n_small, rest = n_small + n_now, rest[n_now:]
            if rest:
                self._channel.write(b"".join(small), until_s)
                small, n_small = [], 0
            if len(rest) >= _RECORD_BYTES:
                self._channel.write(rest, until_s)
            elif rest:
                small, n_small = [rest], len(rest)
        if small:
            self._channel.write(b"".join(small), until_s)

    def _next(self, wanted: FrameKind | None, until_s: float) -> tuple[FrameKind, int]:
        """Read headers up to one that is the caller's business."""
        while True:
            if self._failure is not None:
                raise _copy(self._failure)
            if self._start == self._end:
                self._start = 0
                self._end = self._read(self._buffer, until_s, wanted)
            if self._end - self._start < HEADER_BYTES:
                self._fill(HEADER_BYTES, until_s, wanted)
            header = self._buffer[self._start : self._start + HEADER_BYTES]
            try:
                kind, n_bytes = decode_header(header, self._n_received, self._most_bytes)
            except LinkError as error:
                raise self._broken(error.message, error.hint) from error
            self._n_received = (self._n_received + 1) % SEQUENCE_END
            self._start += HEADER_BYTES
            self.received_bytes += HEADER_BYTES
            if kind is wanted or not self._is_handled(kind, n_bytes, wanted, until_s):
                return kind, n_bytes

    def _is_handled(
        self, kind: FrameKind, n_bytes: int, wanted: FrameKind | None, until_s: float
    ) -> bool:
        """Do what a frame wants of the link itself; whether that was all."""
        if kind is FrameKind.PING:
            self._owes_pong = True
            self._answer()
        elif kind is FrameKind.ERROR:
            self._fill(n_bytes, until_s, kind)
            words = decode_error(self._buffer[self._start : self._start + n_bytes])
            raise self._fail(LinkError(f"{self.peer}: {words.message}", hint=words.hint))
        elif kind is FrameKind.BYE and wanted is not None:
            raise self._fail(LinkError(f"{self.peer}: left while {wanted.name} was awaited"))
        return kind in (FrameKind.PING, FrameKind.PONG)

    def _answer(self) -> None:
        """Send a PONG that is due, or leave it to the thread that is sending just now."""
        while self._owes_pong and self._sending.acquire(blocking=False):
            try:
                if self._owes_pong:
                    self._owes_pong = False
                    self._send(FrameKind.PONG, (), time.monotonic() + self._deadline_s)
            finally:
                self._sending.release()

    def _fill(self, n_bytes: int, until_s: float, awaited: FrameKind | None) -> None:
        """Read until `n_bytes` are there, and whatever arrived with them."""
        left = self._end - self._start
        if self._start + n_bytes > len(self._buffer):
            rest = bytes(self._buffer[self._start : self._end])
            if n_bytes > len(self._buffer):
                self._buffer = memoryview(bytearray(n_bytes))
            self._buffer[:left] = rest
            self._start, self._end = 0, left
        while self._end - self._start < n_bytes:
            self._end += self._read(self._buffer[self._end :], until_s, awaited)

    def _read(self, target: memoryview, until_s: float, awaited: FrameKind | None) -> int:
        begin_s = self._since_s
        if self._silence_s is not None:
            now_s = time.monotonic()
            if now_s + self._silence_s < until_s:
                begin_s, until_s = now_s, now_s + self._silence_s
        try:
            n_bytes = self._channel.read_into(target, until_s)
        except OSError as error:
            raise self._lost(error, f"is silent, awaited {_named(awaited)}", begin_s) from error
        if n_bytes == 0:
            raise self._fail(
                LinkError(f"{self.peer}: closed the connection, awaited {_named(awaited)}")
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
                self._channel.write(header + words, time.monotonic() + _LAST_WORDS_S)
                linger_s = _LAST_WORDS_S
            except OSError as error:
                logger.debug("%s: could not be told: %s", self.peer, error)
            finally:
                self._sending.release()
        self._channel.close(linger_s)
        return failure


def _copy(failure: LinkError) -> LinkError:
    return type(failure)(failure.message, hint=failure.hint)


def _named(kind: FrameKind | None) -> str:
    return "a frame" if kind is None else kind.name
