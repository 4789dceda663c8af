"""Decides which weights stay in memory and which stream past; pure arithmetic.

A pass over the layers is cyclic, so any least-recently-used cache misses every time; a fixed pinned
set saves exactly its own bytes (see docs/architecture.md). What streams is spread evenly along the
pass, so that a small window hides the computation of what is pinned.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgert.errors import CapacityError

# Read-ahead beyond the piece in use and the one behind it: covers the compute between two reads.
_READ_AHEAD_BYTES = 12 << 20
_ALWAYS_PINNED_BYTES = 256 << 10
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


def choose_residency(items: Sequence[Item], available_bytes: int) -> Residency:
    """Pin as many bytes as fit beside the window that the rest needs.

    Args:
        items: In order of use.
        available_bytes: Memory for pinned weights and the window.

    Raises:
        CapacityError: not even the weights that must stay and a window for the rest fit.
    """
    total = sum(item.size_bytes for item in items)
    if total <= available_bytes:
        return Residency(frozenset(item.name for item in items), (), 0, total)
    pinned = {i.name for i in items if i.must_pin or i.size_bytes <= _ALWAYS_PINNED_BYTES}
    pinned |= _outliers(items, pinned, available_bytes)
    needed = _needed(items, pinned)
    if needed > available_bytes:
        raise CapacityError(
            f"weights need at least {needed:,} bytes at once, {available_bytes:,} are left for them",
            needed_bytes=needed,
            available_bytes=available_bytes,
        )
    pinned |= _spread(items, pinned, available_bytes)
    pinned |= _fill(items, pinned, available_bytes)
    streamed = tuple(item.name for item in items if item.name not in pinned)
    pinned_bytes = sum(item.size_bytes for item in items if item.name in pinned)
    return Residency(frozenset(pinned), streamed, _ring(items, pinned), pinned_bytes)


def _outliers(items: Sequence[Item], pinned: set[str], available_bytes: int) -> set[str]:
    """Pin the few weights that are much larger than the rest: the window must hold the largest."""
    chosen: set[str] = set()
    free = sorted((i for i in items if i.name not in pinned), key=lambda i: -i.size_bytes)
    for position, item in enumerate(free[:-1]):
        rest = free[position + 1 :]
        typical = rest[len(rest) // 8].size_bytes
        if item.size_bytes <= _OUTLIER_FACTOR * typical:
            break
        if _needed(items, pinned | chosen | {item.name}) > available_bytes:
            break
        chosen.add(item.name)
    return chosen


def _spread(items: Sequence[Item], pinned: set[str], available_bytes: int) -> set[str]:
    """Pin an even share of what is left, by error diffusion along the order of use."""
    free = [item for item in items if item.name not in pinned]
    room = available_bytes - _needed(items, pinned)
    share = min(1.0, room / max(1, sum(item.size_bytes for item in free)))
    chosen: set[str] = set()
    debt = 0.0
    for item in free:
        debt += share * item.size_bytes
        if debt >= item.size_bytes and room >= item.size_bytes:
            chosen.add(item.name)
            debt -= item.size_bytes
            room -= item.size_bytes
    return chosen


def _fill(items: Sequence[Item], pinned: set[str], available_bytes: int) -> set[str]:
    """Use what the even spread left over, largest first."""
    chosen: set[str] = set()
    for item in sorted(items, key=lambda i: -i.size_bytes):
        if item.name not in pinned and _fits(items, pinned | chosen | {item.name}, available_bytes):
            chosen.add(item.name)
    return chosen


def _fits(items: Sequence[Item], pinned: set[str], available_bytes: int) -> bool:
    return _needed(items, pinned) <= available_bytes


def _needed(items: Sequence[Item], pinned: set[str]) -> int:
    return sum(i.size_bytes for i in items if i.name in pinned) + _ring(items, pinned)


def _ring(items: Sequence[Item], pinned: set[str]) -> int:
    """Return the window: the largest two neighbours of the cycle, and some read-ahead."""
    sizes = [item.size_bytes for item in items if item.name not in pinned]
    if not sizes:
        return 0
    pairs = (first + second for first, second in zip(sizes, sizes[1:] + sizes[:1], strict=True))
    return min(max(pairs) + _READ_AHEAD_BYTES, sum(sizes))
