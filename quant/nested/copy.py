"""A copy of a model with some tensors replaced; keys and everything else stay byte for byte."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from quant.metadata import SCALAR_CODES, ArrayField, MetadataValue, ValueType
from quant.nested.source import TensorReader
from quant.tensor_file import TensorEntry, TensorFile

COPIED_BYTES = 1 << 22
_GGUF_VERSION = 3
_DROPPED = ("split.", "edgert.nested.")


@dataclass(frozen=True, slots=True)
class Pair:
    """A metadata pair; `payload` is everything after the type id."""

    key: str
    value_type: ValueType
    payload: bytes


@dataclass(frozen=True, slots=True)
class Replacement:
    """What takes the place of a tensor, in its shape."""

    type_id: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class _Place:
    entry: TensorEntry
    is_replaced: bool
    type_id: int
    offset_bytes: int


def write_copy(
    stream: BinaryIO,
    reader: TensorReader,
    replaced: Mapping[str, Replacement],
    content: Callable[[TensorEntry], Iterable[bytes]],
    pairs: Callable[[], Sequence[Pair]],
) -> None:
    """Write a model in one file.

    Args:
        stream: Seekable.
        reader: The source.
        replaced: By name.
        content: Makes the bytes of a replaced tensor, in order of the file.
        pairs: Returns keys that are added to the source's or take their place; asked before and
            after everything is written, and the same length both times. Names the alignment.
    """
    added = pairs()
    alignment = _alignment(added)
    places = list(_places(reader.file, replaced, alignment))
    header = _header(reader.file, places, added, alignment)
    stream.write(header)
    for place in places:
        _pad_to(stream, len(header) + place.offset_bytes)
        parts = content(place.entry) if place.is_replaced else _parts(reader, place.entry)
        for part in parts:
            stream.write(part)
    _pad_to(stream, -(-stream.tell() // alignment) * alignment)
    stream.seek(0)
    stream.write(_header(reader.file, places, pairs(), alignment))
    stream.seek(0, io.SEEK_END)


def pair(key: str, value_type: ValueType, value: MetadataValue) -> Pair:
    """Return a pair of a scalar, a string or an array of a file."""
    return Pair(key, value_type, _payload(value, value_type))


def string_array(key: str, texts: Sequence[str]) -> Pair:
    """Return a pair of an array of strings."""
    head = struct.pack("<IQ", ValueType.STRING, len(texts))
    return Pair(key, ValueType.ARRAY, head + b"".join(map(_text, texts)))


def number_array(key: str, numbers: Sequence[int]) -> Pair:
    """Return a pair of an array of uint32."""
    head = struct.pack("<IQ", ValueType.UINT32, len(numbers))
    return Pair(key, ValueType.ARRAY, head + struct.pack(f"<{len(numbers)}I", *numbers))


def _alignment(pairs: Sequence[Pair]) -> int:
    for added in pairs:
        if added.key == "general.alignment":
            return int.from_bytes(added.payload, "little")
    raise ValueError("no alignment among the added keys")


def _places(
    file: TensorFile, replaced: Mapping[str, Replacement], alignment: int
) -> Iterator[_Place]:
    offset = 0
    for entry in file.tensors:
        own = replaced.get(entry.name, Replacement(int(entry.ggml_type), entry.size_bytes))
        yield _Place(entry, entry.name in replaced, own.type_id, offset)
        offset += -(-own.size_bytes // alignment) * alignment


def _header(
    file: TensorFile, places: Sequence[_Place], added: Sequence[Pair], alignment: int
) -> bytes:
    """Return the header, padded."""
    own = {pair.key for pair in added}
    kept = [
        pair(key, file.value_types[key], value)
        for key, value in file.metadata.items()
        if key not in own and not key.startswith(_DROPPED)
    ]
    parts = [b"GGUF", struct.pack("<IQQ", _GGUF_VERSION, len(places), len(kept) + len(added))]
    for stored in (*kept, *added):
        parts += [_text(stored.key), struct.pack("<I", stored.value_type), stored.payload]
    for place in places:
        shape = place.entry.shape
        parts += [
            _text(place.entry.name),
            struct.pack(f"<I{len(shape)}Q", len(shape), *shape),
            struct.pack("<IQ", place.type_id, place.offset_bytes),
        ]
    header = b"".join(parts)
    return header + bytes(-len(header) % alignment)


def _payload(value: MetadataValue, value_type: ValueType) -> bytes:
    if isinstance(value, ArrayField):
        return struct.pack("<IQ", value.element_type, value.count) + value.read_bytes()
    if isinstance(value, str):
        return _text(value)
    return SCALAR_CODES[value_type].pack(value)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _parts(reader: TensorReader, entry: TensorEntry) -> Iterator[bytes]:
    for first in range(0, entry.size_bytes, COPIED_BYTES):
        yield reader.data(entry, first, min(COPIED_BYTES, entry.size_bytes - first)).tobytes()


def _pad_to(stream: BinaryIO, position: int) -> None:
    stream.write(bytes(position - stream.tell()))
