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
        level: Of nested experts, which of their widths.
    """

    turn: int
    n_experts: int
    stride_bytes: int
    level: int = 0


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


def assembling_bytes(expert_bytes: Sequence[int]) -> int:
    """Return what making blocks of planes takes: an area for each thread that brings experts.

    Args:
        expert_bytes: One expert of each stack in the file, every plane of it.
    """
    area = max((slot_stride(size, repacked=True) for size in expert_bytes), default=0)
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


def share_level_slots(
    uses: Sequence[SlotUse], shares: Sequence[float], n_used: int, budget_bytes: int | None
) -> dict[int, int]:
    """Share a budget among slots of every length, of nested experts.

    Args:
        uses: Every stack at every level.
        shares: How much of all use is at each level.
        n_used: Experts that one token chooses.
        budget_bytes: For all of them, never exceeded; None for the least there can be.

    Returns:
        Slots by stride, ascending.

    Raises:
        CapacityError: one token's experts would not fit, whatever their widths.
    """
    least = _least(uses, n_used)
    needed = sum(stride * n_slots for stride, n_slots in least.items())
    budget_bytes = needed if budget_bytes is None else budget_bytes
    if needed > budget_bytes:
        raise CapacityError(
            f"one token's experts need {needed:,} bytes, {budget_bytes:,} are left for them",
            needed_bytes=needed,
            available_bytes=budget_bytes,
            hint="raise --memory, use fewer --expert-bits, or lower --ctx-size",
        )
    most, weight = dict.fromkeys(least, 0), dict.fromkeys(least, 0.0)
    for use in uses:
        most[use.stride_bytes] += use.n_experts
        weight[use.stride_bytes] += use.stride_bytes * shares[use.level]
    left, slots = budget_bytes - needed, dict(least)
    for _ in least:  # what one pool cannot use goes to the others
        open_ = [stride for stride in least if slots[stride] < most[stride]]
        total = sum(weight[stride] for stride in open_)
        if not total or left <= 0:
            break
        given = {s: min(most[s] - slots[s], int(left * weight[s] / total) // s) for s in open_}
        for stride, n_slots in given.items():
            slots[stride] += n_slots
            left -= stride * n_slots
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
