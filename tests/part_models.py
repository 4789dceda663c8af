"""Small random models to take apart: odd numbers of heads, biases, fused tensors, every type."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import quantize

from builders import RawGguf, RawTensor, llama_pairs, scalar, spm_tokens, text, u32
from quant.formats import GgmlType
from quant.metadata import ValueType
from quant.parts.file import Part, read_part
from quant.parts.spec import PartSpec
from quant.parts.write import write_part
from quant.tensor_file import open_tensor_file

N_VOCAB = len(spm_tokens()[0])
SOURCE = "5" * 64


@dataclass(frozen=True)
class Shape:
    """A model; 6 query heads of 32 over 3 KV heads, so that shares are odd."""

    architecture: str = "llama"
    n_layer: int = 4
    n_embd: int = 64
    n_head: int = 6
    n_head_kv: int = 3
    head_length: int = 32
    n_ff: int = 224
    weight_type: GgmlType = GgmlType.F32
    tied: bool = False
    fused: bool = False
    fused_ffn: bool = False
    ffn_norm: str = "ffn_norm"
    biases: tuple[str, ...] = ()
    head_norms: bool = False


SHAPES = {
    "llama": Shape(),
    "llama-tied-q8_0": Shape(weight_type=GgmlType.Q8_0, tied=True),
    "llama-q4_0": Shape(weight_type=GgmlType.Q4_0),
    "llama-fused": Shape(fused=True),
    "llama-biased": Shape(biases=("attn_output", "ffn_gate", "ffn_up", "ffn_down")),
    "qwen2": Shape("qwen2", n_embd=192, biases=("attn_q", "attn_k", "attn_v")),
    "qwen2-tied-f16": Shape(
        "qwen2",
        n_embd=192,
        weight_type=GgmlType.F16,
        tied=True,
        biases=("attn_q", "attn_k", "attn_v"),
    ),
    "qwen3": Shape("qwen3", head_norms=True),
    "phi3": Shape("phi3", n_embd=192, fused=True, fused_ffn=True),
    "mistral3": Shape("mistral3"),
    "ernie4_5": Shape("ernie4_5"),
    "exaone": Shape("exaone", n_embd=192),
    "seed_oss": Shape(
        "seed_oss", biases=("attn_q", "attn_k", "attn_v"), ffn_norm="post_attention_norm"
    ),
}


def random_model(shape: Shape, seed: int = 1) -> RawGguf:
    """Return the model with its metadata and a tokenizer; norms and biases are random too."""
    random = np.random.default_rng(seed)

    def matrix(name: str, n_in: int, n_out: int) -> RawTensor:
        values = random.standard_normal((n_out, n_in), np.float32) / np.float32(n_in**0.5)
        data = quantize(values, GGMLQuantizationType(int(shape.weight_type)))
        return RawTensor(name, (n_in, n_out), shape.weight_type, data.tobytes())

    def vector(name: str, length: int, around: float) -> RawTensor:
        values = around + 0.2 * random.standard_normal(length)
        return RawTensor(name, (length,), GgmlType.F32, values.astype(np.float32).tobytes())

    q_rows, kv_rows = shape.n_head * shape.head_length, shape.n_head_kv * shape.head_length
    projections = {"attn_q": q_rows, "attn_k": kv_rows, "attn_v": kv_rows}
    if shape.fused:
        projections = {"attn_qkv": q_rows + 2 * kv_rows}
    tensors = [matrix("token_embd.weight", shape.n_embd, N_VOCAB)]
    for layer in range(shape.n_layer):
        widths = {name: (shape.n_embd, n_rows) for name, n_rows in projections.items()}
        widths["attn_output"] = (q_rows, shape.n_embd)
        if shape.fused_ffn:
            widths["ffn_up"] = (shape.n_embd, 2 * shape.n_ff)
        else:
            widths |= dict.fromkeys(("ffn_gate", "ffn_up"), (shape.n_embd, shape.n_ff))
        widths["ffn_down"] = (shape.n_ff, shape.n_embd)
        prefix = f"blk.{layer}."
        tensors += [
            vector(f"{prefix}{n}.weight", shape.n_embd, 1) for n in ("attn_norm", shape.ffn_norm)
        ]
        for name in ("attn_q_norm", "attn_k_norm") if shape.head_norms else ():
            tensors.append(vector(f"{prefix}{name}.weight", shape.head_length, 1))
        for name, (n_in, n_out) in widths.items():
            tensors.append(matrix(f"{prefix}{name}.weight", n_in, n_out))
            if name in shape.biases:
                tensors.append(vector(f"{prefix}{name}.bias", n_out, 0))
    tensors.append(vector("output_norm.weight", shape.n_embd, 1))
    if not shape.tied:
        tensors.append(matrix("output.weight", shape.n_embd, N_VOCAB))
    return replace(_with_keys(shape), tensors=tensors)


def make_part(model: Path, spec: PartSpec, out: Path) -> Part:
    """Write a part of a model and read what it says of itself."""
    with out.open("wb") as stream:
        write_part(stream, open_tensor_file(model), spec, SOURCE)
    part = read_part(open_tensor_file(out))
    assert part is not None
    assert part.spec == spec
    return part


def _with_keys(shape: Shape) -> RawGguf:
    model = RawGguf(llama_pairs(shape.n_layer))
    numbers = {
        "embedding_length": shape.n_embd,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": shape.n_head,
        "attention.head_count_kv": shape.n_head_kv,
        "attention.key_length": shape.head_length,
        "attention.value_length": shape.head_length,
        "rope.dimension_count": shape.head_length,
    }
    for key, number in numbers.items():
        model = model.with_pair(u32(f"llama.{key}", number))
    model = model.with_pair(scalar("llama.rope.freq_base", ValueType.FLOAT32, 5000.0))
    pairs = [
        text(pair.key, shape.architecture)
        if pair.key == "general.architecture"
        else replace(pair, key=pair.key.replace("llama.", f"{shape.architecture}.", 1))
        for pair in model.pairs
    ]
    return replace(model, pairs=pairs)
