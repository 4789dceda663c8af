"""The bytes of a part file: the same for one model and one `PartSpec`, never all in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import BinaryIO

from quant.formats import format_of
from quant.header_writer import Listed, compose_header
from quant.model_spec import read_model_spec
from quant.nested.source import TensorReader
from quant.parts.keys import VERSION, part_pairs
from quant.parts.plan import PartTensor, plan_tensors
from quant.parts.rules import check_part
from quant.parts.spec import OUTPUT, Names, PartSpec
from quant.tensor_file import TensorEntry, TensorFile

PIECE_BYTES = 4 << 20

Piece = tuple[int, Callable[[], bytes]]


@dataclass(frozen=True, slots=True)
class PartContent:
    """A part file that can be made, from any byte on.

    Attributes:
        file: The model.
        tensors: Of the part.
        header: Everything before their data.
        alignment: Of each tensor's beginning.
        key: What decides every byte: model, spec, version; as long as a hash.
    """

    file: TensorFile
    tensors: tuple[PartTensor, ...]
    header: bytes
    alignment: int
    key: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole file."""
        return len(self.header) + sum(self._padded(tensor) for tensor in self.tensors)

    def read(self, offset: int) -> Iterator[bytes]:
        """Yield the file in pieces, from an offset on.

        Raises:
            FormatError: the model's file changed or cannot be read.
        """
        end = 0
        with TensorReader(self.file) as reader:
            for n_bytes, make in self._pieces(reader):
                end += n_bytes
                if n_bytes and offset < end:
                    yield make()[max(0, n_bytes - (end - offset)) :]

    def _pieces(self, reader: TensorReader) -> Iterator[Piece]:
        yield len(self.header), lambda: self.header
        for tensor in self.tensors:
            yield from _pieces_of(reader, tensor)
            padding = self._padded(tensor) - tensor.size_bytes
            yield padding, lambda n_bytes=padding: bytes(n_bytes)  # type: ignore[misc]

    def _padded(self, tensor: PartTensor) -> int:
        return -(-tensor.size_bytes // self.alignment) * self.alignment


def source_identity(sha256: Sequence[str]) -> str:
    """Return what a part calls its source: the hash of a model's file, or a hash of several."""
    if len(sha256) == 1:
        return sha256[0]
    return hashlib.sha256("".join(f"{digest}\n" for digest in sha256).encode()).hexdigest()


def part_content(file: TensorFile, spec: PartSpec, source_sha256: str) -> PartContent:
    """Describe the file of a part; nothing of its weights is read.

    Args:
        file: The model.
        spec: What the part has.
        source_sha256: See `source_identity`.

    Raises:
        ConfigError: no such part can be made of this model, with the reason.
        FormatError: the model is damaged.
    """
    model = read_model_spec(file)
    check_part(file, model, spec)
    names = Names(spec, OUTPUT not in file.by_name, model.architecture)
    tensors = plan_tensors(file, model, names)
    stated = file.metadata.get("general.alignment", 32)
    alignment = stated if isinstance(stated, int) else 32
    listed, at = [], 0
    for tensor in tensors:
        listed.append(Listed(tensor.name, tensor.shape, int(tensor.ggml_type), at))
        at += -(-tensor.size_bytes // alignment) * alignment
    pairs = part_pairs(file, model, names, source_sha256)
    header = compose_header(pairs, listed, alignment)
    key = hashlib.sha256(f"part {VERSION} of {source_sha256}: ".encode() + header).hexdigest()
    return PartContent(file, tensors, header, alignment, key)


def write_part(stream: BinaryIO, file: TensorFile, spec: PartSpec, source_sha256: str) -> None:
    """Write the file of a part; raises as `part_content` does."""
    for piece in part_content(file, spec, source_sha256).read(0):
        stream.write(piece)


def _pieces_of(reader: TensorReader, tensor: PartTensor) -> Iterator[Piece]:
    """Yield a tensor's data by pieces that are read only when they are asked for."""
    source = tensor.source
    if source is None:
        yield from _zeros(tensor.size_bytes)
        return
    row_bytes = source.size_bytes // prod(source.shape[1:] or source.shape)
    n_rows = source.size_bytes // row_bytes
    step = max(1, PIECE_BYTES // row_bytes)
    for first, end in tensor.rows or ((0, n_rows),):
        for row in range(first, end, step):
            yield _rows_of(reader, tensor, source, (row, min(row + step, end)))


def _rows_of(
    reader: TensorReader, tensor: PartTensor, source: TensorEntry, rows: tuple[int, int]
) -> Piece:
    row_bytes = source.size_bytes // prod(source.shape[1:] or source.shape)
    first, n_rows = rows[0], rows[1] - rows[0]
    if tensor.columns is None:
        n_bytes = n_rows * row_bytes
        return n_bytes, lambda: reader.data(source, first * row_bytes, n_bytes).tobytes()
    kind = format_of(source.ggml_type)
    begin, end = (column // kind.block_length * kind.block_bytes for column in tensor.columns)

    def cut() -> bytes:
        data = reader.data(source, first * row_bytes, n_rows * row_bytes)
        return data.reshape(n_rows, row_bytes)[:, begin:end].tobytes()

    return n_rows * (end - begin), cut


def _zeros(n_bytes: int) -> Iterator[Piece]:
    for at in range(0, n_bytes, PIECE_BYTES):
        length = min(PIECE_BYTES, n_bytes - at)
        yield length, lambda n=length: bytes(n)  # type: ignore[misc]
