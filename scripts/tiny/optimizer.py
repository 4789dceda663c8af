"""Muon for the matrices, AdamW for embeddings and norms.

Source: K. Jordan and others, "Muon: An optimizer for hidden layers in neural networks", 2024.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack: Tensor, n_iterations: int = 5) -> Tensor:
    """Return matrices near the closest semi-orthogonal ones; stack (n, rows, columns)."""
    a, b, c = NEWTON_SCHULZ
    x = stack.bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(n_iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalized, for matrices and stacks of them."""

    def __init__(self, params: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.95, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every weight once; matrices of one shape are orthogonalized as one batch."""
        del closure
        for group in self.param_groups:
            by_shape: dict[tuple[int, int], list[nn.Parameter]] = defaultdict(list)
            for weight in group["params"]:
                rows, columns = weight.shape[-2:]
                by_shape[min(rows, columns), max(rows, columns)].append(weight)
            for weights in by_shape.values():
                self._step_stack(weights, group)

    def _step_stack(self, weights: list[nn.Parameter], group: dict[str, float]) -> None:
        updates = []
        for weight in weights:
            state = self.state[weight]
            buffer = state.setdefault("momentum", torch.zeros_like(weight))
            buffer.lerp_(weight.grad, 1 - group["momentum"])
            update = weight.grad.lerp(buffer, group["momentum"])
            update = update.reshape(-1, *weight.shape[-2:])
            updates.append(update.mT if update.shape[1] > update.shape[2] else update)
        wide = orthogonalize(torch.cat(updates)).split([len(update) for update in updates])
        for weight, part in zip(weights, wide, strict=True):
            rows, columns = weight.shape[-2:]
            update = part.mT if rows > columns else part
            scale = max(1.0, rows / columns) ** 0.5
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update.reshape(weight.shape).to(weight.dtype), alpha=-group["lr"] * scale)


def make_optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Return Muon for the layers' matrices and AdamW for everything else."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, weight in model.named_parameters():
        (matrices if weight.ndim > 1 and name != "token_embd" else others).append(weight)
    muon = Muon(matrices, lr=0.02, weight_decay=0.1)
    adam = torch.optim.AdamW(others, lr=0.004, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0)
    optimizers: list[torch.optim.Optimizer] = [muon, adam]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers
