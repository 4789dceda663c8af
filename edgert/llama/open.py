"""Opens a model the best way that its memory allows."""

from __future__ import annotations

from edgert.events import Listener, ignore
from edgert.llama.backend import Backend
from edgert.llama.context import LlamaContext
from edgert.llama.lib import load_library
from edgert.llama.model import LlamaModel
from edgert.llama.options import LoadOptions
from edgert.llama.runner import LlamaBackend, ResidentWeights
from edgert.weights.source import FileSource
from edgert.weights.streaming import open_streaming
from quant.tensor_file import open_tensor_file


def open_backend(options: LoadOptions, listener: Listener = ignore) -> Backend:
    """Validate a model file and open it.

    Raises:
        ConfigError, FormatError, CapacityError, BackendError: see each class.
    """
    options.checked()
    file = open_tensor_file(options.model)
    library = load_library()
    if options.memory_bytes is None:
        model = LlamaModel(library, file, "resident")
        context = LlamaContext(model, options)
        return LlamaBackend(model, context, ResidentWeights(file.weight_bytes), options)
    return open_streaming(library, file, FileSource(file), options, listener)
