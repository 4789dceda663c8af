"""What a trained model makes of held-out texts in PyTorch: the loss, which experts are used."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from tiny.measure import Scorer

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from tiny.experts import Experts
    from tiny.model import TinyLlama

PARITY = 0.005


def check_parity(path: Path, model: TinyLlama, windows: list[str]) -> float:
    """Return by which share the loss of `model` differs from that of its GGUF in llama.cpp.

    Raises:
        ValueError: by more than `PARITY`.
    """
    model.eval()
    here = there = 0.0
    with Scorer(path) as scorer, torch.no_grad():
        for window in windows:
            ids = scorer.window_tokens(window, control_tokens=True)
            targets = torch.tensor(ids[1:])
            logits, _ = model.logits(torch.tensor([ids[:-1]]))
            here += float(functional.cross_entropy(logits[0], targets, reduction="sum"))
            logits = torch.from_numpy(scorer.logits(ids[:-1]))
            there += float(functional.cross_entropy(logits, targets, reduction="sum"))
    difference = abs(here / there - 1)
    if not difference <= PARITY:
        raise ValueError(
            f"{path}: the loss in llama.cpp is {there:.2f} nats, in PyTorch {here:.2f}; "
            f"they may differ by {PARITY:.1%}"
        )
    return difference


def expert_shares(path: Path, model: TinyLlama, windows: list[str]) -> list[list[float]]:
    """Return the share of each layer's choices that each expert gets, (layers, experts).

    Args:
        path: the model's GGUF, for its tokenizer.
        model: the model.
        windows: texts, with control tokens or without.
    """
    model.eval()
    counts = [torch.zeros(model.shape.n_experts) for _ in model.layers]

    def count(counted: Tensor, experts: Experts, inputs: tuple[Tensor]) -> None:
        _, chosen, _ = experts.route(inputs[0].flatten(0, 1))
        counted += chosen.flatten().bincount(minlength=len(counted))

    hooks = [
        layer.experts.register_forward_pre_hook(partial(count, counted))
        for layer, counted in zip(model.layers, counts, strict=True)
    ]
    with Scorer(path) as scorer, torch.no_grad():
        for window in windows:
            ids = scorer.window_tokens(window, control_tokens=True)
            model.logits(torch.tensor([ids]))
    for hook in hooks:
        hook.remove()
    return [(counted / counted.sum()).tolist() for counted in counts]
