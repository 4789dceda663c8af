"""Decides, before anything is read, which memory experts get and how they will lie in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgert.errors import CapacityError
from edgert.experts.arena import Form, PoolPlan, forms_of, plan_pools
from edgert.experts.routed import Turn, find_turns, stacks_of
from edgert.experts.scores import DEFAULT_POLICY, Policy
from edgert.llama.lib import LlamaLibrary
from edgert.llama.options import Placement
from edgert.weights.pinning import Pinned, collect, staging_bytes
from edgert.weights.placement import check_cache
from edgert.weights.repack import Repacker
from edgert.weights.source import WeightSource
from edgert.weights.streaming import weights_to_place
from edgert.weights.uses import WeightUse
from partition.expert_slots import least_cache_bytes, loading_bytes
from partition.residency import Residency, choose_residency


@dataclass(frozen=True, slots=True)
class ExpertPlan:
    """What is decided.

    Attributes:
        turns: Layers with experts.
        forms: How each stack lies.
        pools: Their memory.
        pinned: What stays, in order of use.
        residency: Of everything that is not routed.
        chosen: Repacking buffer types of what is repacked on the way in, by name.
        n_used: Experts that one token chooses.
        policy: What is dropped first.
    """

    turns: tuple[Turn, ...]
    forms: tuple[Form, ...]
    pools: tuple[PoolPlan, ...]
    pinned: tuple[Pinned, ...]
    residency: Residency
    chosen: Mapping[str, int]
    n_used: int
    policy: Policy = DEFAULT_POLICY

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache."""
        return sum(pool.stride_bytes * pool.n_slots for pool in self.pools)

    @property
    def peak_bytes(self) -> int:
        """Most memory of weights; the cache fills only after what stays was repacked."""
        later = self.cache_bytes + _loading_bytes(self.forms)
        kept = self.residency.pinned_bytes + self.residency.ring_bytes
        return kept + max(later, staging_bytes(self.pinned))

    @property
    def repacked(self) -> bool:
        """Whether weights are repacked on the way in."""
        return bool(self.chosen)


def has_experts(uses: Mapping[str, WeightUse]) -> bool:
    """Say whether any weight is a stack of routed experts."""
    return any(use.routed_by for use in uses.values())


def plan_experts(
    library: LlamaLibrary,
    uses: Mapping[str, WeightUse],
    n_used: int,
    source: WeightSource,
    repacker: Repacker,
    left_bytes: int,
) -> ExpertPlan:
    """Pin what every token uses, give the rest of the memory to experts.

    Weights are repacked on the way in, for the faster kernels, unless something that is not routed
    has to stream.

    Args:
        library: The checked libraries.
        uses: Every weight.
        n_used: Experts that one token chooses.
        source: Where weights are read.
        repacker: Knows which of them have repacked kernels.
        left_bytes: For all weights.

    Raises:
        CapacityError: not even one token's experts fit beside a window for the rest.
    """
    turns = find_turns(uses)
    stacks = stacks_of(turns)
    dense = {name: use for name, use in uses.items() if not use.routed_by}
    chosen = repacker.choose(uses)
    repack = source.layout == "file"
    forms = forms_of(library, source, stacks, chosen, repack=repack)
    if repack:
        pinned = repacked_weights(source, dense, chosen, repacker)
        pinned_bytes = sum(weight.memory_bytes for weight in pinned)
        loading = _loading_bytes(forms)
        least = max(_least(forms, n_used) + loading, staging_bytes(pinned))
        if pinned_bytes + least <= left_bytes:
            residency = Residency(frozenset(w.use.name for w in pinned), (), 0, pinned_bytes)
            pools = plan_pools(forms, n_used, left_bytes - pinned_bytes - loading)
            return ExpertPlan(turns, forms, pools, pinned, residency, chosen, n_used)
        forms = forms_of(library, source, stacks, {}, repack=False)
    least = _least(forms, n_used)
    residency = beside_experts(source, dense, left_bytes, least)
    pools = plan_pools(forms, n_used, left_bytes - residency.pinned_bytes - residency.ring_bytes)
    kept = collect(source, uses, sorted(residency.pinned))
    return ExpertPlan(turns, forms, pools, tuple(kept), residency, {}, n_used)


def obey_experts(
    library: LlamaLibrary,
    uses: Mapping[str, WeightUse],
    n_used: int,
    weights: tuple[WeightSource, Repacker],
    placement: Placement,
    residency: Residency,
) -> ExpertPlan:
    """Cache what a manifest caches, in the layout and the memory that it names.

    Args:
        library: The checked libraries.
        uses: Every weight.
        n_used: Experts that one token chooses.
        weights: Where they are read, and what knows which have repacked kernels.
        placement: What was decided.
        residency: Of everything that is not cached.

    Raises:
        PlanError: the cache is smaller than one token's experts.
    """
    source, repacker = weights
    turns = find_turns({name: uses[name] for name in placement.cached})
    chosen = repacker.choose(uses)
    repack = placement.layout == "repacked"
    forms = forms_of(library, source, stacks_of(turns), chosen, repack=repack)
    check_cache(placement, _least(forms, n_used))
    pools = plan_pools(forms, n_used, placement.cache_bytes)
    if not repack:
        kept = tuple(collect(source, uses, sorted(residency.pinned)))
        return ExpertPlan(turns, forms, pools, kept, residency, {}, n_used)
    pinned = repacked_weights(source, {n: uses[n] for n in residency.pinned}, chosen, repacker)
    pinned_bytes = sum(weight.memory_bytes for weight in pinned)
    residency = Residency(residency.pinned, (), 0, pinned_bytes)
    return ExpertPlan(turns, forms, pools, pinned, residency, chosen, n_used)


def _least(forms: Sequence[Form], n_used: int) -> int:
    return least_cache_bytes([form.slot_use for form in forms], n_used)


def _loading_bytes(forms: Sequence[Form]) -> int:
    """Return what repacking experts on the way in takes beside their slots."""
    return loading_bytes([form.file_bytes for form in forms if form.repack])


def repacked_weights(
    source: WeightSource,
    dense: Mapping[str, WeightUse],
    chosen: Mapping[str, int],
    repacker: Repacker,
) -> tuple[Pinned, ...]:
    """Return weights as they lie when all of them stay."""
    weights = []
    for use in sorted(dense.values(), key=lambda use: use.order):
        if use.rows_only:
            continue
        buft = chosen.get(use.name)
        size = None if buft is None else repacker.packed_bytes(use, buft)
        weights.append(Pinned(use, source.original(use.name), size))
    return tuple(weights)


def beside_experts(
    source: WeightSource, dense: Mapping[str, WeightUse], left_bytes: int, least_bytes: int
) -> Residency:
    """Place what is not routed beside the smallest cache."""
    try:
        return choose_residency(weights_to_place(source, dict(dense)), left_bytes - least_bytes)
    except CapacityError as error:
        needed = (error.needed_bytes or 0) + least_bytes
        raise CapacityError(
            f"weights need at least {needed:,} bytes at once, {least_bytes:,} of them for one "
            f"token's experts; {left_bytes:,} are left",
            needed_bytes=needed,
            available_bytes=left_bytes,
            hint="raise --memory, or lower --ctx-size or --ubatch-size",
        ) from error
