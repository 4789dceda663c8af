"""The packed file: a model's repacked weights, written once, so that streaming reads them as is.

Layout: magic (8 bytes), header length (u64 little-endian), canonical JSON header, zeros to a page;
then each weight at a page boundary, zeros in between. It holds only weights that ggml repacks; the
rest is read from the model itself. It belongs to one model, one llama.cpp and one processor.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from edgert.errors import ConfigError, FormatError
from edgert.llama.backend import Layout
from edgert.llama.lib import LlamaLibrary
from edgert.weights.flash import page_end
from edgert.weights.repack import Repacker
from edgert.weights.source import FileSource, Place
from edgert.weights.uses import WeightUse
from quant.tensor_file import TensorFile

MAGIC = b"EDGPACK1"
_LENGTH = struct.Struct("<Q")
_LARGEST_HEADER_BYTES = 64 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PackedWeight(_Strict):
    """Where a repacked weight lies; offsets count from the end of the padded header."""

    name: str
    offset_bytes: int = Field(ge=0)
    size_bytes: int = Field(gt=0)


class PackedHeader(_Strict):
    """The header of a packed file."""

    version: Literal[1] = 1
    model: str
    kernels: str
    weights: tuple[PackedWeight, ...]

    @property
    def data_bytes(self) -> int:
        """Length of everything after the header."""
        return max((page_end(w.offset_bytes + w.size_bytes) for w in self.weights), default=0)


def model_key(file: TensorFile) -> str:
    """Identify a model by its headers and lengths, without reading its weights."""
    digest = hashlib.sha256()
    for shard in file.shards:
        digest.update(f"{shard.size_bytes} {shard.path.stat().st_mtime_ns}\n".encode())
        with shard.path.open("rb") as stream:
            digest.update(stream.read(shard.data_offset_bytes))
    return digest.hexdigest()


def kernels_key(library: LlamaLibrary, repacker: Repacker) -> str:
    """Identify the kernels that a packed file is for: library version, buffers, processor."""
    text = f"{library.version}\n{repacker.kernels()}\n{library.system_info()}"
    return (
        f"{library.version} {repacker.kernels()} {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    )


def packed_path(folder: Path, file: TensorFile, kernels: str) -> Path:
    """Return where the packed file of a model belongs in a cache folder."""
    digest = hashlib.sha256(f"{model_key(file)}\n{kernels}".encode()).hexdigest()[:32]
    return folder / f"{file.shards[0].path.stem}-{digest}.packed"


def encode_header(header: PackedHeader) -> bytes:
    """Return the bytes before the first weight."""
    text = header.model_dump_json().encode()
    body = MAGIC + _LENGTH.pack(len(text)) + text
    return body.ljust(page_end(len(body)), b"\0")


def read_header(path: Path) -> tuple[PackedHeader, int]:
    """Read and check a packed file's header; returns it and where the weights begin.

    Raises:
        FormatError: not a packed file, truncated, or inconsistent.
    """
    size_bytes = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(len(MAGIC) + _LENGTH.size)
        if len(start) < len(MAGIC) + _LENGTH.size or not start.startswith(MAGIC):
            raise FormatError(f"not a packed file: starts with {start[:8]!r}", path=path, offset=0)
        (length,) = _LENGTH.unpack(start[len(MAGIC) :])
        if length > min(_LARGEST_HEADER_BYTES, size_bytes):
            raise FormatError(f"header of {length:,} bytes is too long", path=path, offset=8)
        text = stream.read(length)
    try:
        header = PackedHeader.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"$.{where}: {first['msg']}", path=path, offset=16) from error
    begin = page_end(len(start) + length)
    if size_bytes != begin + header.data_bytes:
        raise FormatError(
            f"file has {size_bytes:,} bytes, its header says {begin + header.data_bytes:,}",
            path=path,
            hint="delete it and run edgert pack again",
        )
    return header, begin


class PackedSource:
    """Weights from a packed file where it has them, else from the model's files.

    Args:
        file: The validated model.
        path: Its packed file.
        library: The checked libraries.
        repacker: Marks the tensors.

    Raises:
        FormatError: the packed file is damaged.
        ConfigError: it is for another model, library or processor.
    """

    layout: Layout = "packed"

    def __init__(
        self, file: TensorFile, path: Path, library: LlamaLibrary, repacker: Repacker
    ) -> None:
        header, begin = read_header(path)
        for what, has, wanted in (
            ("model", header.model, model_key(file)),
            ("kernels", header.kernels, kernels_key(library, repacker)),
        ):
            if has != wanted:
                raise ConfigError(
                    f"{path} is packed for another {what} ({has}, wanted {wanted})",
                    hint="delete it and run edgert pack again",
                )
        self._files = FileSource(file)
        self._repacker = repacker
        self.path = path
        self.paths = [*self._files.paths, path]
        self.sizes_bytes = [*self._files.sizes_bytes, begin + header.data_bytes]
        index = len(self.paths) - 1
        self._packed = {
            weight.name: Place(weight.name, index, begin + weight.offset_bytes, weight.size_bytes)
            for weight in header.weights
        }

    def place(self, name: str) -> Place:
        """Return where to read a weight from."""
        return self._packed.get(name) or self._files.place(name)

    def original(self, name: str) -> Place:
        """Return where the model's own file has it."""
        return self._files.place(name)

    def prepare(self, uses: Mapping[str, WeightUse]) -> None:
        """Mark the packed weights as repacked.

        Raises:
            FormatError: the packed file does not hold what these kernels want.
        """
        chosen = self._repacker.choose(uses)
        wanted = {n: self._repacker.packed_bytes(uses[n], buft) for n, buft in chosen.items()}
        found = {name: place.size_bytes for name, place in self._packed.items()}
        if wanted != found:
            differing = sorted(set(wanted.items()) ^ set(found.items()))[0][0]
            raise FormatError(
                "does not match what the kernels want",
                path=self.path,
                tensor=differing,
                hint="delete it and run edgert pack again",
            )
        self._repacker.mark(uses, chosen)
