#!/usr/bin/env python3
"""A TCP relay that holds every chunk back for the latency of a link, and never limits its rate.

One thread waits for sockets and due times; what is held is bounded, then nothing more is taken.

usage: relay.py IP DELAY_S PORT=HOST:PORT...     prints "ready" once it listens; ends with SIGTERM
"""

from __future__ import annotations

import ctypes
import select
import socket
import sys
import time
from collections import deque
from contextlib import suppress

_CHUNK_BYTES = 1 << 16
_MOST_HELD_BYTES = 8 << 20
_TIMER_SLACK = 29  # PR_SET_TIMERSLACK


class Way:
    """One direction of a connection."""

    def __init__(self, source: socket.socket, target: socket.socket, delay_s: float) -> None:
        self.source = source
        self.target = target
        self._delay_s = delay_s
        self._held: deque[tuple[float, memoryview]] = deque()
        self._held_bytes = 0
        self.ended = False  # the source says no more
        self.done = False  # and all of it has been passed on

    @property
    def takes_more(self) -> bool:
        """Whether it has room for what the source says."""
        return not self.ended and self._held_bytes < _MOST_HELD_BYTES

    @property
    def due_s(self) -> float | None:
        """When the next chunk may go on."""
        return self._held[0][0] if self._held else None

    def take(self) -> None:
        """Receive what is there."""
        try:
            chunk = self.source.recv(_CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self.ended = True
        self._held.append((time.perf_counter() + self._delay_s, memoryview(chunk)))
        self._held_bytes += len(chunk)

    def pass_on(self, now_s: float) -> None:
        """Send what is due, as far as the target takes it."""
        while self._held and self._held[0][0] <= now_s:
            due_s, chunk = self._held[0]
            if not chunk:
                self._held.popleft()
                self._finish()
                return
            try:
                n_sent = self.target.send(chunk)
            except BlockingIOError:
                return
            except OSError:
                self.ended = True
                self._held.clear()
                self._finish()
                return
            self._held_bytes -= n_sent
            if n_sent < len(chunk):
                self._held[0] = (due_s, chunk[n_sent:])
                return
            self._held.popleft()

    def _finish(self) -> None:
        self.done = True
        with suppress(OSError):
            self.target.shutdown(socket.SHUT_WR)


class Relay:
    """All connections of a relay."""

    def __init__(self, ip: str, delay_s: float, ports: dict[int, tuple[str, int]]) -> None:
        self._delay_s = delay_s
        self._listeners = {
            socket.create_server((ip, port), backlog=64): target for port, target in ports.items()
        }
        self._ways: dict[socket.socket, Way] = {}  # by source

    def run(self) -> None:
        """Relay until the process ends."""
        while True:
            now_s = time.perf_counter()
            due = [way.due_s for way in self._ways.values() if way.due_s is not None]
            blocked = [w.target for w in self._ways.values() if w.due_s and w.due_s <= now_s]
            later = [due_s for due_s in due if due_s > now_s]
            timeout_s = max(0.0, min(later) - now_s) if later else None
            sources = [source for source, way in self._ways.items() if way.takes_more]
            readable, _, _ = select.select([*self._listeners, *sources], blocked, [], timeout_s)
            for ready in readable:
                if ready in self._listeners:
                    self._accept(ready)
                else:
                    self._ways[ready].take()
            now_s = time.perf_counter()
            for way in list(self._ways.values()):
                way.pass_on(now_s)
            self._forget()

    def _accept(self, listener: socket.socket) -> None:
        one, _ = listener.accept()
        try:
            other = socket.create_connection(self._listeners[listener], timeout=5.0)
        except OSError:
            one.close()
            return
        for end in (one, other):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)
        self._ways[one] = Way(one, other, self._delay_s)
        self._ways[other] = Way(other, one, self._delay_s)

    def _forget(self) -> None:
        """Close connections that are over in both directions."""
        for source, way in list(self._ways.items()):
            back = self._ways.get(way.target)
            if way.done and back is not None and back.done:
                del self._ways[source], self._ways[way.target]
                source.close()
                way.target.close()


def main() -> None:
    ip, delay_s = sys.argv[1], float(sys.argv[2])
    ports = {}
    for word in sys.argv[3:]:
        port, _, target = word.partition("=")
        host, _, target_port = target.rpartition(":")
        ports[int(port)] = (host, int(target_port))
    ctypes.CDLL(None).prctl(_TIMER_SLACK, 1, 0, 0, 0)  # waits end when they should
    relay = Relay(ip, delay_s, ports)
    print("ready", flush=True)
    relay.run()


if __name__ == "__main__":
    main()
