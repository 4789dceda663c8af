"""Tiny models of several architectures, described as workloads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from builders import N_EMBD, N_FF, RawGguf, RawTensor, llama, text, u32
from partition.language_workload import LanguageWorkload, describe_language
from quant.formats import FORMATS, GgmlType
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

N_EXPERT, N_USED = 8, 2


def describe(model: RawGguf, folder: Path) -> LanguageWorkload:
    file = open_tensor_file(model.write(folder / "model.gguf"))
    return describe_language(file, read_model_spec(file))


def tensor(name: str, *dims: int, kind: GgmlType = GgmlType.F32) -> RawTensor:
    size = int(np.prod(dims)) // FORMATS[kind].block_length * FORMATS[kind].block_bytes
    return RawTensor(name, dims, kind, bytes(size))


def renamed(model: RawGguf, architecture: str, before: str = "llama") -> RawGguf:
    """Give a model another architecture's name, in its keys too."""
    pairs = [
        text(pair.key, architecture)
        if pair.key == "general.architecture"
        else replace(pair, key=pair.key.replace(f"{before}.", f"{architecture}.", 1))
        for pair in model.pairs
    ]
    return replace(model, pairs=pairs)


def mixture(kind: GgmlType = GgmlType.Q8_0, fused: bool = False) -> RawGguf:
    """A qwen2moe: 8 experts of which a token wants 2, and a shared one of half the width."""
    model = renamed(llama(), "qwen2moe")
    kept = [t for t in model.tensors if ".ffn_" not in t.name or ".ffn_norm" in t.name]
    for layer in range(2):
        prefix = f"blk.{layer}."
        kept.append(tensor(prefix + "ffn_gate_inp.weight", N_EMBD, N_EXPERT))
        if fused:
            name = prefix + "ffn_gate_up_exps.weight"
            kept.append(tensor(name, N_EMBD, 2 * N_FF, N_EXPERT, kind=kind))
        else:
            for part in ("gate", "up"):
                name = f"{prefix}ffn_{part}_exps.weight"
                kept.append(tensor(name, N_EMBD, N_FF, N_EXPERT, kind=kind))
        kept += [
            tensor(prefix + "ffn_down_exps.weight", N_FF, N_EMBD, N_EXPERT, kind=kind),
            tensor(prefix + "ffn_up_shexp.weight", N_EMBD, N_FF // 2),
        ]
    model = replace(model, tensors=kept)
    model = model.with_pair(u32("qwen2moe.expert_count", N_EXPERT))
    model = model.with_pair(u32("qwen2moe.expert_feed_forward_length", N_FF))
    return model.with_pair(u32("qwen2moe.expert_used_count", N_USED))
