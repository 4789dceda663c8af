"""Bytes a model asks for, by layer and tensor class, and how they would sit in a memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Literal

from quant.formats import FORMATS
from quant.tensor_file import TensorEntry

TensorClass = Literal[
    "attention", "feed_forward", "experts", "norm", "embedding", "output", "other"
]

_WINDOW_LAYERS = 2  # the layer that computes and the one being read


@dataclass(frozen=True, slots=True)
class LayerBytes:
    """Weight bytes of one layer, by class."""

    layer_index: int
    by_class: Mapping[TensorClass, int]

    @property
    def total_bytes(self) -> int:
        """Bytes of the layer."""
        return sum(self.by_class.values())


@dataclass(frozen=True, slots=True)
class Workload:
    """What a model is made of.

    Attributes:
        layers: In order of their index.
        outside: Bytes by class of the tensors of no layer: embedding, output, final norm.
        by_type: Bytes by format name.
        n_parameters: Elements of all tensors.
    """

    layers: tuple[LayerBytes, ...]
    outside: Mapping[TensorClass, int]
    by_type: Mapping[str, int]
    n_parameters: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.total_bytes for layer in self.layers) + sum(self.outside.values())


@dataclass(frozen=True, slots=True)
class Split:
    """What stays in memory and what is read on every pass.

    Attributes:
        fits: Whether nothing needs to be streamed.
        n_pinned_layers: Layers that stay.
        pinned_bytes: Weight bytes that stay, those outside of layers included.
        window_bytes: Room through which the other layers pass.
        streamed_bytes: Weight bytes read on every pass.
        missing_bytes: What lacks even for streaming; 0 when it can work.
    """

    fits: bool
    n_pinned_layers: int
    pinned_bytes: int
    window_bytes: int
    streamed_bytes: int
    missing_bytes: int


def describe_workload(tensors: Iterable[TensorEntry]) -> Workload:
    """Count bytes by layer and class."""
    layers: dict[int, dict[TensorClass, int]] = {}
    outside: dict[TensorClass, int] = {}
    by_type: dict[str, int] = {}
    n_parameters = 0
    for tensor in tensors:
        index = tensor.layer_index
        place = outside if index is None else layers.setdefault(index, {})
        kind = tensor_class(tensor.name)
        place[kind] = place.get(kind, 0) + tensor.size_bytes
        type_name = FORMATS[tensor.ggml_type].name
        by_type[type_name] = by_type.get(type_name, 0) + tensor.size_bytes
        n_parameters += prod(tensor.shape)
    ordered = tuple(LayerBytes(index, layers[index]) for index in sorted(layers))
    return Workload(ordered, outside, by_type, n_parameters)


def tensor_class(name: str) -> TensorClass:
    """Tell what a tensor does from its GGUF name."""
    part = name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]
    if part.endswith("norm"):
        return "norm"
    if "_exps" in part or "_chexps" in part:
        return "experts"
    if part.startswith("ffn"):
        return "feed_forward"
    if part.startswith("attn"):
        return "attention"
    if part.startswith(("token_embd", "per_layer_token_embd", "position_embd")):
        return "embedding"
    return "output" if part == "output" else "other"


def split_for_budget(workload: Workload, room_bytes: int) -> Split:
    """Pin as many layers as fit beside a window; the others are read on every pass.

    Of an embedding that is not also the output, only the rows of the tokens at hand are read:
    it counts neither as pinned nor as streamed.

    Args:
        workload: The model.
        room_bytes: What is left for weights: the budget less KV cache, buffers and program.
    """
    outside_bytes = sum(workload.outside.values())
    if "output" in workload.outside:
        outside_bytes -= workload.outside.get("embedding", 0)
    sizes = [layer.total_bytes for layer in workload.layers]
    if workload.weight_bytes <= room_bytes:
        return Split(True, len(sizes), workload.weight_bytes, 0, 0, 0)
    window_bytes = min(_WINDOW_LAYERS, len(sizes)) * max(sizes, default=0)
    left_bytes = room_bytes - outside_bytes - window_bytes
    n_pinned, pinned_bytes = 0, outside_bytes
    for size in sizes:
        if size > left_bytes:
            break
        left_bytes -= size
        pinned_bytes += size
        n_pinned += 1
    missing_bytes = max(0, outside_bytes + window_bytes - room_bytes)
    return Split(False, n_pinned, pinned_bytes, window_bytes, sum(sizes[n_pinned:]), missing_bytes)
