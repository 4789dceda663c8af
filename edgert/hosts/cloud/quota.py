"""How much one key may take of what many share."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from edgert.errors import CapacityError


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """What one key may have at a time; None is no limit but the part's own.

    Attributes:
        sessions: Places in one part.
        positions: In the KV caches, all of its sessions together.
        tokens: Waiting or being computed.
    """

    sessions: int | None = None
    positions: int | None = None
    tokens: int | None = None


class Quotas:
    """Counts what each key has; thread-safe.

    Args:
        limits: The same for every key.
    """

    def __init__(self, limits: KeyLimits) -> None:
        self._most: Mapping[str, int | None] = {
            "sessions": limits.sessions,
            "positions": limits.positions,
            "tokens": limits.tokens,
        }
        self._taken: defaultdict[tuple[str, str], int] = defaultdict(int)
        self._lock = threading.Lock()

    def take(self, key: str, what: str, n: int) -> None:
        """Count something for a key.

        Args:
            key: Whose.
            what: "sessions", "positions" or "tokens".
            n: How many more.

        Raises:
            CapacityError: it would be too much; nothing is counted then.
        """
        most = self._most[what]
        with self._lock:
            taken = self._taken[key, what]
            if most is not None and taken + n > most:
                raise CapacityError(
                    f"this key has {taken:,} {what} of the {most:,} that a key may have, "
                    f"{n:,} more were asked for",
                    hint="end a session, or wait until others of this key are done",
                )
            self._taken[key, what] += n

    def give(self, key: str, what: str, n: int) -> None:
        """Give back what was counted."""
        with self._lock:
            self._taken[key, what] -= n
            if not self._taken[key, what]:
                del self._taken[key, what]

    def taken(self, key: str, what: str) -> int:
        """Return how much a key has."""
        with self._lock:
            return self._taken.get((key, what), 0)
