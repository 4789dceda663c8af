"""A loaded llama.cpp model: its lifetime, its vocabulary, and the two ways to place its weights."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Literal

from edgert.errors import BackendError, ConfigError
from edgert.llama.lib import LlamaLibrary
from edgert.llama.twin import SparseTwin
from edgert.llama.vocab import Vocab
from edgert.weights.flash import supports_direct_io
from quant.tensor_file import TensorFile

Placement = Literal["resident", "absent"]


class LlamaModel:
    """Weights and vocabulary of one model; free it with `close`.

    `resident` reads every weight into memory, repacked for this processor where llama.cpp can, with
    direct I/O so that the page cache never holds a second copy. `absent` reads no weight at all:
    every weight tensor exists, but its bytes are the caller's business (`SparseTwin`).

    Args:
        library: The checked libraries.
        file: The validated file; llama.cpp never sees one that was not.
        placement: How to place the weights.

    Raises:
        BackendError: llama.cpp refused the model.
        ConfigError: a kind of model that edgert does not run (encoder-decoder).
    """

    def __init__(self, library: LlamaLibrary, file: TensorFile, placement: Placement) -> None:
        self.library = library
        self.file = file
        self._twin = SparseTwin(file, library.log) if placement == "absent" else None
        self.handle = self._load(placement)
        if self._twin is not None:
            self._twin.after_load()
        self.vocab = Vocab(library, library.api.llama_model_get_vocab(self.handle))
        api = library.api
        self.n_embd: int = api.llama_model_n_embd(self.handle)
        self.n_layer: int = api.llama_model_n_layer(self.handle)
        self.n_ctx_train: int = api.llama_model_n_ctx_train(self.handle)
        if api.llama_model_has_encoder(self.handle) and api.llama_model_has_decoder(self.handle):
            self.close()
            raise ConfigError("encoder-decoder models are not supported")

    def close(self) -> None:
        """Free the model; calling again does nothing."""
        if self.handle is not None:
            self.library.api.llama_model_free(self.handle)
            self.handle = None
        if self._twin is not None:
            self._twin.close()

    def _load(self, placement: Placement) -> Any:
        api = self.library.api
        params = api.llama_model_default_params()
        params.n_gpu_layers = 0
        params.lazy_mode = api.LLAMA_LAZY_MODE_OFF
        if placement == "resident":
            params.load_mode = _resident_load_mode(api, self.file.shards[0].path)
            params.use_extra_bufts = True
            paths = [shard.path for shard in self.file.shards]
        else:
            params.load_mode = api.LLAMA_LOAD_MODE_MMAP
            params.use_extra_bufts = False
            paths = self._twin.paths if self._twin is not None else []
        self.library.log.problems.clear()
        names = (ctypes.c_char_p * len(paths))(*[str(path).encode() for path in paths])
        handle = api.llama_model_load_from_splits(names, len(paths), params)
        if not handle:
            if self._twin is not None:
                self._twin.close()
            raise BackendError(
                f"llama.cpp cannot load {self.file.shards[0].path}: "
                f"{self.library.log.last_problem()}",
                hint="edgert show MODEL lists what the file holds",
            )
        return handle


def _resident_load_mode(api: Any, path: Path) -> int:
    """Prefer direct I/O; plain reads where the file system has none (tmpfs, some network ones)."""
    if supports_direct_io(path):
        mode: int = api.LLAMA_LOAD_MODE_DIRECT_IO
    else:
        mode = api.LLAMA_LOAD_MODE_NONE
    return mode
