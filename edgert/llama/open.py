"""Opens a model the best way that its memory allows."""

from __future__ import annotations

from edgert.events import Listener, ignore
from edgert.llama.backend import Backend
from edgert.llama.lib import load_library
from edgert.llama.model import LlamaModel
from edgert.llama.options import LoadOptions
from edgert.llama.resident import ResidentBackend
from quant.tensor_file import open_tensor_file


def open_backend(options: LoadOptions, listener: Listener = ignore) -> Backend:
    """Validate a model file and open it.

    Raises:
        ConfigError, FormatError, CapacityError, BackendError: see each class.
    """
    options.checked()
    file = open_tensor_file(options.model)
    library = load_library()
    return ResidentBackend(LlamaModel(library, file, "resident"), options)
