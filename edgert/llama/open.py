"""Opens a model the best way that its memory allows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NoReturn, TypeVar

from edgert.errors import BackendError, CapacityError, ConfigError, FormatError
from edgert.events import Listener, Notice, ignore
from edgert.experts.keeping import place_experts
from edgert.experts.kept_policy import PolicyStore
from edgert.experts.nested_keeping import NestedPlan, obey_nested, place_nested, plan_nested
from edgert.experts.planning import ExpertPlan, has_experts, obey_experts, plan_experts
from edgert.experts.routing import RoutingListener, TappedWeights, watch_routing
from edgert.experts.scores import DEFAULT_POLICY, Policy
from edgert.experts.widths import choose_widths
from edgert.llama.backend import Backend
from edgert.llama.buffer_log import BufferSizes
from edgert.llama.context import LlamaContext
from edgert.llama.lib import LlamaLibrary, load_library
from edgert.llama.options import DEFAULT_CONTEXT, LoadOptions
from edgert.llama.part import PartRunner
from edgert.llama.part_graph import PartGraph, PartRun
from edgert.llama.runner import LlamaBackend
from edgert.observer import UNOBSERVED, RunObserver
from edgert.units import format_bytes
from edgert.weights.budget import check_cache, enough_memory, footprint, left_for_weights
from edgert.weights.flash import PAGE_BYTES, page_end
from edgert.weights.loading import LoadedModel, load_absent
from edgert.weights.pack_model import write_packed
from edgert.weights.packed import PackedSource, kernels_key, packed_path
from edgert.weights.placement import check_context, check_resident, obey
from edgert.weights.repack import Repacker
from edgert.weights.resident import ResidentPlan, place_resident, plan_resident
from edgert.weights.source import FileSource, WeightSource
from edgert.weights.streaming import StreamedWeights, place_streaming, weights_to_place
from partition.residency import MOST_ROWS_BYTES, choose_residency
from quant.model_spec import ModelSpec, kv_bytes, read_model_spec
from quant.nested.file import NestedModel, read_nested
from quant.tensor_file import TensorFile, open_tensor_file

Plan = TypeVar("Plan")


@dataclass(frozen=True, slots=True)
class _Ask:
    """What the caller wants, who listens and watches, the model, the sizes of cache and buffers."""

    options: LoadOptions
    listener: Listener
    observer: RunObserver
    file: TensorFile
    cache_bytes: int
    routing: RoutingListener | None = None
    part: PartRun | None = None
    buffers: BufferSizes = field(default_factory=BufferSizes)


def open_backend(
    options: LoadOptions,
    listener: Listener = ignore,
    file: TensorFile | None = None,
    observer: RunObserver = UNOBSERVED,
    routing: RoutingListener | None = None,
) -> Backend:
    """Validate a model file and open it: wholly in memory if it fits, else streaming.

    Args:
        options: Which model and how.
        listener: Hears progress and notices.
        file: The validated model where the caller has it already.
        observer: Watches what moves, from here to the end of the backend.
        routing: Hears what routers choose; computing is split after each of them.

    Raises:
        ConfigError: an option is out of range, or the file is not there.
        FormatError: the file is not a model that can be run.
        CapacityError: the budget cannot work; says what is needed and which flag helps.
        BackendError: llama.cpp is missing, untested, or refuses the model.
    """
    ask = replace(_checked_ask(options, listener, file, observer), routing=routing)
    backend, _ = _opened(ask)
    return observer.opened(backend)


def open_part(
    options: LoadOptions,
    run: PartRun,
    listener: Listener = ignore,
    file: TensorFile | None = None,
    observer: RunObserver = UNOBSERVED,
) -> PartRunner:
    """Open a part of a model; see `open_backend` for the rest.

    Args:
        options: Which file and how; it should allow as many logits as its batch has tokens where
            the part ends with hidden states.
        run: What is done at its graph's nodes.
        listener: Hears progress and notices.
        file: The validated part where the caller has it already.
        observer: Watches what moves.
    """
    ask = _checked_ask(options, listener, file, observer)
    ask = replace(ask, part=run)
    backend, loaded = _opened(ask)
    graph = PartGraph(run, loaded.model.n_layer)
    graph.install(loaded.tap)
    return PartRunner(backend, graph, to_hidden=run.to_hidden)


def _checked_ask(
    options: LoadOptions, listener: Listener, file: TensorFile | None, observer: RunObserver
) -> _Ask:
    if not sys.platform.startswith("linux"):
        raise BackendError(f"{sys.platform} is not supported, only Linux is")
    options.checked()
    file = file or open_tensor_file(options.model)
    spec = read_model_spec(file)
    n_ctx = options.n_cells or options.n_ctx or min(spec.n_ctx_train, DEFAULT_CONTEXT)
    if options.memory_bytes is not None and not options.load_anyway:
        check_cache(options.memory_bytes, _cache_bytes(spec, n_ctx, options), n_ctx)
    return _Ask(options, listener, observer, file, _cache_bytes(spec, n_ctx, options))


def _opened(ask: _Ask) -> tuple[LlamaBackend, LoadedModel]:
    library = load_library()
    log = library.log
    heard = ask.observer.heard
    with log.heard_by(heard), log.heard_by(ask.buffers.heard), ExitStack() as stack:
        loaded = load_absent(library, ask.file, ask.options, stack, ask.part)
        backend = _open(library, loaded, ask, stack)
        stack.pop_all()
    return backend, loaded


def _open(library: LlamaLibrary, loaded: LoadedModel, ask: _Ask, stack: ExitStack) -> LlamaBackend:
    options, file = ask.options, ask.file
    nested = read_nested(file)
    if nested is None and (options.expert_bits or options.quality is not None):
        raise ConfigError(
            f"{options.model} is not nested, its experts have one precision",
            hint=f"edgert quantize {options.model} --nested 2..8 -o NESTED.gguf",
        )
    if ask.routing is not None:
        watch_routing(loaded, ask.routing)
    files = FileSource(file)
    repacker = Repacker(library)
    if nested is not None:
        return _open_nested(library, loaded, (files, repacker), nested, ask)
    plan = plan_resident(files, loaded.uses, repacker)
    if options.placement is not None:
        return _open_placed(library, loaded, files, (plan, repacker), ask, stack)
    left = _left_for_weights(ask, loaded)
    if left is None or plan.peak_bytes <= left:
        return _open_resident(library, loaded, files, (plan, repacker), ask, stack)
    source: WeightSource = files
    if options.packed != "off" and plan.chosen:
        source = _packed_source(library, ask, repacker) or files
        left = _left_for_weights(ask, replace(loaded, after=footprint())) or 0
    elif options.packed != "off":
        ask.listener(
            Notice("ggml repacks none of this model's weights here: using the file's layout")
        )
    if has_experts(loaded.uses):
        return _open_experts(library, loaded, (source, repacker), left, ask)
    keeper = _place_streaming(library, loaded, source, left, ask)
    keeper.resources.callback(repacker.close)
    return LlamaBackend(loaded.model, loaded.context, keeper, options)


def _open_resident(
    library: LlamaLibrary,
    loaded: LoadedModel,
    files: FileSource,
    resident: tuple[ResidentPlan, Repacker],
    ask: _Ask,
    stack: ExitStack,
) -> LlamaBackend:
    """Read everything and run without a tap, unless someone listens to routers."""
    plan, repacker = resident
    loaded.context.close()
    keeper = place_resident(library, files, plan, repacker, ask.listener, ask.observer)
    stack.callback(keeper.close)
    if ask.routing is not None or ask.part is not None:
        context = LlamaContext(loaded.model, ask.options, loaded.tap.callback)
        watched = TappedWeights(keeper, loaded.tap)
        return LlamaBackend(loaded.model, context, watched, ask.options)
    context = LlamaContext(loaded.model, ask.options)
    return LlamaBackend(loaded.model, context, keeper, ask.options)


def _open_experts(
    library: LlamaLibrary,
    loaded: LoadedModel,
    weights: tuple[WeightSource, Repacker],
    left_bytes: int,
    ask: _Ask,
) -> LlamaBackend:
    """Cache experts in what is left beside everything that each token uses."""
    source, repacker = weights
    n_used = read_model_spec(ask.file).n_expert_used

    def plan_in(left: int) -> ExpertPlan:
        return plan_experts(library, loaded.uses, n_used, source, repacker, left)

    plan = _or_anyway(ask, left_bytes, plan_in)
    return _with_experts(library, loaded, weights, plan, ask)


def _open_nested(
    library: LlamaLibrary,
    loaded: LoadedModel,
    weights: tuple[WeightSource, Repacker],
    nested: NestedModel,
    ask: _Ask,
) -> LlamaBackend:
    """Hold nested experts in the bits that were asked for."""
    if ask.options.packed != "off":
        raise ConfigError(
            "a nested model has no packed layout: its blocks are made while they are read",
            hint="leave --packed out",
        )
    policy = choose_widths(nested, ask.options)
    n_used = read_model_spec(ask.file).n_expert_used

    def plan_in(left_bytes: int | None) -> NestedPlan:
        return plan_nested(loaded, nested, policy, weights, n_used, left_bytes)

    if ask.options.placement is not None:
        check_context(ask.options.n_cells or ask.options.n_ctx, loaded.context.n_ctx)
        plan = obey_nested(loaded, nested, policy, weights, n_used, ask.options.placement)
        _check_room(ask, plan.peak_bytes)
    else:
        left = _left_for_weights(ask, loaded)
        plan = plan_in(None) if left is None else _or_anyway(ask, left, plan_in)
    plan = replace(plan, dropped_by=_kept_policy(ask))
    keeper = place_nested(library, loaded, plan, weights, ask.listener, ask.observer)
    keeper.resources.callback(weights[1].close)
    return LlamaBackend(loaded.model, loaded.context, keeper, ask.options)


def _with_experts(
    library: LlamaLibrary,
    loaded: LoadedModel,
    weights: tuple[WeightSource, Repacker],
    plan: ExpertPlan,
    ask: _Ask,
) -> LlamaBackend:
    plan = replace(plan, policy=_kept_policy(ask))
    keeper = place_experts(library, loaded, plan, weights, ask.listener, ask.observer)
    keeper.resources.callback(weights[1].close)
    return LlamaBackend(loaded.model, loaded.context, keeper, ask.options)


def _kept_policy(ask: _Ask) -> Policy:
    """Return what a replay found best for this model, or the default where there was none."""
    if ask.options.policy_folder is None:
        return DEFAULT_POLICY
    try:
        kept = PolicyStore(ask.options.policy_folder).load(ask.file)
    except FormatError as error:
        ask.listener(Notice(f"{error}; experts are dropped by {DEFAULT_POLICY}, as by default"))
        return DEFAULT_POLICY
    if kept is None:
        return DEFAULT_POLICY
    ask.listener(Notice(f"experts are dropped by {kept.policy}: {kept.reason()}"))
    return kept.policy


def _open_placed(
    library: LlamaLibrary,
    loaded: LoadedModel,
    files: FileSource,
    resident: tuple[ResidentPlan, Repacker],
    ask: _Ask,
    stack: ExitStack,
) -> LlamaBackend:
    """Open with every weight where the manifest wants it, or refuse.

    Raises:
        PlanError: llama.cpp's graph does not allow this placement.
        CapacityError: it needs more than the bound on the process.
    """
    plan, repacker = resident
    placement = ask.options.placement
    if placement is None:
        raise ValueError("no placement")
    check_context(ask.options.n_cells or ask.options.n_ctx, loaded.context.n_ctx)
    if placement.layout == "repacked" and not placement.cached:
        check_resident(placement, loaded.uses)
        _check_room(ask, plan.peak_bytes)
        return _open_resident(library, loaded, files, resident, ask, stack)
    source: WeightSource = files
    if placement.layout == "packed":
        packed = replace(ask, options=replace(ask.options, packed="only"))
        source = _packed_source(library, packed, repacker) or _no_packed(ask)
    residency = obey(placement, weights_to_place(source, loaded.uses), loaded.uses)
    if placement.cached:
        n_used = read_model_spec(ask.file).n_expert_used
        weights = source, repacker
        experts = obey_experts(library, loaded.uses, n_used, weights, placement, residency)
        _check_room(ask, experts.peak_bytes)
        return _with_experts(library, loaded, weights, experts, ask)
    _check_room(ask, residency.pinned_bytes + residency.ring_bytes)
    keeper = place_streaming(library, loaded, source, residency, ask.listener, ask.observer)
    keeper.resources.callback(repacker.close)
    return LlamaBackend(loaded.model, loaded.context, keeper, ask.options)


def _no_packed(ask: _Ask) -> NoReturn:
    raise ConfigError(
        f"the manifest wants the packed copy of {ask.options.model}, which is not there",
        hint=f"edgert pack --layout packed {ask.options.model}",
    )


def _check_room(ask: _Ask, weight_bytes: int) -> None:
    """Hold a placement to the bound on the process, with the buffers that llama.cpp really has."""
    if ask.options.memory_bytes is None or ask.options.load_anyway:
        return
    placement = ask.options.placement
    counted = placement.buffer_bytes if placement else 0
    taken = footprint().resident_bytes + max(counted, ask.buffers.bytes_of("compute", "output"))
    if taken + weight_bytes > ask.options.memory_bytes:
        raise CapacityError(
            f"the manifest's weights take {weight_bytes:,} bytes, process and context {taken:,}; "
            f"{ask.options.memory_bytes:,} are allowed",
            needed_bytes=taken + weight_bytes,
            available_bytes=ask.options.memory_bytes,
            hint="close what else runs in this process, or make a new manifest with --replan",
        )


def _cache_bytes(spec: ModelSpec, n_ctx: int, options: LoadOptions) -> int:
    try:
        return kv_bytes(spec, n_ctx, options.type_k, options.type_v)
    except ValueError as error:
        raise ConfigError(
            f"KV cache types {options.type_k}/{options.type_v} do not suit this model: {error}",
            hint="use --cache-type-k f16 --cache-type-v f16",
        ) from error


def _left_for_weights(ask: _Ask, loaded: LoadedModel) -> int | None:
    """Return the bytes that the weights may take, None for no bound."""
    options = ask.options
    if options.weight_memory_bytes is not None:
        return options.weight_memory_bytes
    if options.memory_bytes is None:
        return None
    try:
        later_bytes = _later_bytes(ask, loaded)
        return left_for_weights(options.memory_bytes, loaded.before, loaded.after, later_bytes)
    except CapacityError:
        if options.load_anyway:
            return 0
        raise


def _later_bytes(ask: _Ask, loaded: LoadedModel) -> int:
    """Return what llama.cpp and the row tables allocate while running.

    Saving a session copies the keys of one layer at a time, the first large decode allocates its
    logits, and looked-up rows are kept up to a bound.
    """
    layer_bytes = ask.cache_bytes // loaded.model.n_layer
    logits_bytes = 4 * loaded.context.n_logits_max * loaded.model.vocab.n_tokens
    row_bytes = page_end(4 * loaded.model.n_embd) + PAGE_BYTES  # at most: no type is wider than F32
    rows_bytes = max(MOST_ROWS_BYTES, loaded.context.n_ubatch * row_bytes)
    return int(layer_bytes + logits_bytes + rows_bytes)


def _or_anyway(ask: _Ask, left_bytes: int, plan: Callable[[int], Plan]) -> Plan:
    """Plan within what is left; with `load_anyway`, within the least that can work."""
    try:
        return plan(left_bytes)
    except CapacityError as error:
        if error.needed_bytes is None:
            raise
        over_bytes = error.needed_bytes - left_bytes
        if ask.options.load_anyway:
            ask.listener(Notice(f"loading anyway, {format_bytes(over_bytes)} over the budget"))
            return plan(error.needed_bytes)
        if ask.options.memory_bytes is None:
            raise
        enough = enough_memory(ask.options.memory_bytes, over_bytes)
        raise CapacityError(
            error.message,
            needed_bytes=error.needed_bytes,
            available_bytes=error.available_bytes,
            hint=f"--memory {enough} is enough, or lower --ctx-size or --ubatch-size",
        ) from error


def _place_streaming(
    library: LlamaLibrary,
    loaded: LoadedModel,
    source: WeightSource,
    left_bytes: int,
    ask: _Ask,
) -> StreamedWeights:
    """Stream within what is left; with `load_anyway`, within the least that can work."""
    items = weights_to_place(source, loaded.uses)
    residency = _or_anyway(ask, left_bytes, lambda left: choose_residency(items, left))
    return place_streaming(library, loaded, source, residency, ask.listener, ask.observer)


def _packed_source(library: LlamaLibrary, ask: _Ask, repacker: Repacker) -> WeightSource | None:
    """Use the packed file; "auto" writes it when it is not there, or says why it cannot."""
    options, listener, file = ask.options, ask.listener, ask.file
    folder = options.packed_folder or Path.home() / ".cache" / "edgert" / "packed"
    path = packed_path(folder, file, kernels_key(library, repacker))
    if not path.exists():
        if options.packed == "only":
            raise ConfigError(
                f"no packed file of {options.model} in {folder}",
                hint=f"edgert pack --layout packed {options.model}",
            )
        size = format_bytes(file.weight_bytes)
        listener(Notice(f"writing the packed layout once ({size} of disk) to {path}"))
        try:
            write_packed(options.model, path, folder, listener)
        except (ConfigError, CapacityError) as error:
            listener(Notice(f"no packed layout: {error.message}; using the file's layout"))
            return None
    return PackedSource(file, path, library, repacker)
