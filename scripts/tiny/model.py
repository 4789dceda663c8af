"""The llama architecture in PyTorch, only as much of it as training needs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True, slots=True)
class Shape:
    """Dimensions of a model; every matrix row is a multiple of 256 long, as K-quants need."""

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

    @property
    def head_dim(self) -> int:
        """Elements of one attention head."""
        return self.n_embd // self.n_heads


CHAT = Shape(n_layers=8)
DRAFT = Shape(n_layers=2, n_kv_heads=2, n_ff=512, dropout=0.0)


def rope_tables(shape: Shape) -> tuple[Tensor, Tensor]:
    """Return cosine and sine, each (n_context, head_dim / 2)."""
    half = shape.head_dim // 2
    rates = shape.rope_base ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(shape.n_context, dtype=torch.float64)[:, None] * rates
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions to x (batch, heads, positions, head_dim), halves paired.

    llama.cpp pairs neighbours for this architecture; the export reorders the rows of the query and
    key matrices, because halves are cheaper here.
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
        self.ffn_gate = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_up = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Map x (batch, positions, n_embd) to the same shape."""
        x = x + self.drop(self.attention(self.norm(x, self.attn_norm), cos, sin))
        h = self.norm(x, self.ffn_norm)
        return x + self.drop(self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h)))

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
        return functional.rms_norm(x, (self.shape.n_embd,), weight, self.shape.rms_eps)

    def attention(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Return causal self-attention of h (batch, positions, n_embd)."""
        batch, length, _ = h.shape
        heads = (batch, length, -1, self.shape.head_dim)
        q = rotate(self.attn_q(h).view(heads).transpose(1, 2), cos, sin)
        k = rotate(self.attn_k(h).view(heads).transpose(1, 2), cos, sin)
        v = self.attn_v(h).view(heads).transpose(1, 2)
        if self.shape.n_kv_heads != self.shape.n_heads:
            repeat = self.shape.n_heads // self.shape.n_kv_heads
            k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_output(mixed.transpose(1, 2).reshape(batch, length, -1))


class TinyLlama(nn.Module):
    """A llama with tied embeddings."""

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
            if weight.ndim == 2 and name != "token_embd":
                nn.init.normal_(weight, std=0.5 * weight.shape[1] ** -0.5)
            if name.endswith(("attn_output.weight", "ffn_down.weight")):
                # A residual branch that starts at zero lets the first steps be large.
                nn.init.zeros_(weight)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Return the mean loss in nats per token; both arguments (batch, positions)."""
        length = tokens.shape[1]
        x = functional.embedding(tokens, self.token_embd)
        for layer in self.layers:
            x = layer(x, self.cos[:length], self.sin[:length])
        x = functional.rms_norm(x, (self.shape.n_embd,), self.output_norm, self.shape.rms_eps)
        logits = functional.linear(x, self.token_embd)
        return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def n_parameters(model: nn.Module) -> int:
    """Return the number of weights."""
    return sum(weight.numel() for weight in model.parameters())
