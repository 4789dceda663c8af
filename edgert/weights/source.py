"""Where each weight's bytes lie: in the model's files as they are, or repacked in a packed file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from edgert.llama.backend import Layout
from edgert.weights.flash import Extent
from edgert.weights.uses import WeightUse
from quant.tensor_file import TensorFile


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of a weight in a file; `file_index` counts the source's `paths`."""

    name: str
    file_index: int
    offset_bytes: int
    size_bytes: int

    def at(self, address: int) -> Extent:
        """Return the extent that puts these bytes at `address`."""
        return Extent(self.file_index, self.offset_bytes, self.size_bytes, address, self.name)


class WeightSource(Protocol):
    """Finds weights in files."""

    paths: list[Path]
    sizes_bytes: list[int]
    layout: Layout

    def place(self, name: str) -> Place:
        """Return where to read a weight from."""
        ...

    def original(self, name: str) -> Place:
        """Return where the model's own file has it."""
        ...

    def prepare(self, uses: Mapping[str, WeightUse]) -> None:
        """Tell llama.cpp's tensors how their bytes will lie, before any is bound."""
        ...


class FileSource:
    """The model's files as they are.

    Args:
        file: The validated files.
    """

    layout: Layout = "file"

    def __init__(self, file: TensorFile) -> None:
        self.paths = [shard.path for shard in file.shards]
        self.sizes_bytes = [shard.size_bytes for shard in file.shards]
        self._places = {
            entry.name: Place(entry.name, entry.shard_index, entry.offset_bytes, entry.size_bytes)
            for entry in file.tensors
        }

    def place(self, name: str) -> Place:
        """Return where a weight lies."""
        return self._places[name]

    def original(self, name: str) -> Place:
        """Return where a weight lies."""
        return self._places[name]

    def prepare(self, uses: Mapping[str, WeightUse]) -> None:
        """Nothing changes: llama.cpp expects the bytes as the file has them."""
        del uses
