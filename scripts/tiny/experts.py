"""A feed-forward of experts in PyTorch: the router, and only the chosen experts computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from tiny.model import Shape


ROWS_PER_BLOCK = 256


class Experts(nn.Module):
    """SwiGLU experts, of which a router picks some for each token.

    As qwen3moe in llama.cpp: the softmax of all router logits, its largest shares normalized to
    one. No expert has a capacity, so that no token is dropped.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        wide = (shape.n_experts, shape.n_ff, shape.n_embd)
        self.ffn_gate_inp = nn.Parameter(torch.empty(shape.n_experts, shape.n_embd))
        self.ffn_gate_exps = nn.Parameter(torch.empty(wide))
        self.ffn_up_exps = nn.Parameter(torch.empty(wide))
        self.ffn_down_exps = nn.Parameter(torch.empty(wide[0], wide[2], wide[1]))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Map h (batch, positions, n_embd) to the same shape, and to the imbalance of the experts.

        The imbalance is 1 when all are used alike and the number of experts when one has it all.
        Source: W. Fedus and others, "Switch Transformers", section 2.2.
        """
        tokens = h.reshape(-1, self.shape.n_embd)
        shares, chosen, probabilities = self.route(tokens)
        counts = (chosen.flatten()[:, None] == torch.arange(self.shape.n_experts)).sum(0)
        used = counts / counts.sum()
        imbalance = self.shape.n_experts * (used * probabilities.mean(0)).sum()
        return self._compute(tokens, shares, chosen, counts).view(h.shape), imbalance

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return shares and ids of the chosen experts, and all probabilities.

        In float32, like the router's matrix in the file: a rounding error would choose another one.
        """
        with torch.autocast("cpu", enabled=False):
            probabilities = functional.linear(tokens.float(), self.ffn_gate_inp).softmax(-1)
        shares, chosen = probabilities.topk(self.shape.n_experts_used, sorted=False)
        return shares / shares.sum(-1, keepdim=True), chosen, probabilities

    def _compute(self, tokens: Tensor, shares: Tensor, chosen: Tensor, counts: Tensor) -> Tensor:
        """Return the sums of the experts' outputs by their shares, (tokens, n_embd).

        Rows are sorted by expert, an expert's padded to whole blocks, all blocks one batched
        product: the same shapes in every step, for which the processor's kernels are made once.
        """
        dtype = torch.bfloat16 if self.training else tokens.dtype
        n_blocks = chosen.numel() // ROWS_PER_BLOCK + self.shape.n_experts
        ends = counts.add(ROWS_PER_BLOCK - 1).div(ROWS_PER_BLOCK, rounding_mode="floor").cumsum(0)
        owner = (torch.arange(n_blocks)[:, None] >= ends).sum(1)
        selection = (owner[:, None] == torch.arange(self.shape.n_experts)).to(dtype)

        order = chosen.flatten().argsort(stable=True)
        first_slots = functional.pad(ends * ROWS_PER_BLOCK, (1, 0))[:-1]
        first_rows = functional.pad(counts.cumsum(0), (1, 0))[:-1]
        slots = torch.arange(len(order)) + (first_slots - first_rows)[chosen.flatten()[order]]
        places = torch.empty_like(order).scatter_(0, order, slots).view(chosen.shape)
        # An empty slot computes the first token and weighs it by nothing.
        sources = torch.zeros(n_blocks * ROWS_PER_BLOCK, dtype=order.dtype)
        sources = sources.scatter_(0, slots, order // self.shape.n_experts_used)
        weights = torch.zeros(len(sources)).scatter(0, places.flatten(), shares.flatten())

        rows = _Scatter.apply(tokens.to(dtype), sources, places)
        both = torch.cat((self.ffn_gate_exps, self.ffn_up_exps), dim=1)
        gate, up = self._product(rows, both, selection).chunk(2, dim=-1)
        scaled = functional.silu(gate) * up * weights.to(dtype)[:, None]
        rows = self._product(scaled, self.ffn_down_exps, selection)
        return _Gather.apply(rows, sources, places)

    def _product(self, rows: Tensor, experts: Tensor, selection: Tensor) -> Tensor:
        """Return each block's rows times the matrix of its expert.

        The product with `selection` copies a matrix for each block; as a product its derivative is
        one too.
        """
        matrices = selection @ experts.to(selection.dtype).flatten(1)
        matrices = matrices.view(len(selection), *experts.shape[1:])
        blocks = rows.view(len(selection), ROWS_PER_BLOCK, -1)
        return torch.bmm(blocks, matrices.mT).flatten(0, 1)


# One is the derivative of the other; the derivatives which PyTorch finds add row by row.
class _Scatter(torch.autograd.Function):
    """Tokens to rows sorted by expert, one for each expert that a token uses."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, sources: Tensor, places: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(places)
        return tokens[sources]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (places,) = ctx.saved_tensors
        return gradient[places].sum(1), None, None


class _Gather(torch.autograd.Function):
    """The sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sources: Tensor, places: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(sources)
        return rows[places].sum(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        (sources,) = ctx.saved_tensors
        return gradient[sources], None, None
