"""A GGUF model as an index: shards, metadata, the checked place of every tensor; headers only."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgert.errors import ConfigError, FormatError
from quant.formats import GgmlType, TensorType, format_of, known_type
from quant.header import FileStamp, Header, TensorInfo, read_header
from quant.metadata import ArrayField, MetadataValue, ValueType

__all__ = ["ArrayField", "Shard", "TensorEntry", "TensorFile", "open_tensor_file"]

_LARGEST = 2**63 - 1
_LAYER = re.compile(r"blk\.(\d{1,5})\.")
_SPLIT_NAME = re.compile(r"(?P<prefix>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where one tensor lies.

    `shape` is in ggml's order: the first dimension is the row, contiguous in memory.
    `offset_bytes` counts from the start of the shard.
    """

    name: str
    ggml_type: TensorType
    shape: tuple[int, ...]
    shard_index: int
    offset_bytes: int
    size_bytes: int

    @property
    def end_bytes(self) -> int:
        """First byte after the tensor in its shard."""
        return self.offset_bytes + self.size_bytes

    @property
    def layer_index(self) -> int | None:
        """N for a tensor of layer N (`blk.N.`), None for the others."""
        match = _LAYER.match(self.name)
        return int(match[1]) if match else None


@dataclass(frozen=True, slots=True)
class Shard:
    """One file of a model; tensors fill it from `data_offset_bytes` on."""

    path: Path
    size_bytes: int
    data_offset_bytes: int
    stamp: FileStamp

    def check_unchanged(self, descriptor: int) -> None:
        """Compare an open file with the one that was validated.

        Raises:
            FormatError: it is another, or it changed since.
        """
        if FileStamp.of(descriptor) != self.stamp:
            raise FormatError(
                "the file changed after it was checked", path=self.path, hint="load it again"
            )


@dataclass(frozen=True, slots=True)
class TensorFile:
    """A whole model, one file or several; metadata is that of the first shard.

    Metadata strings that are not UTF-8 hold surrogates; encoding them with `surrogateescape` gives
    the bytes back.
    """

    shards: tuple[Shard, ...]
    metadata: Mapping[str, MetadataValue]
    tensors: tuple[TensorEntry, ...]
    value_types: Mapping[str, ValueType] = field(repr=False)
    by_name: Mapping[str, TensorEntry] = field(repr=False)

    @property
    def path(self) -> Path:
        """The file to open: the first shard."""
        return self.shards[0].path

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors, padding excluded."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    def tensor(self, name: str) -> TensorEntry:
        """Return the tensor of that name; FormatError if the model has none."""
        if name not in self.by_name:
            raise FormatError("the model has no such tensor", path=self.path, tensor=name)
        return self.by_name[name]


def open_tensor_file(path: Path | str) -> TensorFile:
    """Read and check the headers of a model, joining the shards of a split one.

    Args:
        path: A GGUF file; of a split model the first shard (`-00001-of-0000N.gguf`).

    Raises:
        ConfigError: no such file, not a regular or readable file, or not the first shard.
        FormatError: anything in a header that llama.cpp would refuse, misread or abort on.
    """
    first = read_header(Path(path))
    headers = [first, *_other_shards(first)]
    shards = tuple(Shard(h.path, h.size_bytes, h.data_offset_bytes, h.stamp) for h in headers)
    tensors: list[TensorEntry] = []
    for index, header in enumerate(headers):
        tensors += _place_tensors(header, index)
    by_name: dict[str, TensorEntry] = {}
    for tensor in tensors:
        if tensor.name in by_name:
            raise FormatError(
                f"the name appears twice, first in {shards[by_name[tensor.name].shard_index].path}",
                path=shards[tensor.shard_index].path,
                tensor=tensor.name,
            )
        by_name[tensor.name] = tensor
    _check_tensor_count(first, len(tensors))
    return TensorFile(shards, first.metadata, tuple(tensors), first.value_types, by_name)


def _place_tensors(header: Header, shard_index: int) -> list[TensorEntry]:
    """Check types, shapes and places; ggml insists that tensors follow each other without holes."""
    entries: list[TensorEntry] = []
    expected = 0
    for info in header.tensors:
        ggml_type, size_bytes = _checked_size(header, info)
        _check_place(header, info, expected, entries[-1].name if entries else None)
        entries.append(
            TensorEntry(
                info.name,
                ggml_type,
                info.shape,
                shard_index,
                header.data_offset_bytes + expected,
                size_bytes,
            )
        )
        expected += -(-size_bytes // header.alignment) * header.alignment
    _check_inside(header, entries)
    return entries


def _checked_size(header: Header, info: TensorInfo) -> tuple[TensorType, int]:
    def fail(message: str, hint: str | None = None) -> FormatError:
        return FormatError(
            message,
            path=header.path,
            offset=info.header_offset_bytes,
            tensor=info.name,
            hint=hint,
        )

    try:
        ggml_type = known_type(info.type_id)
    except ValueError as error:
        raise fail(
            f"unknown tensor type {info.type_id}, wanted one of 0 to {max(GgmlType)} still in use",
            "the file is damaged, or its type is newer or older than this edgert knows",
        ) from error
    n_elements = 1
    for length in info.shape:
        n_elements *= length
        if not 0 < n_elements <= _LARGEST:
            raise fail(f"shape {info.shape}, wanted positive lengths and fewer than 2^63 elements")
    entry = format_of(ggml_type)
    if info.shape[0] % entry.block_length:
        raise fail(
            f"rows of {info.shape[0]} elements, wanted a multiple of "
            f"{entry.name}'s block of {entry.block_length}"
        )
    size_bytes = n_elements // entry.block_length * entry.block_bytes
    if size_bytes > _LARGEST - header.alignment:
        raise fail(f"shape {info.shape} takes {size_bytes:,} bytes, wanted fewer than 2^63")
    return ggml_type, size_bytes


def _check_place(header: Header, info: TensorInfo, expected: int, previous: str | None) -> None:
    offset = info.relative_offset_bytes
    if offset == expected:
        return
    if offset % header.alignment:
        reason = f"wanted a multiple of {header.alignment}"
    elif offset < expected:
        reason = f"overlaps tensor {previous}, wanted {expected:,}"
    else:
        reason = f"leaves a hole, wanted {expected:,} right after tensor {previous}"
    raise FormatError(
        f"data offset {offset:,}: {reason}",
        path=header.path,
        offset=info.header_offset_bytes,
        tensor=info.name,
        hint="the header is damaged; download or convert the file again",
    )


def _check_inside(header: Header, entries: list[TensorEntry]) -> None:
    outside = [entry for entry in entries if entry.end_bytes > header.size_bytes]
    if not outside:
        return
    raise FormatError(
        f"ends at byte {outside[0].end_bytes:,}, the file at {header.size_bytes:,}; "
        f"{entries[-1].end_bytes - header.size_bytes:,} bytes are missing, "
        f"{len(outside)} of {len(entries)} tensors are incomplete",
        path=header.path,
        offset=outside[0].offset_bytes,
        tensor=outside[0].name,
        hint="the file is truncated; download or copy it again",
    )


def _other_shards(first: Header) -> list[Header]:
    count = _split_value(first, "split.count", ValueType.UINT16, required=False)
    if count is None or count <= 1:
        return []
    number = _split_value(first, "split.no", ValueType.UINT16)
    match = _SPLIT_NAME.fullmatch(first.path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != (number or 0) + 1:
        raise FormatError(
            f"split.no and split.count say shard {(number or 0) + 1} of {count}, "
            "the name of the file says otherwise",
            path=first.path,
            hint=f"name it NAME-{(number or 0) + 1:05d}-of-{count:05d}.gguf, as llama.cpp wants it",
        )
    if number != 0:
        start = first.path.with_name(f"{match['prefix']}-00001-of-{count:05d}.gguf")
        raise ConfigError(
            f"{first.path} is shard {(number or 0) + 1} of {count}, wanted the first",
            hint=f"open {start}",
        )
    names = [f"{match['prefix']}-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    return [
        _read_shard(first.path.with_name(name), index, count)
        for index, name in enumerate(names)
        if index
    ]


def _read_shard(path: Path, index: int, count: int) -> Header:
    try:
        header = read_header(path)
    except ConfigError as error:
        raise FormatError(
            f"shard {index + 1} of {count} is missing or unreadable: {error.message}",
            path=path,
            hint="put all shards of the model into one folder",
        ) from error
    for key, wanted in (("split.no", index), ("split.count", count)):
        saw = _split_value(header, key, ValueType.UINT16)
        if saw != wanted:
            raise FormatError(
                f"{key} is {saw}, wanted {wanted}",
                path=path,
                hint="the shards belong to different models, or were renamed",
            )
    return header


def _split_value(
    header: Header, key: str, wanted: ValueType, *, required: bool = True
) -> int | None:
    """Return a split key, of the exact type: llama.cpp asserts on any other."""
    value, value_type = header.metadata.get(key), header.value_types.get(key)
    if value is None and not required:
        return None
    if value_type is not wanted or not isinstance(value, int):
        saw = "missing" if value_type is None else f"a {value_type.name.lower()}"
        raise FormatError(
            f"{key} is {saw}, wanted a {wanted.name.lower()}",
            path=header.path,
            hint="split the model again with llama.cpp's llama-gguf-split",
        )
    return value


def _check_tensor_count(first: Header, n_tensors: int) -> None:
    count = _split_value(first, "split.count", ValueType.UINT16, required=False)
    if count is None or count <= 1:
        return
    wanted = _split_value(first, "split.tensors.count", ValueType.INT32)
    if wanted != n_tensors:
        raise FormatError(
            f"split.tensors.count is {wanted}, the {count} shards hold {n_tensors} tensors",
            path=first.path,
            hint="the shards belong to different models, or one is damaged",
        )
