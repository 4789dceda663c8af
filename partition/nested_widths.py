"""Nested experts in the widths of a policy: where they lie, what kernels read, how often each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import accumulate

from partition.cached_tiers import layer_name
from partition.expert_slots import SlotUse, slot_stride
from partition.language_workload import ExpertStack, LanguageWorkload, LayerWorkload, TensorWork

_BISECTIONS = 60
_STEEPEST = 64.0  # of the tilt that moves shares to a measured mean
_FINEST = 1 << 16  # shares are fractions, so that counting stays exact


@dataclass(frozen=True, slots=True)
class StackWidth:
    """One expert of a stack in one width.

    Attributes:
        bits: Of this stack; down-projections may have more than were asked for.
        type_name: ggml type of its blocks in memory.
        memory_bytes: Of its blocks.
        read_bytes: Of its scales and planes in the file.
    """

    bits: int
    type_name: str
    memory_bytes: int
    read_bytes: int


# By tensor, then by the width that was asked for.
NestedStacks = Mapping[str, Mapping[int, StackWidth]]


@dataclass(frozen=True, slots=True)
class WidthRule:
    """Bits by routing weight (edgert/experts/widths.py, `WidthPolicy`).

    Attributes:
        widths: Ascending.
        cuts: Shares of routing weight where they change, one fewer.
        quality: Perplexity at the widest over perplexity with it, where it was measured.
        bits_per_weight: Of the weights that a text used, where it was measured.
    """

    widths: tuple[int, ...]
    cuts: tuple[float, ...] = ()
    quality: float | None = None
    bits_per_weight: float | None = None

    @property
    def words(self) -> str:
        """Name it for people, as `--expert-bits` reads it."""
        return width_words(self.widths, self.cuts)


@dataclass(frozen=True, slots=True)
class NestedWork:
    """A model whose experts are nested, at one rule.

    Attributes:
        stacks: Its nested experts.
        rule: Their widths.
        shares: Part of all that is computed, by width.
    """

    stacks: NestedStacks
    rule: WidthRule
    shares: tuple[float, ...]

    def of(self, tensors: Sequence[TensorWork]) -> tuple[TensorWork, ...]:
        """Return the nested ones among tensors."""
        return tuple(tensor for tensor in tensors if tensor.name in self.stacks)

    def levels(self, tensor: TensorWork) -> tuple[StackWidth, ...]:
        """Return a stack in each width of the rule."""
        return tuple(self.stacks[tensor.name][width] for width in self.rule.widths)

    def slot_uses(self, tensors: Sequence[TensorWork]) -> tuple[SlotUse, ...]:
        """Return what stacks want of a cache, by stack and width."""
        turns = list(dict.fromkeys(layer_name(tensor) for tensor in tensors))
        return tuple(
            SlotUse(
                turns.index(layer_name(tensor)), tensor.shape[-1],
                slot_stride(width.memory_bytes, repacked=True), level,
            )
            for tensor in tensors
            for level, width in enumerate(self.levels(tensor))
        )  # fmt: skip

    def read_bytes(self, tensors: Sequence[TensorWork], level: int) -> int:
        """Return the bytes in the file of all experts of stacks at one width."""
        return sum(t.shape[-1] * self.levels(t)[level].read_bytes for t in tensors)


def width_words(widths: Sequence[int], cuts: Sequence[float]) -> str:
    """Write widths and cuts as `--expert-bits` reads them."""
    shares = "@" + ",".join(f"{cut:g}" for cut in cuts) if cuts else ""
    return ",".join(map(str, widths)) + shares


def nested_work(
    workload: LanguageWorkload, stacks: NestedStacks, rule: WidthRule, n_used: int
) -> NestedWork:
    """Return a rule with the share of each width: assumed, moved to what was measured of it."""
    assumed = assumed_shares(rule, n_used)
    work = NestedWork(stacks, rule, assumed)
    if rule.bits_per_weight is None or len(rule.widths) == 1:
        return work
    tensors = [t for layer in workload.run_layers for t in layer.tensors if t.name in stacks]
    n_weights = sum(t.shape[0] * t.shape[1] * t.shape[2] for t in tensors)
    bits = [8 * work.read_bytes(tensors, i) / n_weights for i in range(len(rule.widths))]
    return replace(work, shares=tilted(assumed, bits, rule.bits_per_weight))


def assumed_shares(rule: WidthRule, n_used: int) -> tuple[float, ...]:
    """Return the share of choices at each width if routing weight falls as 1 / rank."""
    weights = [1.0 / (rank + 1) for rank in range(max(1, n_used))]
    total = sum(weights)
    counts = [0] * len(rule.widths)
    for before in accumulate(weights[:-1], initial=0.0):
        passed = sum(before / total >= cut for cut in rule.cuts)
        counts[len(rule.widths) - 1 - passed] += 1
    return tuple(count / len(weights) for count in counts)


def tilted(shares: Sequence[float], values: Sequence[float], mean: float) -> tuple[float, ...]:
    """Return the shares nearest to some whose mean value is a measured one.

    Args:
        shares: To begin with; none is taken for 0, since it was only assumed.
        values: By share, ascending.
        mean: Taken into the range of the values.
    """
    low, high = -_STEEPEST, _STEEPEST
    least = 1.0 / _FINEST
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        found = _weighted([max(share, least) for share in shares], values, middle)
        if sum(s * v for s, v in zip(found, values, strict=True)) < mean:
            low = middle
        else:
            high = middle
    return _weighted([max(share, least) for share in shares], values, (low + high) / 2)


def _weighted(shares: Sequence[float], values: Sequence[float], slope: float) -> tuple[float, ...]:
    most = max(slope * value for value in values)
    parts = [
        share * 2.0 ** (slope * value - most) for share, value in zip(shares, values, strict=True)
    ]
    return tuple(part / sum(parts) for part in parts)


def as_computed(workload: LanguageWorkload, work: NestedWork) -> LanguageWorkload:
    """Return the model as its kernels see it: nested experts as blocks of their widths."""
    layers = tuple(_computed_layer(layer, work) for layer in workload.layers)
    return replace(workload, layers=layers)


def as_read(tensors: Sequence[TensorWork], work: NestedWork) -> tuple[TensorWork, ...]:
    """Return tensors with the bytes that bring all their experts in the widest width."""
    return tuple(
        replace(t, size_bytes=t.shape[-1] * work.levels(t)[-1].read_bytes)
        if t.name in work.stacks
        else t
        for t in tensors
    )


def _computed_layer(layer: LayerWorkload, work: NestedWork) -> LayerWorkload:
    if layer.experts is None:
        return layer
    tensors: list[TensorWork] = []
    by_type: dict[str, int] = {}
    for tensor in layer.tensors:
        parts = _computed(tensor, work) if tensor.name in work.stacks else [(tensor, 1.0)]
        for part, share in parts:
            tensors.append(part)
            if part.role == "experts":
                held_bytes = int(share * part.size_bytes)
                by_type[part.type_name] = by_type.get(part.type_name, 0) + held_bytes
    stack_bytes = sum(by_type.values())
    old = layer.experts
    experts = ExpertStack(
        old.n_expert, old.n_used, stack_bytes / old.n_expert, stack_bytes, by_type
    )
    return replace(layer, tensors=tuple(tensors), experts=experts)


def _computed(tensor: TensorWork, work: NestedWork) -> list[tuple[TensorWork, float]]:
    """Return a stack at each width that is used, with its share of the use."""
    return [
        (
            replace(
                tensor, type_name=width.type_name,
                size_bytes=tensor.shape[-1] * width.memory_bytes,
                share=tensor.share * Fraction(round(share * _FINEST), _FINEST),
            ),
            share,
        )
        for width, share in zip(work.levels(tensor), work.shares, strict=True)
        if share > 0
    ]  # fmt: skip
