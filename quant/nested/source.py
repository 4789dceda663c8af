"""Experts of an ordinary model, one at a time: their weights, or codes that are nested already."""

from __future__ import annotations

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize
from numpy.typing import NDArray

from edgert.errors import ConfigError, FormatError
from quant.formats import GgmlType, NestedType, row_bytes
from quant.nested.assemble import planes_of
from quant.nested.code import LARGEST, Floats, NestedMatrix, join_planes
from quant.nested.layout import GROUP_LENGTH, NestedLayout
from quant.tensor_file import TensorEntry, TensorFile

_EXPERTS = re.compile(r"blk\.\d+\.ffn_(?P<kind>gate_up|gate|up|down)_exps\.weight")
_STACK_DIMENSIONS = 3
_TOP_OF = {GgmlType.Q4_0: 4, GgmlType.Q5_0: 5, GgmlType.Q8_0: 8}


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """A stacked tensor of experts; `kind` is gate, up, gate_up or down."""

    entry: TensorEntry
    kind: str

    @property
    def n_expert(self) -> int:
        """Experts of the stack."""
        return self.entry.shape[2]

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Rows and row length of one expert."""
        return self.entry.shape[1], self.entry.shape[0]


def expert_stacks(file: TensorFile) -> dict[str, ExpertStack]:
    """Return the stacks of experts that can be nested, by name.

    Raises:
        ConfigError: the model has no experts, or is nested already.
        FormatError: rows are no whole groups.
    """
    stacks = {}
    for entry in file.tensors:
        match = _EXPERTS.fullmatch(entry.name)
        if isinstance(entry.ggml_type, NestedType):
            raise ConfigError(
                f"{file.path} is nested already", hint="start from the model it was made of"
            )
        if match is None or len(entry.shape) != _STACK_DIMENSIONS:
            continue
        if entry.shape[0] % GROUP_LENGTH:
            raise FormatError(
                f"rows of {entry.shape[0]} weights, wanted whole groups of {GROUP_LENGTH}",
                path=file.shards[entry.shard_index].path,
                tensor=entry.name,
            )
        stacks[entry.name] = ExpertStack(entry, match["kind"])
    if not stacks:
        raise ConfigError(
            f"{file.path} has no stacked experts, and only experts are nested",
            hint="name a mixture-of-experts model",
        )
    return stacks


class TensorReader:
    """Reads tensors of a model, its files held open."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self._streams: list[BinaryIO] = []
        with ExitStack() as opening:
            for shard in file.shards:
                stream = opening.enter_context(shard.path.open("rb"))
                shard.check_unchanged(stream.fileno())
                self._streams.append(stream)
            self._stack = opening.pop_all()

    def __enter__(self) -> TensorReader:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.close()

    def data(self, entry: TensorEntry, first: int, n_bytes: int) -> NDArray[np.uint8]:
        """Return bytes of a tensor; FormatError if they cannot be read."""
        data = np.empty(n_bytes, np.uint8)
        view, done = data.data, 0
        number = self._streams[entry.shard_index].fileno()
        try:
            while done < n_bytes:
                count = os.preadv(number, [view[done:]], entry.offset_bytes + first + done)
                if not count:
                    raise self._failure("the file ends inside the tensor", entry)
                done += count
        except OSError as error:
            raise self._failure(f"cannot read it: {error.strerror}", entry) from error
        return data

    def expert_data(self, stack: ExpertStack, expert: int) -> NDArray[np.uint8]:
        """Return the bytes of one expert."""
        n_rows, row_length = stack.matrix_shape
        n_bytes = n_rows * row_bytes(stack.entry.ggml_type, row_length)
        return self.data(stack.entry, expert * n_bytes, n_bytes)

    def weights(self, stack: ExpertStack, expert: int) -> Floats:
        """Return the weights of one expert, (n_rows, row_length).

        Raises:
            FormatError: a type that cannot be read as numbers, or a weight that is no number or
                too large, with expert and row.
        """
        n_rows, row_length = stack.matrix_shape
        kind = GGMLQuantizationType(int(stack.entry.ggml_type))
        try:
            data = self.expert_data(stack, expert).reshape(n_rows, -1)
            with np.errstate(invalid="ignore", over="ignore"):  # refused below
                values = np.asarray(dequantize(data, kind), np.float32).reshape(n_rows, row_length)
        except NotImplementedError as error:
            raise self._failure(
                f"type {kind.name} cannot be turned into numbers", stack.entry
            ) from error
        bad = ~(np.abs(values) <= LARGEST).all(axis=1)
        if bad.any():
            row = int(bad.argmax())
            weight = values[row][~(np.abs(values[row]) <= LARGEST)][0]
            raise self._failure(
                f"expert {expert}, row {row} holds {weight}, wanted numbers up to {LARGEST:,.0f}",
                stack.entry,
            )
        return values

    def adopt(self, stack: ExpertStack, expert: int, base: int, top: int) -> NestedMatrix | None:
        """Return an expert whose source is a code of `top` bits already, None for other types."""
        kind = stack.entry.ggml_type
        if not isinstance(kind, GgmlType) or _TOP_OF.get(kind) != top:
            return None
        self.weights(stack, expert)  # refuses what is no number
        scales, planes = planes_of(self.expert_data(stack, expert), top, top)
        layout = NestedLayout(*stack.matrix_shape, base, top)
        return NestedMatrix(layout, scales, join_planes(planes))

    def _failure(self, message: str, entry: TensorEntry) -> FormatError:
        return FormatError(
            message, path=self.file.shards[entry.shard_index].path, tensor=entry.name
        )
