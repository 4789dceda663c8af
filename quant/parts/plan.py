"""The tensors of a part: which of the model's, which rows and columns of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

from edgert.errors import FormatError
from quant.formats import GgmlType, TensorType, format_of, row_bytes
from quant.model_spec import ModelSpec
from quant.parts.cuts import Range, columns, cut_of, head_rows, stem, width_rows
from quant.parts.spec import EMBEDDING, OUTPUT, OUTPUT_BIAS, OUTPUT_NORM, HeadRows, Names, Share
from quant.tensor_file import TensorEntry, TensorFile

N_ZERO_ROWS = 32  # of embeddings that nobody looks up
EXIT_LENGTH = 32  # heads and FFN of the layer of zeros before a head alone; a block of a KV cache


@dataclass(frozen=True, slots=True)
class PartTensor:
    """A tensor of a part.

    Attributes:
        name: In the part.
        ggml_type: As in the model.
        shape: In the part.
        source: The tensor of the model; None for zeros.
        rows: Ranges of its rows, or elements of a vector, one after the other; None for all.
        columns: Range of its columns, None for all.
    """

    name: str
    ggml_type: TensorType
    shape: tuple[int, ...]
    source: TensorEntry | None = None
    rows: tuple[Range, ...] | None = None
    columns: Range | None = None

    @property
    def size_bytes(self) -> int:
        """Bytes of it, padding excluded."""
        return row_bytes(self.ggml_type, self.shape[0]) * prod(self.shape[1:])


def plan_tensors(file: TensorFile, model: ModelSpec, names: Names) -> tuple[PartTensor, ...]:
    """Return the tensors of a part that `check_part` has no objection to, in order of its file."""
    found = [*_zeros(model, names)]
    for entry in file.tensors:
        name = names.part_name(entry.name)
        if name is not None:
            found.append(_taken(file, model, names, entry))
    return tuple(found)


def ffn_width(file: TensorFile, layer: int, share: Share) -> int | None:
    """Return the columns that a share has of a layer's `ffn_down`, None where there is none."""
    down = file.by_name.get(f"blk.{layer}.ffn_down.weight")
    if down is None:
        return None
    first, end = _columns(down, share)
    return end - first


def _taken(file: TensorFile, model: ModelSpec, names: Names, entry: TensorEntry) -> PartTensor:
    name = names.part_name(entry.name) or entry.name
    kind, shape, share = entry.ggml_type, entry.shape, names.spec.share
    whole = PartTensor(name, kind, shape, entry)
    if entry.layer_index is None:
        head = names.spec.head
        is_output = entry.name in (OUTPUT, OUTPUT_BIAS) or (names.tied and entry.name == EMBEDDING)
        if isinstance(head, HeadRows) and is_output:
            rows = ((head.first, head.end),)
            return PartTensor(name, kind, (*shape[:-1], head.end - head.first), entry, rows)
        return whole
    if share is None:
        return whole
    match cut_of(entry.name, len(shape)):
        case "head_rows":
            return _with_rows(whole, tuple(_head_ranges(file, model, entry, share)))
        case "width_rows":
            down = file.tensor(f"blk.{entry.layer_index}.ffn_down.weight")
            if shape[-1] % down.shape[0]:
                raise _wrong(file, entry, f"{shape[-1]} rows for {down.shape[0]} columns of down")
            return _with_rows(whole, width_rows(shape[-1], down.shape[0], _columns(down, share)))
        case "columns":
            first, end = _columns(entry, share)
            return PartTensor(name, kind, (end - first, *shape[1:]), entry, None, (first, end))
        case "whole":
            return whole


def _with_rows(whole: PartTensor, rows: tuple[Range, ...]) -> PartTensor:
    n_rows = sum(end - first for first, end in rows)
    shape = (*whole.shape[:-1], n_rows)
    return PartTensor(whole.name, whole.ggml_type, shape, whole.source, rows)


def _head_ranges(
    file: TensorFile, model: ModelSpec, entry: TensorEntry, share: Share
) -> Iterator[Range]:
    """Yield the rows of a share of queries, keys or values; a fused tensor has them in turn."""
    n_head_kv = model.n_head_kv_per_layer[0]
    lengths = {
        "attn_q": model.n_head * model.key_length,
        "attn_k": n_head_kv * model.key_length,
        "attn_v": n_head_kv * model.value_length,
    }
    part = stem(entry.name)
    blocks = list(lengths.values()) if part == "attn_qkv" else [lengths[part]]
    if entry.shape[-1] != sum(blocks):
        raise _wrong(file, entry, f"{entry.shape[-1]} rows, wanted {sum(blocks)} for its heads")
    at = 0
    for n_rows in blocks:
        first, end = head_rows(n_rows, share)
        yield at + first, at + end
        at += n_rows


def _columns(entry: TensorEntry, share: Share) -> Range:
    return columns(entry.shape[0], format_of(entry.ggml_type).block_length, share)


def _zeros(model: ModelSpec, names: Names) -> Iterator[PartTensor]:
    """Yield what llama.cpp wants to see and nobody reads."""
    spec, n_embd = names.spec, model.n_embd
    if spec.is_entrance:
        return
    if spec.head == "none":
        if not spec.embedding:
            yield PartTensor(EMBEDDING, GgmlType.F16, (n_embd, N_ZERO_ROWS))
        yield PartTensor(OUTPUT_NORM, GgmlType.F32, (n_embd,))
    if spec.is_exit:
        for name in ("attn_norm", "ffn_norm"):
            yield PartTensor(f"blk.0.{name}.weight", GgmlType.F32, (n_embd,))
        for name in ("attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up"):
            yield PartTensor(f"blk.0.{name}.weight", GgmlType.F16, (n_embd, EXIT_LENGTH))
        for name in ("attn_output", "ffn_down"):
            yield PartTensor(f"blk.0.{name}.weight", GgmlType.F16, (EXIT_LENGTH, n_embd))


def _wrong(file: TensorFile, entry: TensorEntry, message: str) -> FormatError:
    path = file.shards[entry.shard_index].path
    return FormatError(message, path=path, offset=entry.offset_bytes, tensor=entry.name)
