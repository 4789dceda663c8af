"""Runs a text through a model and shows what enters its experts, with the experts chosen."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError
from edgert.events import Listener, PrefillProgress
from edgert.llama.interrupts import interrupts_deferred
from edgert.llama.lib import LlamaLibrary, TensorFields, load_library, tensor_at
from edgert.llama.options import LoadOptions
from edgert.llama.tap import GraphObserver
from edgert.weights.flash import FlashReader
from edgert.weights.loading import LoadedModel, load_absent
from edgert.weights.pinning import collect, pin
from edgert.weights.source import FileSource
from edgert.weights.streaming import place_streaming, weights_to_place
from partition.residency import choose_residency
from quant.tensor_file import TensorFile

Rows = NDArray[np.float32]
Ids = NDArray[np.int32]
TakeInputs = Callable[[str, Rows, Ids], None]

_F32, _I32 = 0, 26


def run_experts(
    file: TensorFile,
    options: LoadOptions,
    tokens: Callable[[LoadedModel], Sequence[Sequence[int]]],
    take: Mapping[str, TakeInputs],
    listener: Listener,
) -> None:
    """Decode windows of tokens, each from an empty context.

    Args:
        file: The model.
        options: Context and memory for its weights (`weight_memory_bytes`, None for no bound).
        tokens: Given the loaded model, the windows; each fits the context.
        take: By name of a stack of experts: is given the rows that enter it, (n, row_length), and
            the expert of each, (n,). The rows are a view that the next node may overwrite.
        listener: Told about progress.

    Raises:
        CapacityError: the weights do not fit, nor can they stream.
        BackendError: llama.cpp refuses the model, or its graph computes experts in another way.
        KeyboardInterrupt: Ctrl-C, once the pass at hand has ended.
    """
    library = load_library()
    source = FileSource(file)
    with ExitStack() as stack:
        loaded = load_absent(library, file, options, stack)
        begin, end = _place(library, loaded, source, options, listener, stack)
        watcher = _Watcher(library, take, loaded.tap.observer)
        loaded.tap.observer = watcher
        windows = tokens(loaded)
        n_done, n_tokens = 0, sum(map(len, windows))
        for window in windows:
            listener(PrefillProgress(n_done, n_tokens))
            loaded.context.clear()
            # Without a logit for each token the last layer has no rows.
            step = loaded.context.n_logits_max
            for start in range(0, len(window), step):
                part = window[start : start + step]
                with interrupts_deferred(lambda: loaded.context.abort(stop=True)):
                    begin()
                    try:
                        loaded.context.decode(part, start, len(part))
                    finally:
                        end()
            n_done += len(window)
        listener(PrefillProgress(n_tokens, n_tokens))
        missing = set(take) - watcher.seen
        if missing:
            raise BackendError(f"llama.cpp's graph does not compute {min(missing)} by chosen ids")


def _place(
    library: LlamaLibrary,
    loaded: LoadedModel,
    source: FileSource,
    options: LoadOptions,
    listener: Listener,
    stack: ExitStack,
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Have the weights in memory or streaming; returns what begins and ends a pass."""
    items = weights_to_place(source, loaded.uses)
    total = sum(item.size_bytes for item in items)
    if options.weight_memory_bytes is None or total <= options.weight_memory_bytes:
        reader = FlashReader(source.paths, source.sizes_bytes)
        stack.callback(reader.close)
        stack.callback(
            pin(library, reader, collect(source, loaded.uses, sorted(loaded.uses)), listener).close
        )
        return loaded.tap.begin, loaded.tap.raise_error
    residency = choose_residency(items, options.weight_memory_bytes)
    keeper = place_streaming(library, loaded, source, residency, listener)
    stack.callback(keeper.close)

    def begin() -> None:
        loaded.tap.begin()
        keeper.streamer.begin_pass()

    def end() -> None:
        keeper.streamer.end_pass()
        loaded.tap.raise_error()

    return begin, end


class _Watcher:
    """Shows the operands of expert products; another observer, if any, sees everything first."""

    def __init__(
        self, library: LlamaLibrary, take: Mapping[str, TakeInputs], inner: GraphObserver | None
    ) -> None:
        self._product = library.op_number(b"MUL_MAT_ID")
        self._take = {name.encode(): function for name, function in take.items()}
        self._inner = inner
        self._inner_wants: set[int] = set()
        self.seen: set[str] = set()

    def before(self, node: int) -> bool:
        """Ask for the products of the watched stacks."""
        wanted = self._inner is not None and self._inner.before(node)
        if wanted:
            self._inner_wants.add(node)
        return wanted or self._function(tensor_at(node)) is not None

    def after(self, node: int) -> None:
        """Show what entered a product."""
        tensor = tensor_at(node)
        take = self._function(tensor)
        if take is not None:
            rows, ids = _operands(tensor)
            name = tensor_at(tensor.src[0] or 0).name.decode()
            self.seen.add(name)
            take(name, rows, ids)
        if self._inner is not None and node in self._inner_wants:
            self._inner_wants.discard(node)
            self._inner.after(node)

    def _function(self, tensor: TensorFields) -> TakeInputs | None:
        if tensor.op != self._product or not tensor.src[0]:
            return None
        return self._take.get(tensor_at(tensor.src[0]).name)


def _operands(product: TensorFields) -> tuple[Rows, Ids]:
    """Return the rows that enter `ggml_mul_mat_id`, one for each chosen expert, and the experts."""
    if not product.src[1] or not product.src[2]:
        raise BackendError(f"node {product.name.decode()} has no operands")
    inputs, chosen = tensor_at(product.src[1]), tensor_at(product.src[2])
    ids = _view(chosen, _I32, np.dtype(np.int32))[0, 0]  # (n_tokens, n_used)
    rows = _view(inputs, _F32, np.dtype(np.float32))[0]  # (n_tokens, n_used or 1, row_length)
    n_tokens, n_used = ids.shape
    spread = np.broadcast_to(rows, (n_tokens, n_used, rows.shape[-1]))
    return spread.reshape(n_tokens * n_used, -1), np.ascontiguousarray(ids).ravel()


def _view(tensor: TensorFields, type_id: int, dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
    """View a tensor with all its strides, the last of ggml's dimensions first."""
    if tensor.type != type_id or not tensor.data:
        raise BackendError(f"node {tensor.name.decode()} has type {tensor.type}, wanted {type_id}")
    shape, strides = tuple(tensor.ne)[::-1], tuple(tensor.nb)[::-1]
    n_bytes = sum((n - 1) * step for n, step in zip(shape, strides, strict=True)) + dtype.itemsize
    memory = np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(tensor.data))
    return np.ndarray(shape, dtype, memory, 0, strides)
