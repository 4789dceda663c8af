"""Decides which weights stay in memory and which stream past; pure arithmetic.

The one rule for both: the runtime asks it when a person names only a memory bound, the planner when
it writes a manifest. Standard library only, so a device that runs manifests loads no planner.

A pass over the layers is cyclic, so any least-recently-used cache misses every time; a fixed pinned
set saves exactly its own bytes (see docs/architecture.md). What streams is spread evenly along the
pass, so that a small window hides the computation of what is pinned.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from edgert.errors import CapacityError

# Read-ahead beyond the piece in use and the one behind it: covers the compute between two reads.
READ_AHEAD_BYTES = 12 << 20
# Looked-up rows of a table (token embeddings) that are kept before all are dropped.
MOST_ROWS_BYTES = 8 << 20
_READ_AHEAD_SHARE = 8
_ALWAYS_PINNED_BYTES = 256 << 10
_ALWAYS_PINNED_SHARE = 512
_OUTLIER_FACTOR = 2


@dataclass(frozen=True, slots=True)
class Item:
    """A weight that a pass uses, in order of use.

    Attributes:
        name: The tensor.
        size_bytes: The memory it takes, pages around it included.
        must_pin: Whether it cannot stream (viewed by other tensors, used more than once).
    """

    name: str
    size_bytes: int
    must_pin: bool = False


@dataclass(frozen=True, slots=True)
class Residency:
    """What stays and what streams.

    Attributes:
        pinned: Names that stay.
        streamed: Names that stream, in order of use.
        ring_bytes: The window they pass through.
        pinned_bytes: Memory of the pinned ones.
    """

    pinned: frozenset[str]
    streamed: tuple[str, ...]
    ring_bytes: int
    pinned_bytes: int


def choose_residency(
    items: Sequence[Item], available_bytes: int, *, any_order: bool = False
) -> Residency:
    """Pin as many bytes as fit beside the window that the rest needs.

    Args:
        items: In order of use.
        available_bytes: Memory for pinned weights and the window.
        any_order: Whether the window must do for any order of use, because it is only guessed here.

    Raises:
        CapacityError: not even the weights that must stay and a window for the rest fit.
    """
    total = sum(item.size_bytes for item in items)
    if total <= available_bytes:
        return Residency(frozenset(item.name for item in items), (), 0, total)
    must = {item.name for item in items if item.must_pin}
    needed = _Budget(tuple(items), available_bytes, 0, any_order).needed(must)
    if needed > available_bytes:
        raise CapacityError(
            f"weights need at least {needed:,} bytes at once, "
            f"{max(0, available_bytes):,} are left for them",
            hint="raise --memory, or lower --ctx-size or --ubatch-size",
            needed_bytes=needed,
            available_bytes=max(0, available_bytes),
        )
    ahead = min(READ_AHEAD_BYTES, available_bytes // _READ_AHEAD_SHARE, available_bytes - needed)
    budget = _Budget(tuple(items), available_bytes, ahead, any_order)
    small = min(_ALWAYS_PINNED_BYTES, available_bytes // _ALWAYS_PINNED_SHARE)
    pinned = must | {item.name for item in items if item.size_bytes <= small}
    if not budget.fits(pinned):
        pinned = must
    pinned |= _outliers(budget, pinned)
    pinned |= _spread(budget, pinned)
    pinned |= _fill(budget, pinned)
    streamed = tuple(item.name for item in items if item.name not in pinned)
    pinned_bytes = sum(item.size_bytes for item in items if item.name in pinned)
    return Residency(frozenset(pinned), streamed, budget.ring(pinned), pinned_bytes)


def least_window(sizes_bytes: Sequence[int]) -> int:
    """Return the smallest window for streamed weights of these sizes, in order of use.

    The weight in use and the one after it, for any neighbours of the cycle.
    """
    sizes = list(sizes_bytes)
    neighbours = zip(sizes, sizes[1:] + sizes[:1], strict=True)
    return min(max((first + second for first, second in neighbours), default=0), sum(sizes))


def safe_window(sizes_bytes: Sequence[int]) -> int:
    """Return a window that suffices in whatever order the weights are used: the two largest."""
    return sum(sorted(sizes_bytes)[-2:])


@dataclass(frozen=True, slots=True)
class _Budget:
    """Items in order of use, and what there is for them."""

    items: tuple[Item, ...]
    available_bytes: int
    read_ahead_bytes: int
    any_order: bool

    def ring(self, pinned: set[str]) -> int:
        """Return the window: the largest two neighbours of the cycle, and some read-ahead."""
        sizes = [item.size_bytes for item in self.items if item.name not in pinned]
        window_bytes = least_window(sizes) + self.read_ahead_bytes
        if self.any_order:
            window_bytes = max(window_bytes, safe_window(sizes))
        return min(window_bytes, sum(sizes))

    def needed(self, pinned: set[str]) -> int:
        """Return the memory of a pinned set and the window for the rest."""
        kept = sum(item.size_bytes for item in self.items if item.name in pinned)
        return kept + self.ring(pinned)

    def fits(self, pinned: set[str]) -> bool:
        """Say whether a pinned set and its window fit."""
        return self.needed(pinned) <= self.available_bytes


class _Window:
    """The weights that stream while more are pinned: a cycle from which weights are taken."""

    def __init__(self, budget: _Budget, pinned: set[str]) -> None:
        self._budget = budget
        self._sizes = [item.size_bytes for item in budget.items]
        free = [i for i, item in enumerate(budget.items) if item.name not in pinned]
        self._before = dict(zip(free, free[-1:] + free[:-1], strict=True))
        self._after = dict(zip(free, free[1:] + free[:1], strict=True))
        self._free_bytes = sum(self._sizes[i] for i in free)
        self._kept_bytes = sum(self._sizes) - self._free_bytes
        self._singles = sorted(self._sizes[i] for i in free)
        self._pairs = sorted(self._pair(i, self._after[i]) for i in free)

    def _pair(self, one: int, other: int) -> int:
        return self._sizes[one] + self._sizes[other]

    def pin(self, index: int) -> bool:
        """Pin a weight if it and the window for the rest fit then, else change nothing."""
        before, after = self._before[index], self._after[index]
        gone = sorted((self._pair(before, index), self._pair(index, after)), reverse=True)
        joined = self._pair(before, after)
        if before == index:  # the last one
            gone, joined = gone[:1], 0
        size = self._sizes[index]
        pair = max(_largest(self._pairs, gone, 1)[0], joined)
        free_bytes = self._free_bytes - size
        window_bytes = min(pair, free_bytes) + self._budget.read_ahead_bytes
        if self._budget.any_order:
            window_bytes = max(window_bytes, sum(_largest(self._singles, [size], 2)))
        needed_bytes = self._kept_bytes + size + min(window_bytes, free_bytes)
        if needed_bytes > self._budget.available_bytes:
            return False
        self._free_bytes, self._kept_bytes = free_bytes, self._kept_bytes + size
        self._after[before], self._before[after] = after, before
        del self._singles[bisect_left(self._singles, size)]
        for pair in gone:
            del self._pairs[bisect_left(self._pairs, pair)]
        if joined:
            insort(self._pairs, joined)
        return True


def _largest(ascending: Sequence[int], gone: Sequence[int], count: int) -> list[int]:
    """Return the largest of a sorted list without some of its values."""
    left, found = list(gone), []
    for value in reversed(ascending):
        if value in left:
            left.remove(value)
            continue
        found.append(value)
        if len(found) == count:
            return found
    return found or [0]


def _outliers(budget: _Budget, pinned: set[str]) -> set[str]:
    """Pin the few weights that are much larger than the rest: the window must hold the largest."""
    chosen: set[str] = set()
    free = sorted((i for i in budget.items if i.name not in pinned), key=lambda i: -i.size_bytes)
    for position, item in enumerate(free[:-1]):
        rest = free[position + 1 :]
        typical = rest[len(rest) // 8].size_bytes
        if item.size_bytes <= _OUTLIER_FACTOR * typical:
            break
        if not budget.fits(pinned | chosen | {item.name}):
            break
        chosen.add(item.name)
    return chosen


def _spread(budget: _Budget, pinned: set[str]) -> set[str]:
    """Pin an even share of what is left, by error diffusion along the order of use."""
    free = [item for item in budget.items if item.name not in pinned]
    room = budget.available_bytes - budget.needed(pinned)
    share = min(1.0, room / max(1, sum(item.size_bytes for item in free)))
    chosen: set[str] = set()
    window, debt = _Window(budget, pinned), 0.0
    for index, item in enumerate(budget.items):
        if item.name in pinned:
            continue
        debt += share * item.size_bytes
        if debt < item.size_bytes or room < item.size_bytes:
            continue
        # Pinning one of two small neighbours can bring two large ones together in the window.
        if window.pin(index):
            chosen.add(item.name)
            debt -= item.size_bytes
            room -= item.size_bytes
    return chosen


def _fill(budget: _Budget, pinned: set[str]) -> set[str]:
    """Use what the even spread left over, largest first."""
    chosen: set[str] = set()
    window = _Window(budget, pinned)
    for index, item in sorted(enumerate(budget.items), key=lambda pair: -pair[1].size_bytes):
        if item.name not in pinned and window.pin(index):
            chosen.add(item.name)
    return chosen
