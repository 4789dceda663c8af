"""A model's work as a whole, added up from its layers: what the units of a plan must come to."""

from __future__ import annotations

from collections.abc import Callable

from partition.language_workload import LanguageWorkload, LayerWorkload
from partition.layer_state import AttentionShape


def decode_flops(workload: LanguageWorkload, n_cached: int) -> int:
    """Return the operations of one token that sees `n_cached` positions, its own included."""
    weights = sum(sum(part.flops_by_type.values()) for part in _run(workload))
    return weights + _attention(workload, lambda attention: attention.flops(n_cached))


def prefill_flops(
    workload: LanguageWorkload, n_tokens: int, n_cached: int = 0, n_logits: int = 1
) -> int:
    """Return the operations of a prompt of `n_tokens` after `n_cached` positions.

    Only the last `n_logits` tokens go through the output head.
    """
    *layers, head = (sum(part.flops_by_type.values()) for part in _run(workload))
    attention = _attention(workload, lambda shape: shape.prompt_flops(n_tokens, n_cached))
    return n_tokens * sum(layers) + min(n_tokens, n_logits) * head + attention


def active_bytes_per_token(workload: LanguageWorkload) -> int:
    """Return the weight bytes that one token reads; lookups of single rows are not counted."""
    return sum(sum(part.active_by_type.values()) for part in _run(workload))


def _run(workload: LanguageWorkload) -> tuple[LayerWorkload, ...]:
    return (workload.entrance, *workload.run_layers, workload.head)


def _attention(workload: LanguageWorkload, count: Callable[[AttentionShape], int]) -> int:
    shapes = (layer.attention for layer in workload.run_layers)
    return sum(count(shape) for shape in shapes if shape is not None)
