"""The llama and qwen3moe architectures in PyTorch, only as much of them as training needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from tiny.experts import Experts


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a model, qwen3moe if it has experts, of which `n_ff` is the width, else llama.

    Every matrix row is a multiple of 256 long, as K-quants need, but for the experts' last ones.
    """

    n_layers: int
    n_embd: int = 256
    n_heads: int = 4
    n_kv_heads: int = 4
    n_ff: int = 768
    n_vocab: int = 2048
    n_context: int = 512
    rope_base: float = 10000.0
    rms_eps: float = 1e-5
    dropout: float = 0.1
    n_experts: int = 0
    n_experts_used: int = 0

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.n_embd // self.n_heads

    @property
    def n_idle_parameters(self) -> int:
        """Weights of the experts which a token does not use."""
        n_idle = self.n_experts - self.n_experts_used
        return 3 * self.n_layers * n_idle * self.n_ff * self.n_embd


CHAT = Shape(n_layers=8)
DRAFT = Shape(n_layers=2, n_kv_heads=2, n_ff=512, dropout=0.0)
MOE = Shape(n_layers=8, n_ff=128, n_experts=16, n_experts_used=4)


def rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (n_context, head_dim / 2)."""
    half = shape.head_dim // 2
    rates = shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(shape.n_context, dtype=torch.float64)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x (batch, heads, positions, head_dim), halves paired.

    llama.cpp pairs neighbours for llama; the export reorders the rows of the query and key matrices
    then, because halves are cheaper here.
    """
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return rotated.to(x.dtype)


class Layer(nn.Module):
    """One transformer layer: attention and a SwiGLU feed-forward, both after an RMS norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv_rows = shape.n_kv_heads * shape.head_dim
        self.attn_norm = nn.Parameter(torch.ones(shape.n_embd))
        self.ffn_norm = nn.Parameter(torch.ones(shape.n_embd))
        self.attn_q = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.attn_k = nn.Linear(shape.n_embd, kv_rows, bias=False)
        self.attn_v = nn.Linear(shape.n_embd, kv_rows, bias=False)
        self.attn_output = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.experts = None
        if shape.n_experts:
            self.attn_q_norm = nn.Parameter(torch.ones(shape.head_dim))
            self.attn_k_norm = nn.Parameter(torch.ones(shape.head_dim))
            self.experts = Experts(shape)
            return
        self.ffn_gate = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_up = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Map x (batch, positions, n_embd) to the same shape, and to the imbalance of experts."""
        x = x + self.drop(self.attention(self.norm(x, self.attn_norm), cos, sin))
        fed, imbalance = self.feed_forward(self.norm(x, self.ffn_norm))
        return x + self.drop(fed), imbalance

    def feed_forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Return the feed-forward of h, and the imbalance of its experts, 0 without them."""
        if self.experts is not None:
            return self.experts(h)
        return self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h)), torch.zeros(())

    def drop(self, branch: Tensor) -> Tensor:
        """Drop channels of a branch, one mask a row: the few megabytes of stories repeat often.

        A mask for every element would halve the speed on a processor.
        """
        if not self.shape.dropout:
            return branch
        mask = torch.ones(branch.shape[0], 1, branch.shape[2], dtype=branch.dtype)
        return branch * functional.dropout(mask, self.shape.dropout, self.training)

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the RMS norm of x."""
        return functional.rms_norm(x.float(), weight.shape, weight, self.shape.rms_eps).to(x.dtype)

    def attention(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return causal self-attention of h (batch, positions, n_embd)."""
        batch, length, _ = h.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q, k = self.attn_q(h).view(heads), self.attn_k(h).view(heads)
        if self.shape.n_experts:
            q, k = self.norm(q, self.attn_q_norm), self.norm(k, self.attn_k_norm)
        q, k = rotate(q.transpose(1, 2), cos, sin), rotate(k.transpose(1, 2), cos, sin)
        v = self.attn_v(h).view(heads).transpose(1, 2)
        if self.shape.n_kv_heads != self.shape.n_heads:
            repeat = self.shape.n_heads // self.shape.n_kv_heads
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_output(mixed.transpose(1, 2).reshape(batch, length, -1))


class TinyLlama(nn.Module):
    """A llama, or a qwen3moe, with tied embeddings."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Parameter(torch.randn(shape.n_vocab, shape.n_embd) * 0.02)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.n_layers))
        self.output_norm = nn.Parameter(torch.ones(shape.n_embd))
        cos, sin = rope_tables(shape)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        for name, weight in self.named_parameters():
            if weight.ndim > 1 and name != "token_embd":
                nn.init.normal_(weight, std=0.5 * weight.shape[-1] ** -0.5)
            if name.endswith(("attn_output.weight", "ffn_down.weight", "ffn_down_exps")):
                # A residual branch that starts at zero lets the first steps be large.
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss in nats per token, and the imbalance of experts over all layers.

        Both arguments (batch, positions).
        """
        logits, imbalance = self.logits(tokens)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), imbalance

    def logits(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits after each token, (batch, positions, n_vocab), and the imbalance."""
        length = tokens.shape[1]
        x = functional.embedding(tokens, self.token_embd)
        imbalance = torch.zeros(())
        for layer in self.layers:
            x, more = layer(x, self.cos[:length], self.sin[:length])
            imbalance = imbalance + more
        x = functional.rms_norm(x, (self.shape.n_embd,), self.output_norm, self.shape.rms_eps)
        return functional.linear(x, self.token_embd), imbalance


def n_parameters(model: nn.Module) -> int:
    """Return the number of weights."""
    return sum(weight.numel() for weight in model.parameters())
