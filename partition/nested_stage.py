"""A stage whose experts are nested: its cache in the widths of a rule, and what is read past it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from edgert.errors import CapacityError
from partition.build_problem import Place
from partition.cached_tiers import n_used_of, rounds_bytes
from partition.expert_misses import Demand, Misses
from partition.expert_slots import SlotUse, assembling_bytes, share_level_slots
from partition.forecast import forecast_stage
from partition.language_workload import LanguageWorkload, TensorWork
from partition.manifest import ExpertCache, Tiers
from partition.nested_widths import NestedWork, as_read
from partition.settings import Prepared
from partition.stage_plan import StagePlan
from partition.stage_tiers import StageWeights, choose_tiers, stage_weights, staging_bytes
from partition.units import Unit, UnitChain

# Of one thread, in bytes read; measured with 768 x 2048 weights. Fifth bits have their own field.
_ASSEMBLED_BYTES_PER_S = 1.1e9
_FIFTH_BITS_BYTES_PER_S = 0.3e9


@dataclass(frozen=True, slots=True)
class NestedRoom:
    """What a stage keeps where, and how many slots its cache has.

    Attributes:
        tiers: By name.
        slots: By their length.
        working_bytes: Besides the cache: areas to make blocks in, and products computed apart.
    """

    tiers: Tiers
    slots: Mapping[int, int]
    working_bytes: int


def plan_nested_stage(
    workload: LanguageWorkload,
    work: NestedWork,
    prepared: Prepared,
    place: Place,
    weight_bytes: int | None,
) -> StagePlan:
    """Plan the whole model as one stage.

    Args:
        workload: The model as its file has it.
        work: Its nested experts.
        prepared: Counted for a setting, experts as they are computed.
        place: The processor at home.
        weight_bytes: Memory for weights; None for all there is.

    Raises:
        CapacityError: not even a window and the least cache fit.
    """
    chain, overheads = prepared.chain, prepared.overheads
    n_layers = len(workload.run_layers)
    weights = stage_weights(workload, 0, n_layers, head=True)
    kv_bytes = sum(unit.kept_bytes for unit in chain.units)
    fixed_bytes = overheads.buffer_bytes + overheads.program_bytes
    fixed_bytes += int(place.host.process_bytes.value)
    available = place.host.pool(place.device.pool_id).available_bytes - fixed_bytes - kv_bytes
    room = nested_room(
        weights, work, available if weight_bytes is None else min(available, weight_bytes),
        overheads.n_tokens,
    )  # fmt: skip
    missed = nested_misses(chain, chain.units, work.of(weights.whole), work, room.slots)
    read = replace(weights, whole=as_read(weights.whole, work))
    return StagePlan(
        place=place, first_layer=0, end_layer=n_layers, head=True, weights=weights,
        tiers=room.tiers, kv_bytes=kv_bytes, fixed_bytes=fixed_bytes,
        buffer_bytes=overheads.buffer_bytes,
        forecast=forecast_stage(
            place, chain.units, read, room.tiers, missed, _assembled(weights, work)
        ),
        working_bytes=room.working_bytes,
    )  # fmt: skip


def nested_room(
    weights: StageWeights, work: NestedWork, available_bytes: int, n_tokens: int
) -> NestedRoom:
    """Pin what every token uses, give the rest to experts, as the runtime does it by itself.

    What every token uses is repacked on the way in where all of it fits beside the least cache.

    Args:
        weights: Of the stage, as the file has them.
        work: Its nested experts.
        available_bytes: For weights, and for what working with them takes.
        n_tokens: Computed at once.

    Raises:
        CapacityError: not even a window and the least cache fit.
    """
    stacks = work.of(weights.whole)
    whole = tuple(tensor for tensor in weights.whole if tensor.name not in work.stacks)
    dense = StageWeights(whole, weights.looked_up)
    uses, n_used = work.slot_uses(stacks), n_used_of(stacks)
    assembling = assembling_bytes([t.size_bytes // t.shape[-1] for t in stacks])
    working_bytes = assembling + _apart_bytes(stacks, work, n_tokens)
    least = _bytes_of(share_level_slots(uses, _even(work), n_used, None))
    beside = max(least + working_bytes, staging_bytes(dense))
    if dense.whole_bytes + beside <= available_bytes:
        names = tuple(sorted(tensor.name for tensor in dense.whole))
        looked_up = tuple(sorted(tensor.name for tensor in dense.looked_up))
        tiers = Tiers(layout="repacked", pinned=names, looked_up=looked_up)
        left = available_bytes - dense.whole_bytes - working_bytes
    else:
        beside = least + working_bytes
        try:
            tiers, residency = choose_tiers(dense, available_bytes - beside)
        except CapacityError as error:
            raise CapacityError(
                f"{error.message} beside {beside:,} for one token's experts of a layer",
                needed_bytes=(error.needed_bytes or 0) + beside,
                available_bytes=available_bytes,
            ) from error
        left = available_bytes - residency.pinned_bytes - residency.ring_bytes - working_bytes
    slots = share_level_slots(uses, _even(work), n_used, left)
    experts = ExpertCache(cache_bytes=_bytes_of(slots), bits=work.rule.widths, cuts=work.rule.cuts)
    cached = tuple(tensor.name for tensor in stacks)
    tiers = tiers.model_copy(update={"cached": cached, "experts": experts})
    return NestedRoom(tiers, slots, working_bytes)


def nested_misses(
    chain: UnitChain,
    units: Sequence[Unit],
    stacks: Sequence[TensorWork],
    work: NestedWork,
    slots: Mapping[int, int],
) -> Misses:
    """Return what the cache leaves to be read, as shares of all experts in the widest width.

    Each width is taken as a cache of its own, and in a prompt every expert as wanted in the widest:
    what is there in more bits than wanted, and planes that are there already, make it less.
    """
    demand = Demand(chain, units, max((t.shape[-1] for t in stacks), default=0))
    held = _held(work.slot_uses(stacks), work.shares, slots)
    top_bytes = work.read_bytes(stacks, len(work.shares) - 1) or 1
    decode = missed = every = empty = 0.0
    for level, share in enumerate(work.shares):
        part = work.read_bytes(stacks, level) / top_bytes
        absent, wanted = demand.missed(held[level], share), demand.missed(0.0, share)
        decode, empty = decode + part * absent, empty + part * wanted
        missed, every = missed + absent, every + wanted
    next_sweep = max(0.0, demand.last_sweep - held[-1])
    found = 1 - missed / every if every else 1.0
    return Misses(decode, demand.first_sweep, next_sweep, found, empty)


def _held(
    uses: Sequence[SlotUse], shares: Sequence[float], slots: Mapping[int, int]
) -> list[float]:
    """Return which part of all experts is held at each level; levels share slots by their use."""
    held, wanted = [0.0] * len(shares), [0.0] * len(shares)
    for stride, n_slots in slots.items():
        members = [use for use in uses if use.stride_bytes == stride]
        total = sum(use.n_experts * shares[use.level] for use in members) or 1.0
        for use in members:
            part = n_slots * use.n_experts * shares[use.level] / total
            everything = n_slots >= sum(other.n_experts for other in members)
            held[use.level] += use.n_experts if everything else min(use.n_experts, part)
            wanted[use.level] += use.n_experts
    return [have / want if want else 1.0 for have, want in zip(held, wanted, strict=True)]


def _even(work: NestedWork) -> list[float]:
    """Return how the runtime shares memory among widths (edgert/experts/nested_keeping.py)."""
    return [1.0 / len(work.rule.widths)] * len(work.rule.widths)


def _apart_bytes(stacks: Sequence[TensorWork], work: NestedWork, n_tokens: int) -> int:
    """Return what rows take that are computed apart: of other widths, or in rounds.

    And the blocks of one expert in fewer bits.
    """
    longest = max((use.stride_bytes for use in work.slot_uses(stacks)), default=0)
    return rounds_bytes(stacks, n_tokens) + longest


def _assembled(weights: StageWeights, work: NestedWork) -> float:
    """Return the bytes a second that a thread makes blocks of, in the slowest width there is."""
    types = {width.type_name for t in work.of(weights.whole) for width in work.levels(t)}
    fifth = any(name.startswith("q5") for name in types)
    return _FIFTH_BITS_BYTES_PER_S if fifth else _ASSEMBLED_BYTES_PER_S


def _bytes_of(slots: Mapping[int, int]) -> int:
    return sum(stride * n_slots for stride, n_slots in slots.items())
