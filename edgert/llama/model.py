"""A loaded llama.cpp model: its lifetime and its vocabulary; its weights are placed by others."""

from __future__ import annotations

import ctypes
import threading

from edgert.errors import BackendError, ConfigError
from edgert.llama.lib import Handle, LlamaLibrary
from edgert.llama.twin import SparseTwin
from edgert.llama.vocab import Vocab
from quant.tensor_file import TensorFile

# The twin listens to llama.cpp's log, which does not say which model a line is about.
_ONE_AT_A_TIME = threading.Lock()


class LlamaModel:
    """Weights and vocabulary of one model; free it with `close`.

    Every weight tensor exists, but no weight was read: the bytes are the business of
    `edgert.weights`, and until it has placed them nothing may be computed (`SparseTwin`).

    Args:
        library: The checked libraries.
        file: The validated file; llama.cpp never sees one that was not.
        vocab_only: Load nothing but the vocabulary; there are no tensors then.

    Raises:
        BackendError: llama.cpp refused the model.
        ConfigError: a kind of model that edgert does not run (encoder-decoder).
    """

    def __init__(
        self, library: LlamaLibrary, file: TensorFile, *, vocab_only: bool = False
    ) -> None:
        self.library = library
        self.file = file
        self._vocab_only = vocab_only
        with _ONE_AT_A_TIME:
            self._twin = SparseTwin(file, library.log)
            self.handle = self._load()
            self._twin.after_load()
        self.vocab = Vocab(library, library.api.llama_model_get_vocab(self.handle))
        api = library.api
        self.n_embd: int = api.llama_model_n_embd(self.handle)
        self.n_layer: int = api.llama_model_n_layer(self.handle)
        self.n_ctx_train: int = api.llama_model_n_ctx_train(self.handle)
        if api.llama_model_has_encoder(self.handle) and api.llama_model_has_decoder(self.handle):
            self.close()
            raise ConfigError("encoder-decoder models are not supported")

    def forget_files(self) -> None:
        """Close the twin; its mappings are covered by now."""
        self._twin.close()

    def close(self) -> None:
        """Free the model; calling again does nothing."""
        if self.handle is not None:
            self.library.api.llama_model_free(self.handle)
            self.handle = None
        self._twin.close()

    def _load(self) -> Handle:
        api = self.library.api
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        no_devices = (ctypes.c_void_p * 1)(None)
        params.devices = ctypes.addressof(no_devices)
        params.lazy_mode = api.LLAMA_LAZY_MODE_OFF
        params.load_mode = api.LLAMA_LOAD_MODE_MMAP
        params.use_extra_bufts = False
        params.vocab_only = self._vocab_only
        paths = self._twin.paths
        self.library.log.problems.clear()
        names = (ctypes.c_char_p * len(paths))(*[str(path).encode() for path in paths])
        handle = api.llama_model_load_from_splits(names, len(paths), params)
        if not handle:
            self._twin.close()
            raise BackendError(
                f"llama.cpp cannot load {self.file.shards[0].path}: "
                f"{self.library.log.last_problem()}",
                hint="edgert show MODEL lists what the file holds",
            )
        return handle
