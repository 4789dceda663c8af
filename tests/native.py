"""Stock llama.cpp, run without edgert's placement, as the reference of exactness tests."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.events import ignore
from edgert.llama.context import LlamaContext
from edgert.llama.lib import load_library
from edgert.llama.options import LoadOptions
from edgert.llama.tap import Tap
from edgert.weights.flash import FlashReader
from edgert.weights.loading import load_absent
from edgert.weights.pinning import collect, pin
from edgert.weights.repack import Repacker
from edgert.weights.source import FileSource
from quant.tensor_file import open_tensor_file

PROMPT = [300, 301, 305, 310, 299, 300]
SINGLES = [280, 301, 333]
REPACKABLE = rb"(attn_(q|k|v|output)|ffn_(gate|up|down)(_exps)?)\.weight|^output\.weight"


class _Override(ctypes.Structure):
    _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]


def run(decode: Callable[[Sequence[int], int], NDArray[np.float32]], less: int = 0) -> list[bytes]:
    """Decode the same prompt and single tokens everywhere; the logits of each, byte for byte.

    Token ids are lowered by `less` for small vocabularies.
    """
    prompt = [token - less for token in PROMPT]
    seen = [decode(prompt, 0).tobytes()]
    for index, token in enumerate(SINGLES):
        seen.append(decode([token - less], len(prompt) + index).tobytes())
    return seen


def stock_logits(path: Path, *, repacked: bool = False, less: int = 0) -> list[bytes]:
    """Run llama.cpp by itself, memory-mapped, or repacked into the buffer that edgert uses."""
    library = load_library()
    api = library.api
    params = api.llama_model_default_params()
    params.use_extra_bufts = False
    params.load_mode = api.LLAMA_LOAD_MODE_NONE if repacked else api.LLAMA_LOAD_MODE_MMAP
    overrides = (_Override * 2)(
        _Override(REPACKABLE, Repacker(library).types[0]), _Override(None, None)
    )
    if repacked:
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    model = api.llama_model_load_from_file(str(path).encode(), params)
    context_params = api.llama_context_default_params()
    context_params.n_ctx = 64
    context_params.n_threads = context_params.n_threads_batch = 1
    context = api.llama_init_from_model(model, context_params)
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def decode(tokens: Sequence[int], _position: int) -> NDArray[np.float32]:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        assert api.llama_decode(context, api.llama_batch_get_one(ids, len(tokens))) == 0
        return np.ctypeslib.as_array(api.llama_get_logits_ith(context, -1), shape=(n_vocab,))

    try:
        return run(decode, less)
    finally:
        api.llama_free(context)
        api.llama_model_free(model)


@contextmanager
def tapped(path: Path) -> Iterator[tuple[LlamaContext, Tap]]:
    """Give a context with a tap, every weight in memory as the file has it."""
    library = load_library()
    file = open_tensor_file(path)
    source = FileSource(file)
    with ExitStack() as stack:
        options = LoadOptions(path, n_ctx=64, n_threads=1)
        loaded = load_absent(library, file, options, stack)
        reader = FlashReader(source.paths, source.sizes_bytes)
        stack.callback(reader.close)
        weights = collect(source, loaded.uses, sorted(loaded.uses))
        stack.callback(pin(library, reader, weights, ignore).close)
        yield loaded.context, loaded.tap
