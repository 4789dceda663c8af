"""A ring allocator: pieces are taken and given back in the same order, as layers are used."""

from __future__ import annotations

from collections import deque


class Ring:
    """Offsets of `capacity_bytes`, handed out first in, first out. Holds no memory itself.

    A piece is contiguous; where it does not fit before the end, the ring goes on at offset 0 and
    the rest of the end lies idle until the pieces before it are given back.

    Args:
        capacity_bytes: Bytes in all.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._live: deque[tuple[int, int]] = deque()

    def take(self, size_bytes: int) -> int | None:
        """Return the offset of a free piece, or None if there is no room now.

        Raises:
            ValueError: the piece is larger than the whole ring.
        """
        if size_bytes > self.capacity_bytes:
            raise ValueError(f"{size_bytes} bytes in a ring of {self.capacity_bytes}")
        start = self._find(size_bytes)
        if start is not None:
            self._live.append((start, start + size_bytes))
        return start

    def give_back(self) -> None:
        """Free the oldest piece; IndexError when there is none."""
        self._live.popleft()

    def __len__(self) -> int:
        """Return how many pieces are taken."""
        return len(self._live)

    def _find(self, size_bytes: int) -> int | None:
        if not self._live:
            return 0
        oldest, newest_end = self._live[0][0], self._live[-1][1]
        wrapped = self._live[-1][0] < oldest
        if wrapped:
            return newest_end if newest_end + size_bytes <= oldest else None
        if newest_end + size_bytes <= self.capacity_bytes:
            return newest_end
        return 0 if size_bytes <= oldest else None
