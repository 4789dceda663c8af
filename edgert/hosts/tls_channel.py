"""Bytes over one TLS connection, without blocking inside OpenSSL: both directions, two threads."""

from __future__ import annotations

import errno
import math
import select
import socket
import ssl
import threading
import time
from contextlib import suppress

_SLICE_BYTES = 256 << 10  # between slices of a large write, the other direction has its turn
_LINGER_BYTES = 4 << 20
_SPIN_S = 1e-3
_ENDLESS_MS = 1e9  # poll takes 24 days
_PROBE_IDLE_S, _PROBE_EVERY_S, _N_PROBES = 5, 2, 3


class PeerAlert(ConnectionError):
    """TLS refused; `reason` is OpenSSL's name for why, such as TLSV1_ALERT_UNKNOWN_CA."""

    def __init__(self, error: ssl.SSLError) -> None:
        self.reason = error.reason or "?"
        words = self.reason.lower().replace("_", " ")
        super().__init__(errno.EPROTO, f"TLS: {words}")


def set_up_socket(link: socket.socket, deadline_s: float) -> None:
    """Send small frames at once, and notice a peer that is gone."""
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_IDLE_S)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _PROBE_EVERY_S)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _N_PROBES)
    longest_ms = min(3_600_000, max(1, int(deadline_s * 1000))) if deadline_s < math.inf else 0
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, longest_ms)


def wake(link: socket.socket) -> None:
    """End a connection for whoever waits on it.

    `SSLSocket.shutdown` would go on in plain text, so that of its base is called.
    """
    with suppress(OSError):
        socket.socket.shutdown(link, socket.SHUT_RDWR)


class TlsChannel:
    """See `Channel`; takes a connection after its handshake.

    `read` and `write` of the socket are used, as `recv` and `send` would go on in plain text on a
    connection whose TLS has ended.
    """

    def __init__(self, link: ssl.SSLSocket) -> None:
        link.setblocking(False)
        self._link = link
        self._closed = self._comes_soon = False
        # OpenSSL allows one call at a time on a connection; waiting is done outside.
        self._turn = threading.Lock()
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(link, select.POLLIN)
        self._writable.register(link, select.POLLOUT)

    def read_into(self, target: memoryview, until_s: float) -> int:
        """See `Channel`."""
        wait = not self._link.pending()
        began_s = time.monotonic()
        # Hosts that share layers answer each other within microseconds, thousands of times a
        # second, with weights read in between: waking up takes longer than that, and code that
        # just ran is in the caches. So whoever had its bytes soon the last time asks on for them.
        spin = _SPIN_S if self._comes_soon and until_s < math.inf else 0.0
        while True:
            if wait and not self._closed and time.monotonic() - began_s >= spin:
                _wait(self._readable, until_s)
            try:
                with self._turn:
                    if self._closed:
                        raise OSError(errno.EBADF, "closed")
                    n_bytes: int = self._link.read(len(target), target)  # type: ignore[assignment]
            except ssl.SSLWantReadError:
                wait = True
            except ssl.SSLWantWriteError:
                _wait(self._writable, until_s)
            except ssl.SSLError as error:
                raise PeerAlert(error) from error
            else:
                self._comes_soon = time.monotonic() - began_s < _SPIN_S
                return n_bytes

    def write(self, content: bytes | memoryview, until_s: float) -> None:
        """See `Channel`."""
        rest = content if len(content) <= _SLICE_BYTES else content[:_SLICE_BYTES]
        done = 0
        while True:
            try:
                with self._turn:
                    if self._closed:
                        raise OSError(errno.EBADF, "closed")
                    done += self._link.write(rest)
            except ssl.SSLWantWriteError:  # OpenSSL wants the same again, after a wait
                _wait(self._writable, until_s)
                continue
            except ssl.SSLWantReadError:
                _wait(self._readable, until_s)
                continue
            except ssl.SSLError as error:
                raise PeerAlert(error) from error
            if done == len(content):
                return
            rest = content[done : done + _SLICE_BYTES]

    def close(self, linger_s: float = 0.0) -> None:
        """See `Channel`."""
        with self._turn:
            if self._closed:
                return
            self._closed = True
            if linger_s:
                _linger(self._link, time.monotonic() + linger_s)
            wake(self._link)
            self._link.close()


def _wait(poller: select.poll, until_s: float) -> None:
    left_ms = (until_s - time.monotonic()) * 1000
    if left_ms <= 0 or not poller.poll(left_ms + 1 if left_ms < _ENDLESS_MS else None):
        raise TimeoutError


def _linger(link: socket.socket, until_s: float) -> None:
    """Let the peer read what was written last: bytes left unread here would destroy that."""
    waiting, n_read = select.poll(), 0
    waiting.register(link, select.POLLIN)
    with suppress(OSError):
        socket.socket.shutdown(link, socket.SHUT_WR)
        while n_read < _LINGER_BYTES:
            _wait(waiting, until_s)
            n_now = len(socket.socket.recv(link, 1 << 16))
            if n_now == 0:
                return
            n_read += n_now
