"""Experts behind a cache: what of a stage stays beside it, and how large it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgert.errors import CapacityError
from partition.expert_slots import (
    SlotUse,
    least_cache_bytes,
    loading_bytes,
    share_slots,
    slot_stride,
)
from partition.language_workload import TensorWork
from partition.manifest import ExpertCache, Tiers
from partition.stage_tiers import StageWeights, choose_tiers, staging_bytes
from quant.formats import format_of, type_named

_F32 = 4
_Q8_BYTES_BY_ELEMENT = 2  # at most: activations as 8-bit blocks


@dataclass(frozen=True, slots=True)
class CachedStage:
    """Where the weights of a stage with a cache live.

    Attributes:
        tiers: By name.
        working_bytes: Besides the cache: areas to repack experts in, and products in rounds.
    """

    tiers: Tiers
    working_bytes: int


def expert_stacks(weights: StageWeights) -> tuple[TensorWork, ...]:
    """Return the routed weights of a stage."""
    return tuple(tensor for tensor in weights.whole if tensor.role == "experts")


def without_experts(weights: StageWeights) -> StageWeights:
    """Return what every token uses."""
    dense = tuple(tensor for tensor in weights.whole if tensor.role != "experts")
    return StageWeights(dense, weights.looked_up)


def cached_stage(
    weights: StageWeights, available_bytes: int, n_tokens: int, *, repacks: bool
) -> CachedStage:
    """Pin what every token uses; experts share what is left as a cache.

    It is all repacked on the way in where it fits like that, as the runtime does it. Where not all
    of that fits, the cache is as small as it can be and the rest streams beside it.

    Args:
        weights: Of the stage.
        available_bytes: For weights, and for what working with them takes.
        n_tokens: Computed at once.
        repacks: Whether the device has kernels for interleaved rows.

    Raises:
        CapacityError: not even a window and the least cache fit.
    """
    stacks, dense = expert_stacks(weights), without_experts(weights)
    n_used = n_used_of(stacks)
    least = least_of(stacks)
    if repacks:
        loading = loading_bytes([expert_bytes(tensor) for tensor in stacks])
        needed = max(least + loading, staging_bytes(dense))
        if dense.whole_bytes + needed <= available_bytes:
            left = available_bytes - dense.whole_bytes - loading
            found = _share(stacks, n_used, left, n_tokens, repacked=True)
            if found is not None:
                every = tuple(sorted(tensor.name for tensor in dense.whole))
                looked_up = tuple(sorted(tensor.name for tensor in dense.looked_up))
                tiers = Tiers(layout="repacked", pinned=every, looked_up=looked_up)
                return CachedStage(_with_cache(tiers, stacks, found[0]), loading + found[1])
    most_work = rounds_bytes(stacks, n_tokens)
    try:
        tiers, residency = choose_tiers(dense, available_bytes - least - most_work)
    except CapacityError as error:
        raise CapacityError(
            f"{error.message} beside {least + most_work:,} for one token's experts of a layer",
            needed_bytes=(error.needed_bytes or 0) + least + most_work,
            available_bytes=available_bytes,
        ) from error
    left = available_bytes - residency.pinned_bytes - residency.ring_bytes
    cache_bytes, work = _share(stacks, n_used, left, n_tokens, repacked=False) or (least, most_work)
    return CachedStage(_with_cache(tiers, stacks, cache_bytes), work)


def slot_uses(stacks: Sequence[TensorWork], *, repacked: bool) -> tuple[SlotUse, ...]:
    """Return what stacks want of a cache; layers are told apart by their names."""
    turns = list(dict.fromkeys(layer_name(tensor) for tensor in stacks))
    return tuple(
        SlotUse(
            turns.index(layer_name(tensor)), tensor.shape[-1],
            slot_stride(expert_bytes(tensor), repacked=repacked),
        )
        for tensor in stacks
    )  # fmt: skip


def least_of(stacks: Sequence[TensorWork]) -> int:
    """Return a cache that suffices however the runtime lays experts out."""
    n_used = n_used_of(stacks)
    return max(
        least_cache_bytes(slot_uses(stacks, repacked=repacked), n_used)
        for repacked in (False, True)
    )


def held_share(stacks: Sequence[TensorWork], tiers: Tiers) -> float:
    """Return which part of all experts the cache of these tiers holds at once."""
    if tiers.experts is None or not stacks:
        return 0.0
    uses = slot_uses(stacks, repacked=tiers.layout == "repacked")
    slots = share_slots(uses, n_used_of(stacks), tiers.experts.cache_bytes)
    return sum(slots.values()) / sum(use.n_experts for use in uses)


def expert_bytes(tensor: TensorWork) -> int:
    """Return one expert of a stack."""
    return tensor.size_bytes // tensor.shape[-1]


def n_used_of(stacks: Sequence[TensorWork]) -> int:
    """Return how many experts one token wants, 0 without any."""
    return max((round(tensor.share * tensor.shape[-1]) for tensor in stacks), default=0)


def rounds_bytes(stacks: Sequence[TensorWork], n_tokens: int) -> int:
    """Return what products take whose experts do not fit at once (edgert/experts/partial.py).

    The rows of a group are gathered, copied and multiplied beside llama.cpp's own buffers.
    """
    widest = max((_row_bytes(tensor) for tensor in stacks), default=0)
    return n_tokens * n_used_of(stacks) * widest


def _row_bytes(tensor: TensorWork) -> int:
    row_length, n_columns = tensor.shape[0], tensor.shape[1]
    return _F32 * (2 * row_length + n_columns) + _Q8_BYTES_BY_ELEMENT * row_length


def _share(
    stacks: Sequence[TensorWork], n_used: int, left_bytes: int, n_tokens: int, *, repacked: bool
) -> tuple[int, int] | None:
    """Return the bytes of the cache and of rounds, None where they do not fit together."""
    uses = slot_uses(stacks, repacked=repacked)
    strides = sorted({use.stride_bytes for use in uses})
    whole_bytes = sum(use.n_experts * use.stride_bytes for use in uses)
    wanted = min(max(use.n_experts for use in uses), n_tokens * n_used)
    at_once = {s: _at_once(uses, s) for s in strides}
    for work_bytes in (0, rounds_bytes(stacks, n_tokens)):
        cache_bytes = min(whole_bytes, left_bytes - work_bytes)
        try:
            slots = share_slots(uses, n_used, cache_bytes)
        except CapacityError:
            continue
        if work_bytes or all(slots[s] >= wanted * at_once[s] for s in strides):
            return cache_bytes, work_bytes
    return None


def _at_once(uses: Sequence[SlotUse], stride_bytes: int) -> int:
    turns = [use.turn for use in uses if use.stride_bytes == stride_bytes]
    return max(turns.count(turn) for turn in set(turns))


def _with_cache(tiers: Tiers, stacks: Sequence[TensorWork], cache_bytes: int) -> Tiers:
    bits = {round(format_of(type_named(t.type_name)).bits_per_weight) for t in stacks}
    experts = ExpertCache(cache_bytes=cache_bytes, bits=tuple(sorted(bits)))
    names = tuple(tensor.name for tensor in stacks)
    return tiers.model_copy(update={"cached": names, "experts": experts})


def layer_name(tensor: TensorWork) -> str:
    """Tell a tensor's layer from its name; one outside of layers is a layer of its own."""
    return tensor.name.split(".")[1] if tensor.name.startswith("blk.") else tensor.name
