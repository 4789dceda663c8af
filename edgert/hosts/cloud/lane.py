"""What one session has of a shared part: looks like a part of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from edgert.errors import LinkError
from edgert.hosts.cloud.quota import Quotas
from edgert.hosts.cloud.shared_part import SharedPart
from edgert.llama.backend import Counters

Floats = NDArray[np.float32]


def _nothing() -> None:
    return


class Lane:
    """A place in a part (`Runner`).

    Args:
        part: Stays the owner's.
        key: Whose it is.
        quotas: Of all keys.
        closed: Called once it is given back.

    Raises:
        CapacityError: no place is left, or the key has as many as it may.
    """

    def __init__(
        self, part: SharedPart, key: str, quotas: Quotas, closed: Callable[[], None] = _nothing
    ) -> None:
        self._part, self._key, self._quotas = part, key, quotas
        self._notify = closed
        quotas.take(key, "sessions", 1)
        try:
            self._sequence = part.enter()
        except BaseException:
            quotas.give(key, "sessions", 1)
            raise
        self._counted = 0  # positions
        self._closed = False
        self._lock = threading.Lock()

    @property
    def to_hidden(self) -> bool:
        """See `Runner`."""
        return self._part.to_hidden

    @property
    def n_batch(self) -> int:
        """See `Runner`."""
        return self._part.n_batch

    def run(self, hidden: Floats, first_position: int, n_rows: int) -> Floats:
        """See `Runner`.

        Raises:
            EdgertError: as `SharedPart.run`; CapacityError besides, if the key has too much.
        """
        if self._closed:
            raise LinkError("the session is closed")
        n_tokens = len(hidden)
        self._quotas.take(self._key, "tokens", n_tokens)
        try:
            with self._lock:
                self._quotas.take(self._key, "positions", n_tokens)
                self._counted += n_tokens
            return self._part.run(self._sequence, hidden, first_position, n_rows)
        finally:
            self._quotas.give(self._key, "tokens", n_tokens)
            self._recount()

    def truncate(self, n_positions: int) -> None:
        """See `Runner`."""
        if not self._closed:
            self._part.truncate(self._sequence, n_positions)
            self._recount()

    def shift(self, keep: int, discard: int) -> None:
        """See `Runner`."""
        if not self._closed:
            self._part.shift(self._sequence, keep, discard)
            self._recount()

    def cancel(self) -> None:
        """See `Runner`."""
        if not self._closed:
            self._part.cancel(self._sequence)

    def counters(self) -> Counters:
        """See `Runner`."""
        return self._part.counters()

    def close(self) -> None:
        """See `Runner`; what is cached is forgotten before another session gets the place."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._quotas.give(self._key, "positions", self._counted)
        self._part.leave(self._sequence)
        self._quotas.give(self._key, "sessions", 1)
        self._notify()

    def _recount(self) -> None:
        with self._lock:
            if not self._closed:  # else the place may be another session's by now
                there = self._part.n_positions(self._sequence)
                self._quotas.give(self._key, "positions", self._counted - there)
                self._counted = there
