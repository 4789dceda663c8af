"""The memory of this process: what it has taken, what it will take, what is left for weights."""

from __future__ import annotations

from dataclasses import dataclass

from edgert.errors import CapacityError
from edgert.weights.memory import resident_bytes, virtual_bytes

# Left alone for what cannot be measured before it happens: thread stacks, allocator arenas, text in
# Python, page tables.
_MARGIN_BYTES = 24 << 20
_MARGIN_SHARE = 0.01
_UNSTEADY_BYTES = 500_000  # the program takes so much more or less from run to run


@dataclass(frozen=True, slots=True)
class Footprint:
    """This process's memory at one moment."""

    resident_bytes: int
    virtual_bytes: int


def footprint() -> Footprint:
    """Measure this process now."""
    return Footprint(resident_bytes(), virtual_bytes())


def margin_bytes(memory_bytes: int) -> int:
    """Return what is left alone of a budget."""
    return _MARGIN_BYTES + int(memory_bytes * _MARGIN_SHARE)


def left_for_weights(
    memory_bytes: int, before: Footprint, after: Footprint, later_bytes: int
) -> int:
    """Return the bytes a budget leaves for weights.

    Args:
        memory_bytes: The bound on the whole process.
        before: Before the context was created.
        after: After; what it reserved but has not touched yet counts as taken.
        later_bytes: What is known to be allocated later, while running.

    Raises:
        CapacityError: nothing is left.
    """
    reserved = max(0, after.virtual_bytes - before.virtual_bytes)
    touched = max(0, after.resident_bytes - before.resident_bytes)
    taken = after.resident_bytes + max(0, reserved - touched) + later_bytes
    left = memory_bytes - taken - margin_bytes(memory_bytes)
    if left <= 0:
        raise CapacityError(
            f"process, KV cache and compute buffers need {taken + margin_bytes(memory_bytes):,} "
            f"bytes before any weight, --memory allows {memory_bytes:,}",
            needed_bytes=taken + margin_bytes(memory_bytes),
            available_bytes=memory_bytes,
            hint="raise --memory, or lower --ctx-size or --ubatch-size, "
            "or use --cache-type-k q8_0 --cache-type-v q8_0",
        )
    return left


def enough_memory(memory_bytes: int, over_bytes: int) -> str:
    """Return a bound, as a person writes it, that leaves `over_bytes` more for weights."""
    enough = memory_bytes + over_bytes / (1 - _MARGIN_SHARE) + _UNSTEADY_BYTES
    return f"{-(-int(enough) // 10**6)}M"


def check_cache(memory_bytes: int, cache_bytes: int, n_ctx: int) -> None:
    """Refuse a KV cache that cannot fit, before it is allocated and the process killed for it.

    Raises:
        CapacityError: process, margin and cache exceed the budget.
    """
    needed = resident_bytes() + margin_bytes(memory_bytes) + cache_bytes
    if needed > memory_bytes:
        raise CapacityError(
            f"a KV cache of {n_ctx} positions takes {cache_bytes:,} bytes; with the process itself "
            f"{needed:,} are needed, --memory allows {memory_bytes:,}",
            needed_bytes=needed,
            available_bytes=memory_bytes,
            hint="lower --ctx-size, use --cache-type-k q8_0 --cache-type-v q8_0, or raise --memory",
        )
