"""Signs of life on links that may rest for hours: who stops sending them is gone, or hangs."""

from __future__ import annotations

import threading

from edgert.errors import LinkError
from edgert.hosts.frames import FrameKind
from edgert.hosts.link import Link

BEATS = 4  # in the time after which silence means that the peer is gone


class Heartbeat:
    """Sends on links, in a thread of its own, what nobody has to answer.

    Args:
        silence_s: After so many seconds without a byte the other end gives up.
    """

    def __init__(self, silence_s: float) -> None:
        self._every_s = silence_s / BEATS
        self._links: list[Link] = []
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def add(self, link: Link) -> None:
        """Send on one more link, until it fails or is closed."""
        with self._lock:
            self._links.append(link)

    def close(self) -> None:
        """Send no more; does nothing the second time."""
        self._stopped.set()

    def _beat(self) -> None:
        while not self._stopped.wait(self._every_s):
            with self._lock:
                links = list(self._links)
            for link in links:
                try:
                    link.send(FrameKind.PONG)
                except LinkError:  # whoever uses the link hears of it
                    with self._lock:
                        self._links.remove(link)
