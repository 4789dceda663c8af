"""Training of the embedded models: experts against a plain loop, files against llama.cpp.

Needs what training needs, which the gate does not install.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from gguf import GGMLQuantizationType

torch = pytest.importorskip("torch", reason="training is not installed: the extra `train`")
pytest.importorskip("tokenizers", reason="training is not installed: the extra `train`")

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tiny.experts import Experts
from tiny.export import write_gguf
from tiny.held_out import check_parity, expert_shares
from tiny.model import CHAT, MOE, Shape, TinyLlama
from tiny.optimizer import Muon
from tiny.tokenizer import CONTROL_TOKENS

SMALL = replace(MOE, n_layers=2, n_embd=64, n_heads=2, n_kv_heads=2, n_ff=32, n_experts=8)
DENSE = replace(CHAT, n_layers=2, n_embd=64, n_heads=2, n_kv_heads=2, n_ff=96)
WINDOWS = ["Once upon a time", "<|begin|><|user|>Hi<|end|><|assistant|>Hello, you.<|end|>"]


def randomized(shape: Shape) -> TinyLlama:
    torch.manual_seed(2)
    model = TinyLlama(shape)
    with torch.no_grad():
        for weight in model.parameters():
            scale = weight.shape[-1] ** -0.5 if weight.ndim > 1 else 0.2
            weight.copy_(torch.randn_like(weight) * scale + (weight.ndim == 1))
    return model


@pytest.fixture(scope="module")
def byte_tokenizer() -> Tokenizer:
    """Control tokens, bytes, and one merge, since llama.cpp wants some."""
    texts = [*CONTROL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "on"]
    vocabulary = {text: i for i, text in enumerate(texts)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("o", "n")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(CONTROL_TOKENS))
    return tokenizer


@pytest.fixture
def log_kept() -> Iterator[None]:
    """Measuring silences llama.cpp's log, in which other tests read."""
    callback, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(callback), ctypes.byref(data))
    yield
    llama_cpp.llama_log_set(callback, data)


def one_by_one(experts: Experts, h: torch.Tensor) -> torch.Tensor:
    """What experts are, a token and an expert at a time."""
    tokens = h.reshape(-1, h.shape[-1])
    shares, chosen, _ = experts.route(tokens)
    sums = []
    for x, weights, ids in zip(tokens, shares, chosen, strict=True):
        outputs = [
            experts.ffn_down_exps[i]
            @ (
                torch.nn.functional.silu(experts.ffn_gate_exps[i] @ x)
                * (experts.ffn_up_exps[i] @ x)
            )
            for i in ids
        ]
        sums.append(sum(w * out for w, out in zip(weights, outputs, strict=True)))
    return torch.stack(sums).view(h.shape)


@pytest.mark.parametrize("n_tokens", [1, 5, 200])
def test_experts_and_their_derivatives_equal_a_plain_loop(n_tokens: int) -> None:
    experts = randomized(SMALL).layers[0].experts.eval()
    h = torch.randn(2, n_tokens, SMALL.n_embd, requires_grad=True)
    wanted, (saw, _) = one_by_one(experts, h), experts(h)
    torch.testing.assert_close(saw, wanted)
    inputs, ahead = [h, *experts.parameters()], torch.randn_like(h)
    for one, other in zip(
        torch.autograd.grad(saw, inputs, ahead),
        torch.autograd.grad(wanted, inputs, ahead),
        strict=True,
    ):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_imbalance_is_one_when_even_and_more_when_one_expert_is_preferred() -> None:
    experts = randomized(SMALL).layers[0].experts.eval()
    h = torch.randn(1, 4000, SMALL.n_embd)
    with torch.no_grad():
        _, random = experts(h)
        experts.ffn_gate_inp[0] = 0.5  # the logit of the first is then what `h` sums to
        _, preferred = experts(h + 0.5)
        experts.ffn_gate_inp.zero_()
        _, even = experts(h)
    assert float(even) == pytest.approx(1)
    assert 1 <= float(random) < float(preferred) <= SMALL.n_experts


@pytest.mark.model
@pytest.mark.usefixtures("log_kept")
@pytest.mark.parametrize("shape", [SMALL, DENSE], ids=["qwen3moe", "llama"])
def test_file_means_the_same_in_llama_cpp(
    shape: Shape, byte_tokenizer: Tokenizer, tmp_path: Path
) -> None:
    n_vocab = len(json.loads(byte_tokenizer.to_str())["model"]["vocab"])
    model = randomized(replace(shape, n_vocab=n_vocab))
    path = tmp_path / "model.gguf"
    write_gguf(path, model, byte_tokenizer, GGMLQuantizationType.F16, "random")
    assert check_parity(path, model, WINDOWS) < 1e-3
    with torch.no_grad():
        model.layers[1].attn_q.weight.mul_(-1)
    with pytest.raises(ValueError, match="differ by"):
        check_parity(path, model, WINDOWS)
    if shape.n_experts:
        shares = np.array(expert_shares(path, model, WINDOWS))
        assert shares.shape == (shape.n_layers, shape.n_experts)
        np.testing.assert_allclose(shares.sum(axis=1), 1, rtol=1e-6)


def test_muon_steps_a_stack_like_its_matrices_alone() -> None:
    torch.manual_seed(2)
    stack = torch.randn(3, 64, 32)
    gradient = torch.randn_like(stack)
    together = torch.nn.Parameter(stack.clone())
    alone = [torch.nn.Parameter(matrix.clone()) for matrix in stack]
    together.grad = gradient
    for weight, part in zip(alone, gradient, strict=True):
        weight.grad = part
    Muon([together], lr=0.02, weight_decay=0.1).step()
    for weight in alone:
        Muon([weight], lr=0.02, weight_decay=0.1).step()
    torch.testing.assert_close(together.detach(), torch.stack(alone).detach(), atol=1e-3, rtol=0)
