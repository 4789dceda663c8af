"""How fast ggml attends over a cache: its work is small dot products, not streams of weights."""

from __future__ import annotations

import ctypes
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from devices.profile import AttentionRate, Rate
from edgert.llama.ggml_graph import Processor, Tensors
from edgert.llama.lib import LlamaLibrary
from edgert.llama.repetition import Repetitions
from edgert.weights.memory import Region

_F32, _F16 = 0, 1
_F32_BYTES, _F16_BYTES = 4, 2
_OPERATIONS = 4  # per element of a head and cached token: a product and a sum, twice


@dataclass(frozen=True, slots=True)
class AttentionShape:
    """A layer's attention, as in models of some billions of weights.

    Attributes:
        n_head: Heads that ask.
        n_head_kv: Heads that are cached.
        head_length: Elements of a head.
        n_cached: Tokens in the cache.
        n_layers: Layers of one graph, each with a cache of its own.
    """

    n_head: int = 32
    n_head_kv: int = 8
    head_length: int = 128
    n_cached: int = 1024
    n_layers: int = 8

    def operations(self, n_tokens: int) -> int:
        """Operations of all layers for a batch that sees the whole cache."""
        per_layer = self.n_head * self.head_length * self.n_cached * n_tokens
        return _OPERATIONS * self.n_layers * per_layer


def attention_rate(
    library: LlamaLibrary,
    n_threads: int,
    repetitions: Repetitions,
    shape: AttentionShape = AttentionShape(),
    n_tokens: int = 512,
) -> tuple[AttentionRate, bool]:
    """Measure flash attention over an f16 cache, for one token and for a batch.

    Returns:
        The rates, and whether other processes disturbed them.
    """
    rates, disturbed = [], False
    for n_batch in (1, n_tokens):
        with ExitStack() as stack:
            processor = stack.enter_context(Processor(library, n_threads))
            layers = shape.n_layers if n_batch == 1 else 1
            part = AttentionShape(
                shape.n_head, shape.n_head_kv, shape.head_length, shape.n_cached, layers
            )
            timed = repetitions.time(processor, _graph(library, part, n_batch, stack))
        value = part.operations(n_batch) / timed.middle_s
        rates.append(
            Rate(value=value, origin="measured", spread=timed.spread, disturbed=timed.disturbed)
        )
        disturbed |= timed.disturbed
    rate = AttentionRate(
        cache_type="f16",
        head_length=shape.head_length,
        n_threads=n_threads,
        decode_flops=rates[0],
        prefill_flops=rates[1],
        prefill_tokens=n_tokens,
    )
    return rate, disturbed


def _graph(library: LlamaLibrary, shape: AttentionShape, n_tokens: int, stack: ExitStack) -> int:
    row = shape.n_head_kv * shape.head_length
    cache_bytes = row * shape.n_cached * _F16_BYTES
    query_bytes = shape.n_head * shape.head_length * n_tokens * _F32_BYTES
    mask_bytes = shape.n_cached * n_tokens * _F16_BYTES
    size_bytes = 2 * shape.n_layers * cache_bytes + 2 * query_bytes + mask_bytes
    region = Region(library.libc, size_bytes, huge=True)
    stack.callback(region.close)
    _fill(region.address, shape.n_layers * 2 * cache_bytes)
    tensors = stack.enter_context(Tensors(library, 8 * shape.n_layers + 4))
    address = region.address + 2 * shape.n_layers * cache_bytes
    query = tensors.cube(_F32, (shape.head_length, n_tokens, shape.n_head), address)
    result = address + query_bytes
    mask = tensors.matrix(_F16, shape.n_cached, n_tokens, result + query_bytes)
    nodes = []
    for layer in range(shape.n_layers):
        place = region.address + 2 * layer * cache_bytes
        sides = [
            tensors.swapped(
                tensors.cube(_F16, (shape.head_length, shape.n_head_kv, shape.n_cached), side)
            )
            for side in (place, place + cache_bytes)
        ]
        nodes.append(tensors.attention(query, (sides[0], sides[1]), mask, result))
    return tensors.graph(nodes)


def _fill(address: int, n_bytes: int) -> None:
    values = np.random.default_rng(2).standard_normal(1 << 16, np.float32).astype(np.float16)
    content = values.tobytes()
    for offset in range(0, n_bytes, len(content)):
        ctypes.memmove(address + offset, content, min(len(content), n_bytes - offset))
