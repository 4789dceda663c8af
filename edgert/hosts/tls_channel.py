"""Bytes over one TLS connection, without blocking inside OpenSSL: both directions, two threads."""

from __future__ import annotations

import errno
import math
import os
import select
import socket
import ssl
import threading
import time
from contextlib import suppress

_SLICE_BYTES = 256 << 10  # between slices of a large write, the other direction has its turn
_LINGER_BYTES = 4 << 20
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
    """See `Channel`; takes a connection after its handshake."""

    def __init__(self, link: ssl.SSLSocket) -> None:
        link.setblocking(False)
        self._link = link
        self._closed = False
        # OpenSSL allows one call at a time on a connection; waiting is done outside.
        self._turn = threading.Lock()
        self._readable, self._writable = select.poll(), select.poll()
        self._readable.register(link, select.POLLIN)
        self._writable.register(link, select.POLLOUT)

    def read_into(self, target: memoryview, until_s: float) -> int:
        """See `Channel`."""
        with self._turn:
            wait = not self._link.pending()
        while True:
            if wait:
                _wait(self._readable, until_s)
            try:
                with self._turn:
                    self._check_open()
                    return self._link.recv_into(target)
            except ssl.SSLWantReadError:
                wait = True
            except ssl.SSLWantWriteError:
                _wait(self._writable, until_s)
            except ssl.SSLError as error:
                raise PeerAlert(error) from error

    def write(self, content: memoryview, until_s: float) -> None:
        """See `Channel`."""
        while content:
            content = content[self._write_some(content[:_SLICE_BYTES], until_s) :]

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

    def _write_some(self, content: memoryview, until_s: float) -> int:
        """Write with waits; what OpenSSL has begun to write has to be given again."""
        while True:
            try:
                with self._turn:
                    self._check_open()
                    return self._link.send(content)
            except ssl.SSLWantWriteError:
                _wait(self._writable, until_s)
            except ssl.SSLWantReadError:
                _wait(self._readable, until_s)
            except ssl.SSLError as error:
                raise PeerAlert(error) from error

    def _check_open(self) -> None:
        if self._closed:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))


def _wait(poller: select.poll, until_s: float) -> None:
    left_s = until_s - time.monotonic()
    if left_s <= 0 or not poller.poll(None if left_s == math.inf else math.ceil(left_s * 1000)):
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
