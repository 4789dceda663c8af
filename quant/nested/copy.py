"""A copy of a model with some tensors replaced; keys and everything else stay byte for byte."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from quant.header_writer import Listed, Pair, compose_header, pair
from quant.nested.source import TensorReader
from quant.tensor_file import TensorEntry, TensorFile

COPIED_BYTES = 1 << 22
_DROPPED = ("split.", "edgert.nested.")


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
    listed = [
        Listed(place.entry.name, place.entry.shape, place.type_id, place.offset_bytes)
        for place in places
    ]
    return compose_header([*kept, *added], listed, alignment)


def _parts(reader: TensorReader, entry: TensorEntry) -> Iterator[bytes]:
    for first in range(0, entry.size_bytes, COPIED_BYTES):
        yield reader.data(entry, first, min(COPIED_BYTES, entry.size_bytes - first)).tobytes()


def _pad_to(stream: BinaryIO, position: int) -> None:
    stream.write(bytes(position - stream.tell()))
