"""Tiny random mixtures of experts of every kind that a GGUF may hold."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from edgert.llama.lib import load_library
from make_model import synthetic_tokens

N_EMBD, N_FF, N_LAYER, N_HEAD, N_HEAD_KV, HEAD_LENGTH = 256, 256, 3, 4, 2, 64
N_EXPERT, N_USED, N_VOCAB = 8, 2, 512
_LATENT, _ROTATED, _KV_LENGTH = 64, 32, N_HEAD_KV * HEAD_LENGTH

Shape = tuple[str, tuple[int, ...]]


@dataclass(frozen=True)
class Mixture:
    """A model to be made; shapes are in NumPy's order, rows last.

    Attributes:
        architecture: As llama.cpp calls it.
        keys: Numbers and flags besides those that all have, without the architecture's prefix.
        layers: Tensors of each, without prefix and, for weights, without `.weight`.
        expert_type: Type of the experts' weights; other matrices are Q8_0.
        fused: Whether gate and up are one stack.
        changed: Types of tensors that have another one, by the end of their names.
    """

    architecture: str
    keys: Mapping[str, float | bool | list[int]]
    layers: tuple[tuple[Shape, ...], ...]
    expert_type: str = "Q4_0"
    fused: bool = False
    changed: Mapping[str, str] = field(default_factory=dict)


def mixtral() -> Mixture:
    """Return a llama with experts."""
    return Mixture(
        "llama", {"feed_forward_length": N_FF}, ((*_attention(), *_experts()),) * N_LAYER
    )


def qwen2moe() -> Mixture:
    """Return experts beside one that each token uses, as far as a gate lets it."""
    biases = (
        ("attn_q.bias", (N_EMBD,)),
        ("attn_k.bias", (_KV_LENGTH,)),
        ("attn_v.bias", (_KV_LENGTH,)),
    )
    gate = ("ffn_gate_inp_shexp", (N_EMBD,))
    layer = (*_attention(), *biases, *_experts(), gate, *_shared(512))
    keys = {"expert_feed_forward_length": N_FF, "expert_shared_feed_forward_length": 512}
    return Mixture("qwen2moe", keys, (layer,) * N_LAYER)


def gpt_oss() -> Mixture:
    """Return biases on routers and experts, attention sinks and a sliding window."""
    biases = (
        ("attn_q.bias", (N_EMBD,)), ("attn_k.bias", (_KV_LENGTH,)), ("attn_v.bias", (_KV_LENGTH,)),
        ("attn_output.bias", (N_EMBD,)), ("attn_sinks", (N_HEAD,)),
        ("ffn_gate_inp.bias", (N_EXPERT,)), ("ffn_gate_exps.bias", (N_EXPERT, N_FF)),
        ("ffn_up_exps.bias", (N_EXPERT, N_FF)), ("ffn_down_exps.bias", (N_EXPERT, N_EMBD)),
    )  # fmt: skip
    norm = ("post_attention_norm", (N_EMBD,))
    attention = [pair for pair in _attention() if pair[0] != "ffn_norm"]
    keys = {"expert_feed_forward_length": N_FF, "attention.sliding_window": 4}
    return Mixture("gpt-oss", keys, ((*attention, norm, *biases, *_experts()),) * N_LAYER, "MXFP4")


def deepseek2() -> Mixture:
    """Return latent attention, a dense layer first, groups of experts, sigmoids with a bias."""
    attention = (
        ("attn_norm", (N_EMBD,)),
        ("attn_q_a", (_LATENT, N_EMBD)),
        ("attn_q_a_norm", (_LATENT,)),
        ("attn_q_b", (N_HEAD * (HEAD_LENGTH + _ROTATED), _LATENT)),
        ("attn_kv_a_mqa", (_LATENT + _ROTATED, N_EMBD)),
        ("attn_kv_a_norm", (_LATENT,)),
        ("attn_k_b", (N_HEAD, _LATENT, HEAD_LENGTH)),
        ("attn_v_b", (N_HEAD, HEAD_LENGTH, _LATENT)),
        ("attn_output", (N_EMBD, N_HEAD * HEAD_LENGTH)),
        ("ffn_norm", (N_EMBD,)),
    )
    dense = (("ffn_gate", (512, N_EMBD)), ("ffn_up", (512, N_EMBD)), ("ffn_down", (N_EMBD, 512)))
    routed = (*attention, *_experts(), ("exp_probs_b.bias", (N_EXPERT,)), *_shared(N_FF))
    keys = {
        "attention.head_count_kv": 1, "leading_dense_block_count": 1,
        "attention.q_lora_rank": _LATENT, "attention.kv_lora_rank": _LATENT,
        "attention.key_length": _LATENT + _ROTATED,
        "attention.value_length": _LATENT, "attention.key_length_mla": HEAD_LENGTH + _ROTATED,
        "attention.value_length_mla": HEAD_LENGTH, "rope.dimension_count": _ROTATED,
        "expert_feed_forward_length": N_FF, "expert_shared_count": 1, "expert_gating_func": 2,
        "expert_weights_scale": 2.5, "expert_weights_norm": True,
        "expert_group_count": 4, "expert_group_used_count": 2,
    }  # fmt: skip
    layers = ((*attention, *dense), *((routed,) * (N_LAYER - 1)))
    return Mixture("deepseek2", keys, layers)


def grovemoe() -> Mixture:
    """Return experts beside smaller ones that are chosen with them, by ids without a name."""
    chunks = (
        ("ffn_gate_chexps", (N_EXPERT // 2, N_FF, N_EMBD)),
        ("ffn_up_chexps", (N_EXPERT // 2, N_FF, N_EMBD)),
        ("ffn_down_chexps", (N_EXPERT // 2, N_EMBD, N_FF)),
    )
    norms = (("attn_q_norm", (HEAD_LENGTH,)), ("attn_k_norm", (HEAD_LENGTH,)))
    keys = {
        "attention.key_length": HEAD_LENGTH, "attention.value_length": HEAD_LENGTH,
        "expert_feed_forward_length": N_FF, "expert_chunk_feed_forward_length": N_FF,
        "experts_per_group": 2, "expert_group_scale": 0.05,
    }  # fmt: skip
    return Mixture("grovemoe", keys, ((*_attention(), *norms, *_experts(), *chunks),) * N_LAYER)


def write_mixture(mixture: Mixture, path: Path, n_shards: int = 1) -> Path:
    """Write a model, split if more than one shard is wanted, and return its first file."""
    if n_shards > 1:
        path = path.with_name(f"{path.stem}-00001-of-{n_shards:05d}.gguf")
    tensors = list(_tensors(mixture))
    for index in range(n_shards):
        shard = path.with_name(path.name.replace("-00001-of", f"-{index + 1:05d}-of"))
        writer = GGUFWriter(shard, mixture.architecture)
        if index == 0:
            _add_keys(writer, mixture)
        if n_shards > 1:
            writer.add_uint16("split.no", index)
            writer.add_uint16("split.count", n_shards)
            writer.add_int32("split.tensors.count", len(tensors))
        first, end = (len(tensors) * i // n_shards for i in (index, index + 1))
        for name, data, kind in tensors[first:end]:
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return path


def _attention() -> tuple[Shape, ...]:
    return (
        ("attn_norm", (N_EMBD,)),
        ("attn_q", (N_HEAD * HEAD_LENGTH, N_EMBD)),
        ("attn_k", (_KV_LENGTH, N_EMBD)),
        ("attn_v", (_KV_LENGTH, N_EMBD)),
        ("attn_output", (N_EMBD, N_HEAD * HEAD_LENGTH)),
        ("ffn_norm", (N_EMBD,)),
    )


def _experts() -> tuple[Shape, ...]:
    return (
        ("ffn_gate_inp", (N_EXPERT, N_EMBD)),
        ("ffn_gate_exps", (N_EXPERT, N_FF, N_EMBD)),
        ("ffn_up_exps", (N_EXPERT, N_FF, N_EMBD)),
        ("ffn_down_exps", (N_EXPERT, N_EMBD, N_FF)),
    )


def _shared(n_ff: int) -> tuple[Shape, ...]:
    return (
        ("ffn_gate_shexp", (n_ff, N_EMBD)),
        ("ffn_up_shexp", (n_ff, N_EMBD)),
        ("ffn_down_shexp", (N_EMBD, n_ff)),
    )


def _add_keys(writer: GGUFWriter, mixture: Mixture) -> None:
    keys: dict[str, float | bool | list[int]] = {
        "vocab_size": N_VOCAB, "context_length": 256, "embedding_length": N_EMBD,
        "block_count": N_LAYER, "feed_forward_length": 512, "attention.head_count": N_HEAD,
        "attention.head_count_kv": N_HEAD_KV, "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.dimension_count": HEAD_LENGTH, "expert_count": N_EXPERT,
        "expert_used_count": N_USED,
    }  # fmt: skip
    for key, value in (keys | dict(mixture.keys)).items():
        name = f"{mixture.architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        else:
            writer.add_uint32(name, value)
    texts, types = synthetic_tokens(N_VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(texts)
    writer.add_token_scores([-float(i) for i in range(N_VOCAB)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)


def _tensors(mixture: Mixture) -> Iterator[tuple[str, NDArray[np.generic], GGMLQuantizationType]]:
    for name, shape in _shapes(mixture):
        random = np.random.default_rng(zlib.crc32(name.encode()))
        values = random.standard_normal(shape, np.float32)
        if name.endswith("norm.weight"):
            values = np.ones(shape, np.float32)
        elif len(shape) == 1 or name.endswith(".bias"):
            values *= np.float32(0.2)
        else:
            values *= np.float32(shape[-1] ** -0.5)
        kind = GGMLQuantizationType[_type_of(mixture, name, len(shape))]
        yield name, _stored(values, kind), kind


def _stored(values: NDArray[np.float32], kind: GGMLQuantizationType) -> NDArray[np.generic]:
    """Return values as ggml stores them."""
    if kind is GGMLQuantizationType.F32:
        return values
    if kind is GGMLQuantizationType.F16:
        return values.astype(np.float16)
    block_length, block_bytes = GGML_QUANT_SIZES[kind]
    row_bytes = values.shape[-1] // block_length * block_bytes
    stored = np.empty((*values.shape[:-1], row_bytes), np.uint8)
    load_library().base.ggml_quantize_chunk(
        kind, values.ctypes.data, stored.ctypes.data, 0, values.size // values.shape[-1],
        values.shape[-1], None,
    )  # fmt: skip
    return stored


def _type_of(mixture: Mixture, name: str, n_dims: int) -> str:
    for end, kind in mixture.changed.items():
        if name.endswith(end):
            return kind
    if n_dims == 1 or name.endswith((".bias", "_norm.weight", "ffn_gate_inp.weight")):
        return "F32"
    return mixture.expert_type if "_exps" in name else "Q8_0"


def _shapes(mixture: Mixture) -> Iterator[Shape]:
    yield "token_embd.weight", (N_VOCAB, N_EMBD)
    for number, layer in enumerate(mixture.layers):
        for name, shape in layer:
            full = f"blk.{number}.{name}" + ("" if name.endswith(".bias") else ".weight")
            if mixture.fused and "ffn_gate_exps" in name:
                fused_shape = (shape[0], 2 * shape[1], *shape[2:])
                yield full.replace("gate_exps", "gate_up_exps"), fused_shape
            elif not (mixture.fused and "ffn_up_exps" in name):
                yield full, shape
    yield "output_norm.weight", (N_EMBD,)
    yield "output.weight", (N_VOCAB, N_EMBD)
