"""Writes models with nested experts, and plain models of what one width of them means."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Protocol

import numpy as np

from quant.formats import GgmlType, NestedType
from quant.header_writer import Pair, number_array, pair, string_array
from quant.metadata import ValueType
from quant.nested.code import Floats, NestedMatrix
from quant.nested.copy import COPIED_BYTES, Replacement, write_copy
from quant.nested.file import KEY, VERSION
from quant.nested.gains import Gains, no_gains
from quant.nested.layout import ALIGNMENT, NestedLayout
from quant.nested.source import ExpertStack, TensorReader, expert_stacks
from quant.tensor_file import TensorEntry, TensorFile

Values = Callable[[str, int], Floats]
Progress = Callable[[int, int], None]

_NO_HASH = "0" * 64
_HALF_BYTES = 2


class Encoder(Protocol):
    """Turns experts into codes, one after the other."""

    def encode(self, stack: ExpertStack, expert: int) -> NestedMatrix:
        """Return the code of an expert."""
        ...

    def gains(self, name: str) -> Gains:
        """Return the gains of a stack, once all its experts are encoded."""
        ...

    def down_extra_bits(self) -> int:
        """Say, once all are encoded, how much wider down-projections should be kept."""
        ...


@dataclass(frozen=True, slots=True)
class NestedRequest:
    """What to write.

    Attributes:
        base: Narrowest width.
        top: Widest.
        source_sha256: Of the source's files.
        calibrated: Whether a calibration text chose the codes.
    """

    base: int
    top: int
    source_sha256: str
    calibrated: bool = False

    @property
    def type_id(self) -> int:
        """The type of the nested tensors."""
        return int(NestedType[f"NESTED_{self.base}_{self.top}"])


def write_nested(
    stream: BinaryIO,
    reader: TensorReader,
    request: NestedRequest,
    encoder: Encoder,
    progress: Progress,
) -> None:
    """Write a model with its experts nested, everything else byte for byte.

    Args:
        stream: Seekable; the header is completed last.
        reader: The source.
        request: Widths and what the keys say.
        encoder: Turns an expert of a stack into its code.
        progress: Told the experts written and their number.

    Raises:
        ConfigError: the model has no experts, or is nested already.
        FormatError: a tensor cannot be read or nested.
    """
    stacks = expert_stacks(reader.file)
    hashes = dict.fromkeys(stacks, _NO_HASH)
    gains = dict.fromkeys(stacks, no_gains(request.base, request.top))
    total, n_done = sum(stack.n_expert for stack in stacks.values()), 0

    def content(entry: TensorEntry) -> Iterator[bytes]:
        nonlocal n_done
        digest = hashlib.sha256()
        for expert in range(stacks[entry.name].n_expert):
            data = encoder.encode(stacks[entry.name], expert).to_bytes()
            digest.update(data)
            yield data
            n_done += 1
            progress(n_done, total)
        hashes[entry.name] = digest.hexdigest()
        gains[entry.name] = encoder.gains(entry.name)

    replaced = {}
    for name, stack in stacks.items():
        layout = NestedLayout(*stack.matrix_shape, request.base, request.top)
        replaced[name] = Replacement(request.type_id, stack.n_expert * layout.expert_bytes)

    def pairs() -> list[Pair]:
        extra_bits = encoder.down_extra_bits() if n_done else 0
        return [
            *_own_pairs(request, extra_bits),
            string_array(f"{KEY}tensors", list(stacks)),
            string_array(f"{KEY}sha256", list(hashes.values())),
            number_array(
                f"{KEY}gains", ValueType.UINT32, [gain for own in gains.values() for gain in own]
            ),
        ]

    write_copy(stream, reader, replaced, content, pairs)


def write_plain(
    stream: BinaryIO, reader: TensorReader, stacks: Mapping[str, tuple[int, ...]], values: Values
) -> None:
    """Write a model whose experts are halves, so that llama.cpp computes with what a code means.

    Args:
        stream: Seekable.
        reader: The model that everything else is copied from.
        stacks: Shapes of the stacks of experts, by name.
        values: The weights of an expert of a stack.
    """

    def content(entry: TensorEntry) -> Iterator[bytes]:
        for expert in range(stacks[entry.name][-1]):
            yield values(entry.name, expert).astype(np.float16).tobytes()

    replaced = {
        name: Replacement(GgmlType.F16, _HALF_BYTES * math.prod(shape))
        for name, shape in stacks.items()
    }
    alignment = pair("general.alignment", ValueType.UINT32, ALIGNMENT)
    write_copy(stream, reader, replaced, content, lambda: [alignment])


def _own_pairs(request: NestedRequest, down_extra_bits: int) -> list[Pair]:
    numbers = {
        "general.alignment": ALIGNMENT,
        f"{KEY}version": VERSION,
        f"{KEY}base": request.base,
        f"{KEY}top": request.top,
        f"{KEY}down_extra_bits": down_extra_bits,
    }
    return [
        *(pair(key, ValueType.UINT32, number) for key, number in numbers.items()),
        pair(f"{KEY}source", ValueType.STRING, request.source_sha256),
        pair(f"{KEY}calibrated", ValueType.BOOL, request.calibrated),
    ]


def hash_files(file: TensorFile) -> str:
    """Return the SHA-256 over the bytes of a model's files, one after the other."""
    digest = hashlib.sha256()
    for shard in file.shards:
        with shard.path.open("rb") as stream:
            shard.check_unchanged(stream.fileno())
            while part := stream.read(COPIED_BYTES):
                digest.update(part)
    return digest.hexdigest()
