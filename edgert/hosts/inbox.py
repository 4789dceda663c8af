"""Receives on a link while a step is computed, so that an order to stop it is heard at once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, Queue

from edgert.errors import LinkError
from edgert.hosts.frames import FrameKind
from edgert.hosts.link import Frame, Link

# Home sends one step at a time, and a few orders.
_MOST_WAITING = 8


class Inbox:
    """Frames of a link in order, received by a thread of its own until the link ends.

    Args:
        link: Nobody else receives on it.
        heard: Is told of each frame or of the end of the link as it comes, in that thread.
    """

    def __init__(self, link: Link, heard: Callable[[Frame | LinkError], None]) -> None:
        self._link = link
        self._heard = heard
        self._waiting: Queue[Frame | LinkError] = Queue(_MOST_WAITING)
        self._is_closed = False
        threading.Thread(target=self._work, name="inbox", daemon=True).start()

    def receive(self) -> Frame:
        """Wait for the next frame, whose payload stays valid; LinkError as `Link.receive`."""
        found = self._waiting.get()
        if isinstance(found, LinkError):
            self._waiting.put(found)
            raise found
        return found

    def close(self) -> None:
        """Drop what waits and what still comes; the thread ends with the link."""
        self._is_closed = True
        with suppress(Empty):
            while True:  # a thread that waits for room gets it
                self._waiting.get_nowait()

    def _work(self) -> None:
        while True:
            found: Frame | LinkError
            try:
                frame = self._link.receive(math.inf)
                found = Frame(frame.kind, memoryview(bytes(frame.payload)))
            except LinkError as error:
                found = error
            self._heard(found)
            if not self._is_closed:
                self._waiting.put(found)
            if isinstance(found, LinkError) or found.kind is FrameKind.BYE:
                return
