"""What llama.cpp allocates besides weights and KV cache, as functions of model and context.

Upper estimates: compute buffer, scratch of the kernels, output buffers, graph bookkeeping and the
tokenizer's tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from partition.graph_memory import GraphRun, GraphShape, graph_bytes
from partition.language_workload import LanguageWorkload, LayerWorkload, TensorWork
from quant.formats import FORMATS, GgmlType, format_of, row_bytes, type_named
from quant.tensor_file import ArrayField

# Graphs that `graph_bytes` follows tensor by tensor (src/models/*.cpp).
MODELLED = frozenset(
    {"deci", "ernie4_5", "exaone", "internlm2", "llama", "minicpm", "mistral3", "qwen2", "qwen3"}
    | {"qwen3moe", "smollm3", "xverse"}
)

_CELLS_STEP = 256
_F32 = 4
_ROTATED_HEAD = 64  # heads of a multiple of this are rotated before they are quantized
_V_ROTATION = 64
_TILE_ROWS, _TILE_CELLS = 64, 64  # GGML_FA_TILE_Q and GGML_FA_TILE_KV, ggml-cpu/common.h
_MAPPING_BYTES = 8  # mmid_row_mapping, ggml-cpu.c

# Measured as growth of the resident set while contexts and vocabularies of 2,000 to 152,000 tokens
# were made; glibc on x86-64.
_CONTEXT_BYTES = 2 << 20
_GRAPH_BYTES_PER_TENSOR = 1 << 10  # several graphs of eight nodes a weight
_MODEL_BYTES = 1600 << 10
_TOKEN_BYTES = 144  # token_data, a node and a bucket of token_to_id, an entry of the piece cache
_MERGE_BYTES = 160  # a node of bpe_ranks with two strings, a bucket


@dataclass(frozen=True, slots=True)
class ContextShape:
    """What a llama.cpp context is made for.

    Attributes:
        n_ctx: Positions of the KV cache.
        n_ubatch: Tokens computed at once.
        n_logits_max: Tokens of a batch that may want logits.
        type_k: ggml type of cached keys.
        type_v: ggml type of cached values.
        flash_attention: llama.cpp's default on a processor.
        n_batch: Tokens handed over at once, of which `n_ubatch` are computed at a time.
    """

    n_ctx: int
    n_ubatch: int
    n_logits_max: int = 1
    type_k: str = "f16"
    type_v: str = "f16"
    flash_attention: bool = True
    n_batch: int = 512


def buffer_bytes(workload: LanguageWorkload, context: ContextShape) -> int:
    """Return the size of the compute buffer that llama.cpp logs when it makes a context.

    Exact for the graphs of `MODELLED`. For others an estimate: the same layer with their widths,
    and beside it the results of all products of their largest layer.
    """
    n_ctx = -(-context.n_ctx // _CELLS_STEP) * _CELLS_STEP
    n_tokens = min(context.n_ubatch, n_ctx)
    n_outputs = max(1, min(context.n_logits_max, n_tokens))
    run = GraphRun(n_ctx, n_tokens, n_outputs, context.flash_attention)
    shapes = {graph_shape(workload, layer, context) for layer in workload.run_layers}
    size = max(graph_bytes(shape, run) for shape in shapes)
    if workload.spec.architecture in MODELLED:
        return size
    widest = max(sum(map(_result_width, layer.tensors)) for layer in workload.run_layers)
    states = max(layer.state_bytes for layer in workload.run_layers)
    return size + _F32 * n_tokens * widest + 2 * states


def scratch_bytes(workload: LanguageWorkload, context: ContextShape, n_threads: int) -> int:
    """Return the scratch that kernels of the processor share, allocated at the first large batch.

    Activations in the type that products want, rows sorted by expert, tiles of flash attention.

    Source: `ggml_graph_plan`, ggml/src/ggml-cpu/ggml-cpu.c.
    """
    n_tokens = min(context.n_ubatch, context.n_ctx)
    largest = 0
    for layer in (*workload.run_layers, workload.head):
        for tensor in layer.tensors:
            if tensor.role == "lookup" or len(tensor.shape) < 2:
                continue
            n_rows = n_tokens
            mapped = 0
            if tensor.role == "experts":
                n_rows *= workload.spec.n_expert_used
                mapped = _MAPPING_BYTES * tensor.shape[-1] * n_rows
            # At most: what is not multiplied as f16 or f32 is multiplied as 8-bit blocks.
            width = type_named(tensor.type_name) in (GgmlType.F32, GgmlType.F16, GgmlType.BF16)
            row = _F32 * tensor.shape[0] if width else _quantized_row(tensor.shape[0])
            largest = max(largest, n_rows * row + mapped)
    spec = workload.spec
    tiles = _TILE_ROWS + _TILE_CELLS
    scores = 2 * _TILE_ROWS * _TILE_CELLS
    attention = _F32 * (tiles * (spec.key_length + spec.value_length) + scores)
    single = _F32 * (
        spec.n_head * (2 + spec.value_length) + spec.key_length + 2 * spec.value_length
    )
    return max(largest, n_threads * max(attention, single))


def context_bytes(workload: LanguageWorkload, context: ContextShape) -> int:
    """Return the output buffer at its largest, and the bookkeeping of graphs and batches.

    Source: `llama_context::output_reserve` and `graph_max_nodes`, src/llama-context.cpp.
    """
    n_outputs = max(1, min(context.n_logits_max, context.n_batch, context.n_ctx))
    logits = _F32 * n_outputs * workload.spec.n_vocab
    n_tensors = sum(len(layer.tensors) for layer in workload.layers)
    return logits + _CONTEXT_BYTES + _GRAPH_BYTES_PER_TENSOR * n_tensors


def vocabulary_bytes(workload: LanguageWorkload) -> int:
    """Return the heap of the model without weights: mostly the tables of the tokenizer.

    Source: `llama_vocab::impl`, src/llama-vocab.cpp.
    """
    n_merges, merge_bytes = _array(workload.metadata, "tokenizer.ggml.merges")
    n_tokens, text_bytes = _array(workload.metadata, "tokenizer.ggml.tokens")
    n_tokens = max(n_tokens, workload.spec.n_vocab)
    tables = _TOKEN_BYTES * n_tokens + _MERGE_BYTES * n_merges
    return _MODEL_BYTES + tables + text_bytes + merge_bytes


def graph_shape(
    workload: LanguageWorkload, layer: LayerWorkload, context: ContextShape
) -> GraphShape:
    """Return the widths of one layer's tensors."""
    spec = workload.spec
    parts = {tensor.name.split(".", 2)[-1]: tensor.shape for tensor in layer.tensors}
    down = parts.get("ffn_down.weight") or parts.get("ffn_down_shexp.weight")
    down_experts = parts.get("ffn_down_exps.weight")
    attention = layer.attention
    n_head_kv = attention.n_head_kv if attention else 0
    n_head = spec.n_head if attention else 0
    ff_width = down[0] if down else 0
    up = parts.get("ffn_up.weight")
    fused = up is not None and up[-1] == 2 * ff_width
    return GraphShape(
        n_layer=len(workload.run_layers),
        n_embd=spec.n_embd,
        n_head=n_head,
        q_width=n_head * spec.key_length,
        k_width=n_head_kv * spec.key_length,
        v_width=n_head_kv * spec.value_length,
        out_width=n_head * spec.value_length,
        ff_width=ff_width,
        gated=fused or any(name.startswith("ffn_gate") for name in parts),
        n_expert=spec.n_expert if down_experts else 0,
        n_expert_used=spec.n_expert_used if down_experts else 0,
        expert_width=down_experts[0] if down_experts else 0,
        n_vocab=spec.n_vocab,
        k_rotation=_k_rotation(spec.key_length, context.type_k),
        v_rotation=_V_ROTATION if _rotated(spec.value_length, context.type_v) else 0,
    )


def _rotated(head_length: int, type_name: str) -> bool:
    """Whether llama.cpp rotates a head before it caches it (`llama_kv_cache`, `attn_rot_k`)."""
    quantized = format_of(type_named(type_name)).block_length > 1
    return quantized and head_length > 0 and head_length % _ROTATED_HEAD == 0


def _k_rotation(head_length: int, type_name: str) -> int:
    """Return the largest power of two that divides a head."""
    return head_length & -head_length if _rotated(head_length, type_name) else 0


def _result_width(tensor: TensorWork) -> int:
    """Return the elements that a product with this weight makes of one token."""
    if tensor.role == "lookup" or len(tensor.shape) < 2 or tensor.name.endswith("bias"):
        return 0
    return int(prod(tensor.shape[1:]) * tensor.share)


def _quantized_row(n_elements: int) -> int:
    block = FORMATS[GgmlType.Q8_0].block_length
    return row_bytes(GgmlType.Q8_0, -(-n_elements // block) * block)


def _array(metadata: Mapping[str, object], key: str) -> tuple[int, int]:
    """Return how many strings an array holds, and their bytes."""
    value = metadata.get(key)
    if not isinstance(value, ArrayField):
        return 0, 0
    return value.count, max(0, value.size_bytes - 8 * value.count)
