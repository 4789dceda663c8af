"""Opens a model whose tap stays free for experiments: nodes can be looked at and replaced."""

from __future__ import annotations

from contextlib import ExitStack

from edgert.errors import ConfigError
from edgert.events import Listener
from edgert.experts.routing import TappedWeights
from edgert.llama.context import LlamaContext
from edgert.llama.lib import load_library
from edgert.llama.options import LoadOptions
from edgert.llama.runner import LlamaBackend
from edgert.llama.tap import Tap
from edgert.weights.loading import load_absent
from edgert.weights.repack import Repacker
from edgert.weights.resident import place_resident, plan_resident
from edgert.weights.source import FileSource
from edgert.weights.streaming import place_streaming, weights_to_place
from partition.residency import choose_residency
from quant.nested.file import read_nested
from quant.tensor_file import TensorFile


def open_tapped(
    options: LoadOptions, file: TensorFile, listener: Listener
) -> tuple[LlamaBackend, Tap]:
    """Open a model with its tap: in memory where it fits, else streaming.

    Args:
        options: Context, threads, and memory for the weights (`weight_memory_bytes`).
        file: The validated model.
        listener: Hears progress and notices.

    Raises:
        ConfigError: the model is nested.
        CapacityError: the weights do not fit, nor can they stream.
        BackendError: llama.cpp is missing, untested, or refuses the model.
    """
    options.checked()
    if read_nested(file) is not None:
        raise ConfigError(
            f"{file.path} is nested, and nodes of plain models are what can be replaced",
            hint="name the model that it was made of",
        )
    library = load_library()
    with ExitStack() as stack:
        loaded = load_absent(library, file, options, stack)
        source, repacker = FileSource(file), Repacker(library)
        plan = plan_resident(source, loaded.uses, repacker)
        left = options.weight_memory_bytes
        if left is None or plan.peak_bytes <= left:
            loaded.context.close()
            resident = place_resident(library, source, plan, repacker, listener)
            stack.callback(resident.close)
            context = LlamaContext(loaded.model, options, loaded.tap.callback)
            keeper = TappedWeights(resident, loaded.tap)
            backend = LlamaBackend(loaded.model, context, keeper, options)
        else:
            residency = choose_residency(weights_to_place(source, loaded.uses), left)
            streamed = place_streaming(library, loaded, source, residency, listener)
            streamed.resources.callback(repacker.close)
            backend = LlamaBackend(loaded.model, loaded.context, streamed, options)
        stack.pop_all()
    return backend, loaded.tap
