"""Models that are not llamas: learned positions, fused tensors, encoders."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from builders import (
    N_EMBD,
    N_FF,
    N_HEAD,
    RawGguf,
    RawTensor,
    llama,
    scalar,
    spm_tokens,
    text,
    u32,
)
from edgert.errors import ConfigError
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from native import run, stock_logits
from quant.formats import GgmlType
from quant.metadata import ValueType

pytestmark = pytest.mark.model
N_POSITIONS = 128


def called(model: RawGguf, architecture: str) -> RawGguf:
    """Give a model another architecture's name, in its keys too."""
    pairs = []
    for pair in model.pairs:
        if pair.key == "general.architecture":
            pairs.append(text(pair.key, architecture))
        elif pair.key.startswith("llama."):
            pairs.append(replace(pair, key=architecture + pair.key.removeprefix("llama")))
        else:
            pairs.append(pair)
    return replace(model, pairs=pairs)


def random_tensor(name: str, *dims: int) -> RawTensor:
    values = np.random.default_rng(len(name)).standard_normal(int(np.prod(dims)), np.float32)
    return RawTensor(name, dims, GgmlType.F32, (values * np.float32(0.05)).tobytes())


def gpt2() -> RawGguf:
    """A two-layer GPT-2 with learned positions, fused QKV and biases everywhere."""
    tensors = [
        random_tensor("token_embd.weight", N_EMBD, len(spm_tokens()[0])),
        random_tensor("position_embd.weight", N_EMBD, N_POSITIONS),
        random_tensor("output_norm.weight", N_EMBD),
        random_tensor("output_norm.bias", N_EMBD),
    ]
    shapes = {
        "attn_norm": (N_EMBD,),
        "attn_qkv": (N_EMBD, 3 * N_EMBD),
        "attn_output": (N_EMBD, N_EMBD),
        "ffn_norm": (N_EMBD,),
        "ffn_up": (N_EMBD, N_FF),
        "ffn_down": (N_FF, N_EMBD),
    }
    for layer in range(2):
        for name, dims in shapes.items():
            tensors.append(random_tensor(f"blk.{layer}.{name}.weight", *dims))
            tensors.append(random_tensor(f"blk.{layer}.{name}.bias", dims[-1]))
    model = replace(called(llama(), "gpt2"), tensors=tensors)
    model = model.with_pair(scalar("gpt2.attention.layer_norm_epsilon", ValueType.FLOAT32, 1e-5))
    return model.with_pair(u32("gpt2.attention.head_count_kv", N_HEAD))


def test_gpt2_streams_exactly_and_stops_at_its_last_position(tmp_path: Path) -> None:
    path = gpt2().write(tmp_path / "gpt2.gguf")
    backend = open_backend(LoadOptions(path, weight_memory_bytes=260_000, n_threads=1))
    try:
        assert backend.counters().streaming
        assert backend.n_ctx == N_POSITIONS
        small = len(spm_tokens()[0])
        tokens = [index % small for index in range(N_POSITIONS)]
        backend.decode(tokens, 0, 1)
        backend.truncate(0)
        wanted = stock_logits(path, less=200)
        assert run(lambda ids, position: backend.decode(ids, position, 1)[0], 200) == wanted
    finally:
        backend.close()


def test_more_context_than_learned_positions_is_refused(tmp_path: Path) -> None:
    path = gpt2().write(tmp_path / "gpt2.gguf")
    with pytest.raises(ConfigError, match="128 positions"):
        open_backend(LoadOptions(path, n_ctx=129, n_threads=1))


def test_a_model_that_does_not_continue_text_is_refused(tmp_path: Path) -> None:
    path = called(llama(), "dream").write(tmp_path / "dream.gguf")
    with pytest.raises(ConfigError, match="does not continue text"):
        open_backend(LoadOptions(path, n_ctx=64, n_threads=1))
