"""Bytes a model asks for, by layer and tensor class, and how they would sit in a memory budget."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from edgert.errors import CapacityError
from partition.residency import Item, choose_residency
from quant.formats import format_of
from quant.tensor_file import TensorEntry

TensorClass = Literal[
    "attention", "feed_forward", "experts", "norm", "embedding", "output", "other"
]

_PAGE_BYTES = 4096
_NO_MATRICES = ("rope", "ssm_a", "ssm_d", "ssm_conv", "ssm_norm", "time_mix", "shortconv")


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
        items: What a pass reads whole, as a residency is chosen for it.
    """

    layers: tuple[LayerBytes, ...]
    outside: Mapping[TensorClass, int]
    by_type: Mapping[str, int]
    n_parameters: int
    items: tuple[Item, ...]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(layer.total_bytes for layer in self.layers) + sum(self.outside.values())


@dataclass(frozen=True, slots=True)
class Split:
    """What stays in memory and what is read on every pass.

    Attributes:
        fits: Whether nothing needs to be streamed.
        n_pinned_layers: As many layers as stay, put together from tensors of all of them.
        pinned_bytes: Memory of the weights that stay, those outside of layers included.
        window_bytes: Room through which the others pass.
        streamed_bytes: Memory of the weights that are read on every pass.
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
    tensors = tuple(tensors)
    for tensor in tensors:
        index = tensor.layer_index
        place = outside if index is None else layers.setdefault(index, {})
        kind = tensor_class(tensor.name)
        place[kind] = place.get(kind, 0) + tensor.size_bytes
        type_name = format_of(tensor.ggml_type).name
        by_type[type_name] = by_type.get(type_name, 0) + tensor.size_bytes
        n_parameters += prod(tensor.shape)
    ordered = tuple(LayerBytes(index, layers[index]) for index in sorted(layers))
    return Workload(ordered, outside, by_type, n_parameters, _items(tensors, "output" in outside))


def _items(tensors: Iterable[TensorEntry], untied: bool) -> tuple[Item, ...]:
    """List what a pass reads whole; of an embedding that is not also the output only rows are."""
    return tuple(
        Item(
            tensor.name,
            page_bytes(tensor.size_bytes),
            must_pin=not passes(tensor.name, tensor.shape),
        )
        for tensor in tensors
        if not (untied and tensor_class(tensor.name) == "embedding")
    )


def passes(name: str, shape: Sequence[int]) -> bool:
    """Whether llama.cpp's graphs read a weight as the matrix of a product, once a pass.

    Vectors, rotation tables and the parameters of recurrent layers are read by other operations,
    often through views: the runtime must keep them where they are (edgert/weights/uses.py).
    """
    part = name.split(".")[2] if name.startswith("blk.") else name
    return len(shape) > 1 and not part.startswith(_NO_MATRICES) and "bias" not in part


def page_bytes(size_bytes: int) -> int:
    """Return the pages that a tensor at any offset may touch."""
    return (-(-size_bytes // _PAGE_BYTES) + 1) * _PAGE_BYTES


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
    """Choose what stays and what streams, by the rule of the runtime.

    Args:
        workload: The model.
        room_bytes: What is left for weights: the budget less KV cache, buffers and program.
    """
    if workload.weight_bytes <= room_bytes:
        return Split(True, len(workload.layers), workload.weight_bytes, 0, 0, 0)
    missing_bytes = 0
    try:
        residency = choose_residency(workload.items, room_bytes)
    except CapacityError as error:
        missing_bytes = (error.needed_bytes or 0) - room_bytes
        residency = choose_residency(workload.items, room_bytes + missing_bytes)
    in_layers = [item for item in workload.items if item.name.startswith("blk.")]
    layer_bytes = sum(item.size_bytes for item in in_layers)
    pinned = sum(item.size_bytes for item in in_layers if item.name in residency.pinned)
    streamed = sum(i.size_bytes for i in workload.items if i.name not in residency.pinned)
    return Split(
        fits=not streamed and not missing_bytes,
        n_pinned_layers=len(workload.layers) * pinned // max(1, layer_bytes),
        pinned_bytes=residency.pinned_bytes,
        window_bytes=residency.ring_bytes,
        streamed_bytes=streamed,
        missing_bytes=missing_bytes,
    )
