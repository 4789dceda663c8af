"""Slots of an expert cache: their length and how many a budget makes; pure arithmetic.

The one rule for planner and runtime, as `partition.residency` is for what stays and what streams.
A slot holds one expert of one stack. Stacks of equal stride share a pool.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgert.errors import CapacityError

N_LOADERS = 3  # threads that bring experts (edgert/experts/loads.py)
_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class SlotUse:
    """What one stack wants of a cache.

    Attributes:
        turn: Its layer; the stacks of a layer are wanted together.
        n_experts: Matrices in it.
        stride_bytes: Length of a slot for one of them.
    """

    turn: int
    n_experts: int
    stride_bytes: int


def slot_stride(expert_bytes: int, *, repacked: bool, page_bytes: int = _PAGE_BYTES) -> int:
    """Return the length of a slot, whole pages.

    Args:
        expert_bytes: One expert of a stack.
        repacked: Whether it is repacked on the way in; else it is read with the pages around it.
        page_bytes: Of the host.
    """
    return -(-(expert_bytes + (0 if repacked else page_bytes - 1)) // page_bytes) * page_bytes


def least_cache_bytes(stacks: Sequence[SlotUse], n_used: int) -> int:
    """Return the smallest cache: in each pool one token's experts of every stack of a layer."""
    return sum(stride * n_slots for stride, n_slots in _least(stacks, n_used).items())


def loading_bytes(repacked_expert_bytes: Sequence[int]) -> int:
    """Return what repacking experts on the way in takes: an area for each thread that brings them.

    Args:
        repacked_expert_bytes: One expert of each stack that is repacked.
    """
    area = max((slot_stride(size, repacked=False) for size in repacked_expert_bytes), default=0)
    return N_LOADERS * (area + _PAGE_BYTES) if area else 0


def share_slots(stacks: Sequence[SlotUse], n_used: int, budget_bytes: int) -> dict[int, int]:
    """Share a budget among pools by what their stacks weigh.

    Args:
        stacks: Every stack.
        n_used: Experts that one token chooses.
        budget_bytes: For all pools together, never exceeded.

    Returns:
        Slots by stride, ascending.

    Raises:
        CapacityError: a pool would not hold one token's experts of one layer.
    """
    least = _least(stacks, n_used)
    most = {s: sum(one.n_experts for one in stacks if one.stride_bytes == s) for s in least}
    needed = sum(stride * least[stride] for stride in least)
    if needed > budget_bytes:
        raise CapacityError(
            f"one token's experts need {needed:,} bytes, {budget_bytes:,} are left for them",
            needed_bytes=needed,
            available_bytes=budget_bytes,
            hint="raise --memory, or lower --ctx-size or --ubatch-size",
        )
    total = sum(stride * most[stride] for stride in least)
    spare = budget_bytes - needed
    rest = max(total - needed, 1)
    slots = {}
    for stride, n_least in least.items():
        share = spare * (stride * (most[stride] - n_least)) // rest
        slots[stride] = min(most[stride], n_least + max(0, share) // stride)
    return slots


def _least(stacks: Sequence[SlotUse], n_used: int) -> dict[int, int]:
    """Return the fewest slots of each stride, ascending."""
    return {
        stride: n_used * _most_at_once([one for one in stacks if one.stride_bytes == stride])
        for stride in sorted({one.stride_bytes for one in stacks})
    }


def _most_at_once(stacks: Sequence[SlotUse]) -> int:
    """Return how many stacks of one layer share a pool, at most."""
    turns = [one.turn for one in stacks]
    return max(turns.count(turn) for turn in set(turns))
