"""Write a trained model as GGUF: tensors, tokenizer and chat template."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import gguf
import numpy as np
from gguf.quants import quantize

from tiny.tokenizer import BEGIN, CONTROL_TOKENS, END

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray
    from tokenizers import Tokenizer

    from tiny.model import Shape, TinyLlama

Float32 = np.dtype[np.float32]

# Roles other than the three trained ones come out as plain text, which does no harm.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ROUTER = "ffn_gate_inp"
FILE_TYPES = {
    gguf.GGMLQuantizationType.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
    gguf.GGMLQuantizationType.F16: gguf.LlamaFileType.MOSTLY_F16,
}


def pair_neighbours(rows: NDArray[np.float32], head_dim: int) -> NDArray[np.float32]:
    """Reorder the rows of a query or key matrix from rotated halves to rotated neighbours.

    Source: llama.cpp, `LlamaModel.permute` in its conversion script.
    """
    n_rows, n_columns = rows.shape
    halves = rows.reshape(n_rows // head_dim, 2, head_dim // 2, n_columns)
    return halves.swapaxes(1, 2).reshape(n_rows, n_columns)


def tensors(model: TinyLlama) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Yield every tensor under its GGUF name, in the order llama.cpp uses them."""
    weights = {name: weight.detach().float().numpy() for name, weight in model.named_parameters()}
    yield "token_embd.weight", weights["token_embd"]
    yield "output_norm.weight", weights["output_norm"]
    for name, values in weights.items():
        if not name.startswith("layers."):
            continue
        parts = name.removesuffix(".weight").split(".")
        layer, part = parts[1], parts[-1]
        # qwen3moe pairs halves as the model here does, llama neighbours.
        if part in ("attn_q", "attn_k") and not model.shape.n_experts:
            values = pair_neighbours(values, model.shape.head_dim)
        yield f"blk.{layer}.{part}.weight", np.ascontiguousarray(values)


def write_gguf(
    path: Path,
    model: TinyLlama,
    tokenizer: Tokenizer,
    kind: gguf.GGMLQuantizationType,
    description: str,
) -> None:
    """Write `model` to `path`, its matrices as `kind`, its norms and routers as f32."""
    partial = path.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe" if model.shape.n_experts else "llama")
    writer.add_name(path.stem)
    writer.add_description(description)
    writer.add_file_type(FILE_TYPES[kind])
    _add_shape(writer, model.shape)
    _add_tokenizer(writer, tokenizer)
    for name, values in tensors(model):
        if values.ndim == 1 or ROUTER in name:
            writer.add_tensor(name, values)
        else:
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.replace(path)


def _add_shape(writer: gguf.GGUFWriter, shape: Shape) -> None:
    writer.add_context_length(shape.n_context)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layers)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_heads)
    writer.add_head_count_kv(shape.n_kv_heads)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.rms_eps)
    writer.add_vocab_size(shape.n_vocab)
    if shape.n_experts:
        writer.add_key_length(shape.head_dim)
        writer.add_value_length(shape.head_dim)
        writer.add_expert_count(shape.n_experts)
        writer.add_expert_used_count(shape.n_experts_used)
        writer.add_expert_feed_forward_length(shape.n_ff)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    ids = tokenizer.get_vocab()
    tokens = sorted(ids, key=ids.__getitem__)
    kinds = [
        gguf.TokenType.CONTROL if token in CONTROL_TOKENS else gguf.TokenType.NORMAL
        for token in tokens
    ]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(merge) for merge in merges])
    writer.add_bos_token_id(ids[BEGIN])
    writer.add_eos_token_id(ids[END])
    writer.add_eot_token_id(ids[END])
    # Every training document starts with the begin token, a chat once before its first turn.
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
