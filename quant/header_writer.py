"""Headers of GGUF files that are written: metadata pairs, then the list of tensors."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from quant.metadata import SCALAR_CODES, ArrayField, MetadataValue, ValueType

_GGUF_VERSION = 3


@dataclass(frozen=True, slots=True)
class Pair:
    """A metadata pair; `payload` is everything after the type id."""

    key: str
    value_type: ValueType
    payload: bytes


@dataclass(frozen=True, slots=True)
class Listed:
    """A tensor as a header lists it; the offset counts from the start of the tensor data."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    offset_bytes: int


def pair(key: str, value_type: ValueType, value: MetadataValue) -> Pair:
    """Return a pair of a scalar, a string or an array of a file."""
    return Pair(key, value_type, _payload(value, value_type))


def string_array(key: str, texts: Sequence[str]) -> Pair:
    """Return a pair of an array of strings."""
    head = struct.pack("<IQ", ValueType.STRING, len(texts))
    return Pair(key, ValueType.ARRAY, head + b"".join(map(_text, texts)))


def number_array(key: str, element_type: ValueType, numbers: Sequence[float]) -> Pair:
    """Return a pair of an array of numbers."""
    code = SCALAR_CODES[element_type]
    head = struct.pack("<IQ", element_type, len(numbers))
    return Pair(key, ValueType.ARRAY, head + b"".join(map(code.pack, numbers)))


def compose_header(pairs: Sequence[Pair], tensors: Iterable[Listed], alignment: int) -> bytes:
    """Return a header, padded to the start of the tensor data."""
    listed = list(tensors)
    parts = [b"GGUF", struct.pack("<IQQ", _GGUF_VERSION, len(listed), len(pairs))]
    for stored in pairs:
        parts += [_text(stored.key), struct.pack("<I", stored.value_type), stored.payload]
    for tensor in listed:
        parts += [
            _text(tensor.name),
            struct.pack(f"<I{len(tensor.shape)}Q", len(tensor.shape), *tensor.shape),
            struct.pack("<IQ", tensor.type_id, tensor.offset_bytes),
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
