"""Writes a model with nested experts: the source's keys and tensors, the experts replaced."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import BinaryIO

from quant.formats import NestedType
from quant.metadata import SCALAR_CODES, ArrayField, MetadataValue, ValueType
from quant.nested.code import NestedMatrix
from quant.nested.file import KEY, VERSION
from quant.nested.layout import ALIGNMENT, NestedLayout
from quant.nested.source import ExpertStack, TensorReader, expert_stacks
from quant.tensor_file import TensorEntry, TensorFile

Encoder = Callable[[ExpertStack, int], NestedMatrix]
Progress = Callable[[int, int], None]

_COPIED_BYTES = 1 << 22
_NO_HASH = "0" * 64
_GGUF_VERSION = 3


@dataclass(frozen=True, slots=True)
class NestedRequest:
    """What to write.

    Attributes:
        base: Narrowest width.
        top: Widest.
        source_sha256: Of the source's files.
        calibrated: Whether a calibration text chose the codes.
        down_extra_bits: How much wider down-projections should be kept.
    """

    base: int
    top: int
    source_sha256: str
    calibrated: bool = False
    down_extra_bits: int = 0

    @property
    def type_id(self) -> int:
        """The type of the nested tensors."""
        return int(NestedType[f"NESTED_{self.base}_{self.top}"])


@dataclass(frozen=True, slots=True)
class _Pair:
    key: str
    value_type: ValueType
    payload: bytes


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a tensor goes, relative to the data; `stack` is set for those that are nested."""

    entry: TensorEntry
    stack: ExpertStack | None
    type_id: int
    offset_bytes: int
    size_bytes: int


def write_nested(
    stream: BinaryIO,
    reader: TensorReader,
    request: NestedRequest,
    encode: Encoder,
    progress: Progress,
) -> None:
    """Write the model with its experts nested, everything else byte for byte.

    Args:
        stream: Seekable; the header is completed last.
        reader: The source.
        request: Widths and what the keys say.
        encode: Turns an expert of a stack into its code.
        progress: Told the experts written and their number.

    Raises:
        ConfigError: the model has no experts, or is nested already.
        FormatError: a tensor cannot be read or nested.
    """
    stacks = expert_stacks(reader.file)
    places = list(_places(reader.file, stacks, request))
    hashes = dict.fromkeys(stacks, _NO_HASH)
    header = _header(reader.file, places, request, hashes)
    stream.write(header)
    total, done = sum(stack.n_expert for stack in stacks.values()), 0
    for place in places:
        _pad_to(stream, len(header) + place.offset_bytes)
        if place.stack is None:
            _copy(stream, reader, place.entry)
            continue
        digest = hashlib.sha256()
        for expert in range(place.stack.n_expert):
            content = encode(place.stack, expert).to_bytes()
            digest.update(content)
            stream.write(content)
            done += 1
            progress(done, total)
        hashes[place.entry.name] = digest.hexdigest()
    _pad_to(stream, -(-stream.tell() // ALIGNMENT) * ALIGNMENT)
    stream.seek(0)
    stream.write(_header(reader.file, places, request, hashes))
    stream.seek(0, io.SEEK_END)


def _places(
    file: TensorFile, stacks: Mapping[str, ExpertStack], request: NestedRequest
) -> Iterator[_Place]:
    offset = 0
    for entry in file.tensors:
        stack, type_id, size_bytes = stacks.get(entry.name), int(entry.ggml_type), entry.size_bytes
        if stack is not None:
            layout = NestedLayout(*stack.matrix_shape, request.base, request.top)
            type_id, size_bytes = request.type_id, stack.n_expert * layout.expert_bytes
        yield _Place(entry, stack, type_id, offset, size_bytes)
        offset += -(-size_bytes // ALIGNMENT) * ALIGNMENT


def _header(
    file: TensorFile, places: Sequence[_Place], request: NestedRequest, hashes: Mapping[str, str]
) -> bytes:
    """Return the header, padded; its length depends on nothing but names and shapes."""
    pairs = [*_source_pairs(file), *_own_pairs(request, hashes)]
    parts = [b"GGUF", struct.pack("<IQQ", _GGUF_VERSION, len(places), len(pairs))]
    parts += [_text(pair.key) + struct.pack("<I", pair.value_type) + pair.payload for pair in pairs]
    for place in places:
        shape = place.entry.shape
        parts += [
            _text(place.entry.name),
            struct.pack(f"<I{len(shape)}Q", len(shape), *shape),
            struct.pack("<IQ", place.type_id, place.offset_bytes),
        ]
    header = b"".join(parts)
    return header + bytes(-len(header) % ALIGNMENT)


def _source_pairs(file: TensorFile) -> Iterator[_Pair]:
    for key, value in file.metadata.items():
        if key != "general.alignment" and not key.startswith(("split.", KEY)):
            yield _Pair(key, file.value_types[key], _payload(value, file.value_types[key]))


def _own_pairs(request: NestedRequest, hashes: Mapping[str, str]) -> Iterator[_Pair]:
    numbers = {
        "general.alignment": ALIGNMENT,
        f"{KEY}version": VERSION,
        f"{KEY}base": request.base,
        f"{KEY}top": request.top,
        f"{KEY}down_extra_bits": request.down_extra_bits,
    }
    for key, number in numbers.items():
        yield _Pair(key, ValueType.UINT32, _payload(number, ValueType.UINT32))
    yield _Pair(f"{KEY}source", ValueType.STRING, _text(request.source_sha256))
    calibrated = _payload(request.calibrated, ValueType.BOOL)
    yield _Pair(f"{KEY}calibrated", ValueType.BOOL, calibrated)
    yield _Pair(f"{KEY}tensors", ValueType.ARRAY, _strings(list(hashes)))
    yield _Pair(f"{KEY}sha256", ValueType.ARRAY, _strings(list(hashes.values())))


def _payload(value: MetadataValue, value_type: ValueType) -> bytes:
    if isinstance(value, ArrayField):
        return struct.pack("<IQ", value.element_type, value.count) + value.read_bytes()
    if isinstance(value, str):
        return _text(value)
    return SCALAR_CODES[value_type].pack(value)


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _strings(texts: Sequence[str]) -> bytes:
    return struct.pack("<IQ", ValueType.STRING, len(texts)) + b"".join(map(_text, texts))


def _copy(stream: BinaryIO, reader: TensorReader, entry: TensorEntry) -> None:
    for first in range(0, entry.size_bytes, _COPIED_BYTES):
        n_bytes = min(_COPIED_BYTES, entry.size_bytes - first)
        stream.write(reader.data(entry, first, n_bytes).data)


def _pad_to(stream: BinaryIO, position: int) -> None:
    stream.write(bytes(position - stream.tell()))


def hash_files(file: TensorFile) -> str:
    """Return the SHA-256 over the bytes of a model's files, one after the other."""
    digest = hashlib.sha256()
    for shard in file.shards:
        with shard.path.open("rb") as stream:
            shard.check_unchanged(stream.fileno())
            while part := stream.read(_COPIED_BYTES):
                digest.update(part)
    return digest.hexdigest()
