"""Runs a model whose experts are nested: in memory in the bits that their tokens are worth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from edgert.errors import ConfigError
from edgert.events import Listener, Notice
from edgert.experts.keeper import ExpertWeights
from edgert.experts.keeping import beside_streamer
from edgert.experts.loads import N_EARLY, N_URGENT, Loader
from edgert.experts.nested_arena import LevelForm, LevelPool, NestedArena, plan_level_pools
from edgert.experts.nested_cache import NestedCache
from edgert.experts.nested_streamer import NestedStreamer
from edgert.experts.partial import PartialProduct
from edgert.experts.planning import beside_experts, repacked_weights
from edgert.experts.routed import Turn, find_turns
from edgert.experts.scores import DEFAULT_POLICY, Policy, make_scores
from edgert.experts.tally import Tally
from edgert.experts.widths import WidthPolicy
from edgert.llama.ggml_graph import Processor
from edgert.llama.lib import LlamaLibrary
from edgert.llama.options import Placement
from edgert.observer import RunObserver
from edgert.units import format_bytes
from edgert.weights.flash import FlashReader
from edgert.weights.loading import LoadedModel
from edgert.weights.pinning import Pinned, collect, pin, staging_bytes
from edgert.weights.placement import check_cache, check_nested, obey
from edgert.weights.repack import Repacker
from edgert.weights.source import WeightSource
from edgert.weights.streaming import row_tables, weights_to_place
from partition.expert_slots import assembling_bytes
from partition.residency import Residency
from quant.nested.file import NestedModel, NestedTensor


@dataclass(frozen=True, slots=True)
class NestedPlan:
    """What is decided before anything is read.

    Attributes:
        turns: Layers with experts.
        forms: By stack, then by level.
        pools: Their memory.
        pinned: What stays.
        residency: Of everything that is not routed.
        repacked: Buffer types of what is repacked on the way in, by name.
        policy: Bits by routing weight.
        dropped_by: What has to leave the cache first.
    """

    turns: tuple[Turn, ...]
    forms: tuple[tuple[LevelForm, ...], ...]
    pools: tuple[LevelPool, ...]
    pinned: tuple[Pinned, ...]
    residency: Residency
    repacked: dict[str, int]
    policy: WidthPolicy
    dropped_by: Policy = DEFAULT_POLICY

    @property
    def peak_bytes(self) -> int:
        """Most memory of weights; the cache fills only after what stays was repacked."""
        cache_bytes = sum(pool.stride_bytes * pool.n_slots for pool in self.pools)
        kept = self.residency.pinned_bytes + self.residency.ring_bytes
        return kept + max(cache_bytes + _assembling(self.forms), staging_bytes(self.pinned))


NestedExperts = ExpertWeights[NestedPlan, NestedCache, NestedStreamer]


def plan_nested(
    loaded: LoadedModel,
    nested: NestedModel,
    policy: WidthPolicy,
    weights: tuple[WeightSource, Repacker],
    n_used: int,
    left_bytes: int | None,
) -> NestedPlan:
    """Pin what every token uses, give the rest of the memory to experts.

    Args:
        loaded: The model without weights.
        nested: Its experts.
        policy: Bits by routing weight.
        weights: Where the rest is read, and what knows which of it has repacked kernels.
        n_used: Experts that one token chooses.
        left_bytes: For all weights; None for no bound.

    Raises:
        ConfigError: a width that the file does not have.
        CapacityError: not even one token's experts fit beside a window for the rest.
    """
    source, repacker = weights
    uses = loaded.uses
    turns = find_turns(uses, nested.tensors)
    forms = _forms(turns, nested, policy)
    dense = {name: use for name, use in uses.items() if not use.routed_by}
    chosen = repacker.choose(dense)
    shares = _shares(policy)
    every = [form for levels in forms for form in levels]
    staging = _assembling(forms)
    most = sum(form.stride_bytes * form.stack.n_experts for form in every)
    pinned = repacked_weights(source, dense, chosen, repacker)
    pinned_bytes = sum(weight.memory_bytes for weight in pinned)
    if left_bytes is None:
        left_bytes = pinned_bytes + max(staging_bytes(pinned), staging + most)
    least = sum(p.stride_bytes * p.n_slots for p in plan_level_pools(forms, shares, n_used, None))
    if pinned_bytes + max(staging_bytes(pinned), least + staging) <= left_bytes:
        residency = Residency(frozenset(w.use.name for w in pinned), (), 0, pinned_bytes)
    else:
        chosen = {}
        residency = beside_experts(source, dense, left_bytes, least + staging)
        pinned = tuple(collect(source, uses, sorted(residency.pinned)))
    left = left_bytes - residency.pinned_bytes - residency.ring_bytes - staging
    pools = plan_level_pools(forms, shares, n_used, left)
    return NestedPlan(turns, forms, pools, pinned, residency, chosen, policy)


def obey_nested(
    loaded: LoadedModel,
    nested: NestedModel,
    policy: WidthPolicy,
    weights: tuple[WeightSource, Repacker],
    n_used: int,
    placement: Placement,
) -> NestedPlan:
    """Hold experts in the memory and everything else in the places that a manifest names.

    Args:
        loaded: The model without weights.
        nested: Its experts.
        policy: Bits by routing weight, of the manifest.
        weights: Where the rest is read, and what knows which of it has repacked kernels.
        n_used: Experts that one token chooses.
        placement: What was decided.

    Raises:
        ConfigError: a width that the file does not have.
        PlanError: the graph does not allow the placement, an expert has no place in the cache, or
            the cache is smaller than one token's experts.
    """
    source, repacker = weights
    uses = loaded.uses
    residency = obey(placement, weights_to_place(source, uses), uses)
    check_nested(placement, uses)
    turns = find_turns(uses, nested.tensors)
    forms = _forms(turns, nested, policy)
    shares = _shares(policy)
    least = plan_level_pools(forms, shares, n_used, None)
    check_cache(placement, sum(pool.stride_bytes * pool.n_slots for pool in least))
    pools = plan_level_pools(forms, shares, n_used, placement.cache_bytes)
    if placement.layout == "file":
        kept = tuple(collect(source, uses, sorted(residency.pinned)))
        return NestedPlan(turns, forms, pools, kept, residency, {}, policy)
    dense = {name: uses[name] for name in residency.pinned}
    chosen = repacker.choose(dense)
    pinned = repacked_weights(source, dense, chosen, repacker)
    pinned_bytes = sum(weight.memory_bytes for weight in pinned)
    residency = Residency(residency.pinned, (), 0, pinned_bytes)
    return NestedPlan(turns, forms, pools, pinned, residency, chosen, policy)


def place_nested(
    library: LlamaLibrary,
    loaded: LoadedModel,
    plan: NestedPlan,
    weights: tuple[WeightSource, Repacker],
    listener: Listener,
    observer: RunObserver,
) -> NestedExperts:
    """Fill what stays and set the experts up to come when they are wanted.

    Raises:
        FormatError: a weight cannot be read.
    """
    source, repacker = weights
    with ExitStack() as stack:
        reader = FlashReader(source.paths, source.sizes_bytes, observer=observer)
        stack.callback(reader.close)
        marked = {w.use.name: w.use for w in plan.pinned if w.packed_bytes is not None}
        repacker.mark(marked, {name: plan.repacked[name] for name in marked})
        stack.callback(pin(library, reader, plan.pinned, listener, repacker).close)
        if not reader.direct:
            listener(Notice("no direct I/O on this file system: reading through the page cache"))
        tables = row_tables(library, loaded, source, plan.residency, reader)
        for table in tables.values():
            stack.callback(table.close)
        arena = NestedArena(library, reader, plan.forms, plan.pools, N_URGENT + N_EARLY)
        n_experts = max(levels[0].stack.n_experts for levels in plan.forms)
        scores = make_scores(plan.dropped_by, len(plan.turns), n_experts)
        cache = NestedCache(
            (arena, plan.turns),
            scores,
            Tally(len(plan.turns)),
            observer,
            lambda run: Loader(reader, run),
        )
        stack.callback(cache.close)
        processor = Processor(library, loaded.context.n_threads)
        stack.callback(processor.close)
        partial = PartialProduct(library, processor)
        stack.callback(partial.close)
        beside = beside_streamer(library, source, loaded, plan.residency, (reader, tables), stack)
        streamer = NestedStreamer(library, cache, plan.policy, beside, loaded.tap, partial)
        stack.callback(streamer.close)
        loaded.tap.observer = streamer
        words = (
            f"nested experts in a cache of {format_bytes(cache.held_bytes)}, "
            f"{plan.policy.describe()}, dropped by {plan.dropped_by}"
        )
        return ExpertWeights(
            plan, "nested", cache, streamer, beside, tuple(tables.values()), loaded.tap, words,
            stack.pop_all(),
        )  # fmt: skip


def _forms(
    turns: Sequence[Turn], nested: NestedModel, policy: WidthPolicy
) -> tuple[tuple[LevelForm, ...], ...]:
    """Return how each stack lies at each level; down-projections get their extra bits."""
    for width in policy.widths:
        if not nested.base <= width <= nested.top:
            raise ConfigError(
                f"experts in {width} bits, the file has {nested.base} to {nested.top}",
                hint=f"--expert-bits {nested.top}",
            )
    forms = []
    for turn in turns:
        for stack in turn.stacks:
            tensor = nested.tensor(stack.name)
            widths = [nested.width_of(stack.name, width) for width in policy.widths]
            forms.append(_levels(stack.index, turn, tensor, widths))
    return tuple(forms)


def _levels(
    index: int, turn: Turn, tensor: NestedTensor, widths: Sequence[int]
) -> tuple[LevelForm, ...]:
    stack = next(s for s in turn.stacks if s.index == index)
    return tuple(LevelForm(stack, tensor, level, width) for level, width in enumerate(widths))


def _shares(policy: WidthPolicy) -> list[float]:
    """Return how the memory is shared among widths: none is preferred."""
    return [1.0 / len(policy.widths)] * len(policy.widths)


def _assembling(forms: Sequence[Sequence[LevelForm]]) -> int:
    """Return what making blocks of planes takes beside the slots."""
    return assembling_bytes([levels[0].nested.layout.expert_bytes for levels in forms])
