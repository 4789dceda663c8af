"""Runs a model whose experts come and go while everything else stays, or streams beside them."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from contextlib import ExitStack

import numpy as np

from edgert.events import Listener, Notice
from edgert.experts.arena import Arena
from edgert.experts.binding import Binding
from edgert.experts.cache import ExpertCache
from edgert.experts.foresight import Foresight
from edgert.experts.keeper import ExpertWeights
from edgert.experts.loads import N_EARLY, N_URGENT, Loader
from edgert.experts.partial import PartialProduct
from edgert.experts.planning import ExpertPlan
from edgert.experts.predictor import Floats, RouterPredictor
from edgert.experts.scores import make_scores
from edgert.experts.streamer import ExpertStreamer
from edgert.experts.tally import Tally
from edgert.llama.backend import Layout
from edgert.llama.ggml_graph import Processor
from edgert.llama.lib import LlamaLibrary, tensor_at
from edgert.observer import RunObserver
from edgert.units import format_bytes
from edgert.weights.flash import FlashReader
from edgert.weights.loading import LoadedModel
from edgert.weights.memory import Region
from edgert.weights.pinning import pin
from edgert.weights.repack import Repacker
from edgert.weights.ring import Ring
from edgert.weights.rows import RowTable
from edgert.weights.source import WeightSource
from edgert.weights.streamer import Streamer, Window
from edgert.weights.streaming import operations_of, row_tables, streamed_weight
from edgert.weights.uses import WeightUse
from partition.residency import Residency

_F32 = 0

CachedExperts = ExpertWeights[ExpertPlan, ExpertCache, ExpertStreamer]


def place_experts(
    library: LlamaLibrary,
    loaded: LoadedModel,
    plan: ExpertPlan,
    weights: tuple[WeightSource, Repacker],
    listener: Listener,
    observer: RunObserver,
) -> CachedExperts:
    """Fill what stays and set the experts up to come when they are wanted.

    Raises:
        FormatError: a weight cannot be read.
    """
    source, repacker = weights
    with ExitStack() as stack:
        reader = FlashReader(source.paths, source.sizes_bytes, observer=observer)
        stack.callback(reader.close)
        _mark(source, loaded, plan, repacker)
        stack.callback(pin(library, reader, plan.pinned, listener, repacker).close)
        if not reader.direct:
            listener(Notice("no direct I/O on this file system: reading through the page cache"))
        tables = row_tables(library, loaded, source, plan.residency, reader)
        for table in tables.values():
            stack.callback(table.close)
        arena = Arena(library, reader, plan.forms, plan.pools, N_URGENT + N_EARLY)
        n_experts = max(form.stack.n_experts for form in plan.forms)
        cache = ExpertCache(
            arena,
            plan.turns,
            make_scores(plan.policy, len(plan.turns), n_experts),
            Tally(len(plan.turns)),
            observer,
            lambda run: Loader(reader, run),
        )
        stack.callback(cache.close)
        binding = Binding(library, arena, plan.turns)
        stack.callback(binding.close)
        beside = beside_streamer(library, source, loaded, plan.residency, (reader, tables), stack)
        processor = Processor(library, loaded.context.n_threads)
        stack.callback(processor.close)
        partial = PartialProduct(library, processor)
        stack.callback(partial.close)
        streamer = ExpertStreamer(
            cache, binding, beside, _foresight(loaded, plan), partial,
            None if plan.residency.streamed else loaded.tap,
        )  # fmt: skip
        loaded.tap.observer = streamer
        layout: Layout = "repacked" if plan.repacked else source.layout
        n_slots = sum(pool.n_slots for pool in plan.pools)
        n_all = sum(form.stack.n_experts for form in plan.forms)
        words = (
            f"experts in a cache of {format_bytes(cache.held_bytes)} ({n_slots} of {n_all} "
            f"matrices), dropped by {plan.policy}, layout {layout}"
        )
        return ExpertWeights(
            plan, layout, cache, streamer, beside, tuple(tables.values()), loaded.tap, words,
            stack.pop_all(),
        )  # fmt: skip


def _mark(source: WeightSource, loaded: LoadedModel, plan: ExpertPlan, repacker: Repacker) -> None:
    """Tell llama.cpp's tensors how their bytes will lie; routed ones are replaced, not marked."""
    if not plan.repacked:
        source.prepare(loaded.uses)
        return
    dense = {weight.use.name: weight.use for weight in plan.pinned if weight.packed_bytes}
    repacker.mark(dense, {name: plan.chosen[name] for name in dense})


def beside_streamer(
    library: LlamaLibrary,
    source: WeightSource,
    loaded: LoadedModel,
    residency: Residency,
    reading: tuple[FlashReader, Mapping[int, RowTable]],
    stack: ExitStack,
) -> Streamer:
    """Return what moves the weights that are not routed; `stack` frees its window."""
    reader, tables = reading
    window = Region(library.libc, residency.ring_bytes, huge=True)
    stack.callback(window.close)
    return Streamer(
        reader,
        Window(Ring(residency.ring_bytes), window.address),
        [streamed_weight(source, loaded.uses[name]) for name in residency.streamed],
        tables,
        operations_of(library),
    )


def _foresight(loaded: LoadedModel, plan: ExpertPlan) -> Foresight | None:
    """Guess where the routers are plain matrices that stay in memory."""
    routers: dict[int, Floats] = {}
    addresses: dict[int, int] = {}
    for turn in plan.turns:
        use = _router(loaded.uses, turn.stacks[0].name)
        if use is None or use.name not in plan.residency.pinned or len(use.addresses) != 1:
            continue
        tensor = tensor_at(min(use.addresses))
        if tensor.type == _F32 and tensor.data and tensor.ne[1] == turn.stacks[0].n_experts:
            n_embd, n_experts = tensor.ne[0], tensor.ne[1]
            values = (ctypes.c_float * (n_embd * n_experts)).from_address(tensor.data)
            routers[turn.index] = np.ctypeslib.as_array(values).reshape(n_experts, n_embd)
            addresses[turn.index] = min(use.addresses)
    if len(routers) < 2:
        return None
    return Foresight(plan.turns, RouterPredictor(routers), addresses, plan.n_used)


def _router(uses: Mapping[str, WeightUse], stack: str) -> WeightUse | None:
    return uses.get(uses[stack].router)
