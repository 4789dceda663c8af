"""The part of a language model that one of several hosts holds when they share every layer.

Each host has its heads and its columns of the FFN, cut by `quant.parts.cuts`, which part files are
made by as well. Norms are whole everywhere; embedding and output are at home, or the output by rows
of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Literal

from partition.language_workload import LanguageWorkload, LayerWorkload, TensorWork
from partition.layer_state import AttentionShape
from partition.manifest import TensorShare
from quant.formats import format_of, row_bytes, type_named
from quant.model_spec import ModelSpec
from quant.parts.cuts import (
    are_alike,
    columns,
    cut_of,
    head_rows,
    most_groups,
    stem,
    vocabulary_rows,
    why_not_cut,
    width_rows,
)
from quant.parts.rules import why_not_apart

HeadPart = Literal["none", "whole", "rows"]


@dataclass(frozen=True, slots=True)
class Part:
    """What one host has: its share of the layers, and the ends.

    Attributes:
        share: Of every layer.
        entrance: Whether token embeddings are looked up there.
        head: Of the output.
    """

    share: TensorShare
    entrance: bool
    head: HeadPart


def why_not_split(workload: LanguageWorkload) -> str | None:
    """Return why no layer can be shared between hosts, None where all can."""
    spec = workload.spec
    layers = workload.run_layers
    heads = {layer.attention.n_head_kv if layer.attention else 0 for layer in layers}
    if any(layer.experts is not None for layer in layers):
        return "experts are not split: a mixture's layers go to one host each"
    if (reason := why_not_apart(spec.architecture, shares=True)) is not None:
        return reason
    if any(layer.kind != "attention" for layer in layers) or len(heads) != 1:
        return "its layers are not alike: each would need a split of its own"
    if spec.n_head % max(heads) or max(heads) < 2:
        return f"{spec.n_head} heads over {max(heads)} KV heads cannot be shared out"
    for layer in layers:
        for tensor in layer.tensors:
            if (reason := why_not_cut(tensor.name, tensor.shape, spec.key_length)) is not None:
                return reason
    n_groups = share_groups(workload)
    if n_groups < 2:
        return "blocks of its weight types reach over all heads"
    downs = [down for down in map(_down, layers) if down is not None]
    if not are_alike(((down.shape[0], _block_length(down)) for down in downs), n_groups):
        return "its FFNs would be cut at different columns: blocks of their types differ"
    one = TensorShare(first_group=0, end_group=1, n_groups=n_groups)
    narrow = [t for layer in layers for t in layer.tensors if _width(t, one) == 0]
    return f"{narrow[0].name} is too narrow for {n_groups} shares" if narrow else None


def share_groups(workload: LanguageWorkload) -> int:
    """Return into how many equal groups of KV heads a layer can be cut, 1 if into none.

    The columns of `attn_output` that belong to a group are whole quantization blocks.
    """
    attention = workload.run_layers[0].attention
    if attention is None:
        return 1
    blocks = {
        _block_length(tensor)
        for layer in workload.run_layers
        for tensor in layer.tensors
        if stem(tensor.name) == "attn_output" and len(tensor.shape) > 1
    }
    return most_groups(attention.n_head, attention.n_head_kv, attention.value_length, blocks)


def split_workload(workload: LanguageWorkload, part: Part) -> LanguageWorkload:
    """Return the model as one host has it: thinner layers, of the same names.

    Args:
        workload: Of a model that `why_not_split` has no objection to.
        part: What the host has.
    """
    layers = tuple(_layer(layer, part.share) for layer in workload.run_layers)
    entrance = workload.entrance if part.entrance else LayerWorkload(None, ())
    head = LayerWorkload(None, tuple(head_tensors(workload.head, part.share, part.head)))
    tensors = {t.name: t.size_bytes for x in (entrance, *layers, head) for t in x.tensors}
    return replace(
        workload,
        spec=_spec(workload.spec, part, sum(tensors.values())),
        layers=layers,
        entrance=entrance,
        head=head,
    )


def largest_layer(layer: LayerWorkload, shares: Sequence[TensorShare]) -> tuple[TensorWork, ...]:
    """Return a layer's tensors in the largest of shares of as many groups each.

    Where a share begins decides what it has of the FFN: whole blocks.
    """
    down = _down(layer)
    if down is None:
        return _tensors(layer, shares[0])
    return _tensors(layer, max(shares, key=lambda share: _width(down, share)))


def unlike_shares(workload: LanguageWorkload) -> list[TensorShare]:
    """Return shares of every number of groups, one for each width that its FFNs may have."""
    n_groups = share_groups(workload)
    downs = [down for down in map(_down, workload.run_layers) if down is not None]
    kinds = {(down.shape, down.type_name): down for down in downs}.values()
    found: dict[tuple[int, ...], TensorShare] = {}
    for first in range(n_groups):
        for end in range(first + 1, n_groups + 1):
            share = TensorShare(first_group=first, end_group=end, n_groups=n_groups)
            widths = (_width(down, share) for down in kinds)
            found.setdefault((end - first, *widths), share)
    return list(found.values())


def part_widths(workload: LanguageWorkload, part: Part) -> tuple[int, ...]:
    """Return what decides the shapes of a part's tensors: parts of equal widths are equal.

    Parts of the same ends, that is: whether they have the entrance and which part of the output.
    """
    share = part.share
    cut = {
        (tensor.shape, tensor.type_name): tensor
        for layer in workload.run_layers
        for tensor in layer.tensors
        if cut_of(tensor.name, len(tensor.shape)) == "columns"
    }
    widths = [_width(tensor, share) for tensor in cut.values()]
    if part.head == "rows":
        heads = [tensor.shape[-1] for tensor in workload.head.tensors if len(tensor.shape) > 1]
        widths += [_rows(n_rows, share) for n_rows in (workload.spec.n_vocab, *heads)]
    return (share.n_groups, share.end_group - share.first_group, *widths)


def head_tensors(head: LayerWorkload, share: TensorShare, part: HeadPart) -> list[TensorWork]:
    """Return the tensors of a host's part of the output; norms are whole."""
    if part != "rows":
        return list(head.tensors) if part == "whole" else []
    found = []
    for tensor in head.tensors:
        if len(tensor.shape) > 1:
            n_rows = _rows(tensor.shape[-1], share)
            found.append(_resized(tensor, (*tensor.shape[:-1], n_rows)))
        else:
            found.append(tensor)
    return found


def _layer(layer: LayerWorkload, share: TensorShare) -> LayerWorkload:
    attention = layer.attention
    if attention is not None:
        attention = _attention(attention, share)
    return replace(layer, tensors=_tensors(layer, share), attention=attention)


def _tensors(layer: LayerWorkload, share: TensorShare) -> tuple[TensorWork, ...]:
    down = _down(layer)
    return tuple(_tensor(tensor, share, down or tensor) for tensor in layer.tensors)


def _down(layer: LayerWorkload) -> TensorWork | None:
    return next((tensor for tensor in layer.tensors if stem(tensor.name) == "ffn_down"), None)


def _attention(attention: AttentionShape, share: TensorShare) -> AttentionShape:
    return replace(
        attention,
        n_head=_scaled(attention.n_head, share),
        n_head_kv=_scaled(attention.n_head_kv, share),
    )


def _tensor(tensor: TensorWork, share: TensorShare, down: TensorWork) -> TensorWork:
    """Return a host's part of a tensor; that of the FFN ends where blocks of `down` do."""
    shape = tensor.shape
    match cut_of(tensor.name, len(shape)):
        case "head_rows":
            return _resized(tensor, (*shape[:-1], _scaled(shape[-1], share)))
        case "width_rows":
            rows = width_rows(shape[-1], down.shape[0], _columns(down, share))
            return _resized(tensor, (*shape[:-1], sum(end - first for first, end in rows)))
        case "columns":
            return _resized(tensor, (_width(tensor, share), *shape[1:]))
        case "whole":
            return tensor


def _scaled(count: int, share: TensorShare) -> int:
    """Return a host's part of what all groups have the same number of."""
    first, end = head_rows(count, share)
    return end - first


def _columns(tensor: TensorWork, share: TensorShare) -> tuple[int, int]:
    """Return the columns of a host's part: whole blocks of the tensor's type."""
    if cut_of(tensor.name, len(tensor.shape)) != "columns":
        return 0, tensor.shape[0]
    return columns(tensor.shape[0], _block_length(tensor), share)


def _block_length(tensor: TensorWork) -> int:
    return format_of(type_named(tensor.type_name)).block_length


def _width(tensor: TensorWork, share: TensorShare) -> int:
    first, end = _columns(tensor, share)
    return end - first


def _rows(n_vocab: int, share: TensorShare) -> int:
    first, end = vocabulary_rows(n_vocab, share)
    return end - first


def _resized(tensor: TensorWork, shape: tuple[int, ...]) -> TensorWork:
    size_bytes = row_bytes(type_named(tensor.type_name), shape[0]) * prod(shape[1:])
    return replace(tensor, shape=shape, size_bytes=size_bytes)


def _spec(spec: ModelSpec, part: Part, weight_bytes: int) -> ModelSpec:
    n_head_kv = spec.n_head_kv_per_layer[0]
    return replace(
        spec,
        n_head=_scaled(spec.n_head, part.share),
        n_head_kv=_scaled(n_head_kv, part.share),
        n_vocab=_rows(spec.n_vocab, part.share) if part.head == "rows" else spec.n_vocab,
        weight_bytes=weight_bytes,
    )
