"""Opens a model the best way that its memory allows."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import CapacityError, ConfigError
from edgert.events import Listener, Notice, ignore
from edgert.llama.backend import Backend
from edgert.llama.context import LlamaContext
from edgert.llama.lib import LlamaLibrary, load_library
from edgert.llama.options import DEFAULT_CONTEXT, LoadOptions
from edgert.llama.runner import LlamaBackend
from edgert.units import format_bytes
from edgert.weights.budget import check_cache, left_for_weights
from edgert.weights.loading import LoadedModel, load_absent
from edgert.weights.pack_model import write_packed
from edgert.weights.packed import PackedSource, kernels_key, packed_path
from edgert.weights.repack import Repacker
from edgert.weights.resident import place_resident, plan_resident
from edgert.weights.source import FileSource, WeightSource
from edgert.weights.streaming import StreamedWeights, place_streaming
from quant.model_spec import kv_bytes, read_model_spec
from quant.tensor_file import TensorFile, open_tensor_file


@dataclass(frozen=True, slots=True)
class _Ask:
    """What the caller wants, and who listens."""

    options: LoadOptions
    listener: Listener


def open_backend(options: LoadOptions, listener: Listener = ignore) -> Backend:
    """Validate a model file and open it: wholly in memory if it fits, else streaming.

    Raises:
        ConfigError: an option is out of range, or the file is not there.
        FormatError: the file is not a model that can be run.
        CapacityError: the budget cannot work; says what is needed and which flag helps.
        BackendError: llama.cpp is missing, untested, or refuses the model.
    """
    options.checked()
    file = open_tensor_file(options.model)
    spec = read_model_spec(file)
    n_ctx = options.n_ctx or min(spec.n_ctx_train, DEFAULT_CONTEXT)
    if options.memory_bytes is not None and not options.load_anyway:
        cache_bytes = kv_bytes(spec, n_ctx, options.type_k, options.type_v)
        check_cache(options.memory_bytes, cache_bytes, n_ctx)
    library = load_library()
    with ExitStack() as stack:
        backend = _open(library, file, options, listener, stack)
        stack.pop_all()
    return backend


def _open(
    library: LlamaLibrary,
    file: TensorFile,
    options: LoadOptions,
    listener: Listener,
    stack: ExitStack,
) -> LlamaBackend:
    loaded = load_absent(library, file, options, stack)
    files = FileSource(file)
    repacker = Repacker(library)
    plan = plan_resident(files, loaded.uses, repacker)
    left = _left_for_weights(options, loaded)
    if left is None or plan.peak_bytes <= left:
        loaded.context.close()
        resident = place_resident(library, files, plan, repacker, listener)
        stack.callback(resident.close)
        context = LlamaContext(loaded.model, options)
        return LlamaBackend(loaded.model, context, resident, options)
    stack.callback(repacker.close)
    source: WeightSource = files
    if options.packed != "off" and plan.chosen:
        source = _packed_source(library, file, options, listener, repacker)
    elif options.packed != "off":
        listener(Notice("ggml repacks none of this model's weights here: using the file's layout"))
    keeper = _place_streaming(library, loaded, source, left, _Ask(options, listener))
    return LlamaBackend(loaded.model, loaded.context, keeper, options)


def _left_for_weights(options: LoadOptions, loaded: LoadedModel) -> int | None:
    """Return the bytes that the weights may take, None for no bound."""
    if options.weight_memory_bytes is not None:
        return options.weight_memory_bytes
    if options.memory_bytes is None:
        return None
    try:
        return left_for_weights(options.memory_bytes, loaded.before, loaded.after)
    except CapacityError:
        if options.load_anyway:
            return 0
        raise


def _place_streaming(
    library: LlamaLibrary,
    loaded: LoadedModel,
    source: WeightSource,
    left_bytes: int,
    ask: _Ask,
) -> StreamedWeights:
    """Stream within what is left; with `load_anyway`, within the least that can work."""
    try:
        return place_streaming(library, loaded, source, left_bytes, ask.listener)
    except CapacityError as error:
        if not ask.options.load_anyway or error.needed_bytes is None:
            raise
        over = format_bytes(error.needed_bytes - left_bytes)
        ask.listener(Notice(f"loading anyway, {over} over the budget"))
        return place_streaming(library, loaded, source, error.needed_bytes, ask.listener)


def _packed_source(
    library: LlamaLibrary,
    file: TensorFile,
    options: LoadOptions,
    listener: Listener,
    repacker: Repacker,
) -> WeightSource:
    """Use the packed file if asked to; "auto" writes it when it is not there."""
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
        write_packed(options.model, path, folder, listener)
    return PackedSource(file, path, library, repacker)
