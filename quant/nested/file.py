"""A model file whose experts are nested: which tensors, their layouts and hashes, their bytes."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from edgert.errors import FormatError
from quant.formats import NestedType
from quant.metadata import ArrayField, ValueType
from quant.nested.gains import Gains, check_gains
from quant.nested.layout import GROUP_LENGTH, NestedLayout
from quant.tensor_file import TensorEntry, TensorFile

VERSION = 2
KEY = "edgert.nested."

_CHUNK_BYTES = 1 << 22
_DAMAGED_HINT = "make the file again with edgert quantize --nested"
_STACK_DIMENSIONS = 3


@dataclass(frozen=True, slots=True)
class NestedTensor:
    """A stack of experts: expert e lies at e * layout.expert_bytes from the tensor's start.

    `gains` are what everything of a width is multiplied by, in 1/1024, from base to top.
    """

    entry: TensorEntry
    layout: NestedLayout
    n_expert: int
    sha256: str
    gains: Gains

    def gain(self, width: int) -> int:
        """Return the gain of a width."""
        return self.gains[width - self.layout.base]

    def offset_bytes(self, expert: int) -> int:
        """Return where an expert starts in its shard."""
        if not 0 <= expert < self.n_expert:
            raise ValueError(f"expert {expert} of {self.n_expert}")
        return self.entry.offset_bytes + expert * self.layout.expert_bytes


@dataclass(frozen=True, slots=True)
class NestedModel:
    """The nested tensors of a model.

    Attributes:
        file: The model.
        base: Narrowest width.
        top: Widest.
        source_sha256: Of the file it was made of.
        calibrated: Whether a calibration text chose the codes.
        down_extra_bits: How much wider the down-projections should be kept than the others.
        tensors: By name.
    """

    file: TensorFile
    base: int
    top: int
    source_sha256: str
    calibrated: bool
    down_extra_bits: int
    tensors: Mapping[str, NestedTensor]

    def width_of(self, name: str, width: int) -> int:
        """Return the bits of a tensor where experts have `width`: down-projections get more."""
        extra_bits = self.down_extra_bits if "ffn_down" in name else 0
        return min(self.top, width + extra_bits)

    def read(self, name: str, expert: int, width: int) -> NDArray[np.uint8]:
        """Return the bytes of an expert to the end of plane `width`.

        Raises:
            FormatError: no such tensor, or the file changed or cannot be read.
            ValueError: no such expert or width.
        """
        tensor = self.tensor(name)
        n_bytes = tensor.layout.prefix_bytes(width)
        return self._read(tensor.entry, tensor.offset_bytes(expert), n_bytes)

    def tensor(self, name: str) -> NestedTensor:
        """Return the tensor of that name; FormatError if it is not nested."""
        if name not in self.tensors:
            raise FormatError("the tensor is not nested", path=self.file.path, tensor=name)
        return self.tensors[name]

    def verify(self, name: str) -> None:
        """Compare a tensor with its hash; FormatError if a byte of it is another."""
        tensor = self.tensor(name)
        digest = hashlib.sha256()
        start, end = tensor.entry.offset_bytes, tensor.entry.end_bytes
        for offset in range(start, end, _CHUNK_BYTES):
            part = self._read(tensor.entry, offset, min(_CHUNK_BYTES, end - offset))
            digest.update(part.data)
        if digest.hexdigest() != tensor.sha256:
            self._fail(
                f"its planes have the hash {digest.hexdigest()[:16]}..., "
                f"wanted {tensor.sha256[:16]}...: they are damaged, reordered or another model's",
                tensor.entry,
            )

    def _read(self, entry: TensorEntry, offset: int, n_bytes: int) -> NDArray[np.uint8]:
        shard = self.file.shards[entry.shard_index]
        data = np.empty(n_bytes, np.uint8)
        try:
            with shard.path.open("rb", buffering=0) as stream:
                shard.check_unchanged(stream.fileno())
                view, done = data.data, 0
                while done < n_bytes:
                    n_read = os.preadv(stream.fileno(), [view[done:]], offset + done)
                    if not n_read:
                        self._fail("the file ends inside the tensor", entry)
                    done += n_read
        except OSError as error:
            raise FormatError(
                f"cannot read it: {error.strerror}", path=shard.path, tensor=entry.name
            ) from error
        return data

    def _fail(self, message: str, entry: TensorEntry) -> NoReturn:
        path = self.file.shards[entry.shard_index].path
        raise FormatError(
            message, path=path, offset=entry.offset_bytes, tensor=entry.name, hint=_DAMAGED_HINT
        )


def read_nested(file: TensorFile) -> NestedModel | None:
    """Return the nested tensors of a model, None if it has none.

    Hashes are not compared; see `NestedModel.verify`.

    Raises:
        FormatError: keys and tensors contradict each other, or the version is another.
    """
    entries = [entry for entry in file.tensors if isinstance(entry.ggml_type, NestedType)]
    keys = _Keys(file)
    if not entries and not any(key.startswith(KEY) for key in file.metadata):
        return None
    if (version := keys.number("version")) != VERSION:
        keys.fail("version", f"is {version}, wanted {VERSION}")
    base, top = keys.number("base"), keys.number("top")
    names, hashes = keys.strings("tensors"), keys.strings("sha256")
    if names != [entry.name for entry in entries]:
        keys.fail("tensors", f"names {len(names)} tensors, other than the {len(entries)} there are")
    if len(hashes) != len(names):
        keys.fail("sha256", f"has {len(hashes)} hashes for {len(names)} tensors")
    n_widths = max(0, top - base + 1)
    gains = keys.numbers("gains", len(names) * n_widths)
    tensors = {}
    for index, (entry, digest) in enumerate(zip(entries, hashes, strict=True)):
        if len(digest) != 2 * hashlib.sha256().digest_size:
            keys.fail("sha256", f"holds {digest[:80]!r} for {entry.name}")
        own = tuple(gains[index * n_widths : (index + 1) * n_widths])
        tensors[entry.name] = _nested_tensor(keys, entry, (base, top), digest, own)
    calibrated = file.metadata.get(KEY + "calibrated") is True
    extra_bits = keys.number("down_extra_bits")
    if extra_bits > top:
        keys.fail("down_extra_bits", f"is {extra_bits}, wanted at most {top}")
    return NestedModel(file, base, top, keys.text("source"), calibrated, extra_bits, tensors)


def _nested_tensor(
    keys: _Keys, entry: TensorEntry, widths: tuple[int, int], digest: str, gains: Gains
) -> NestedTensor:
    kind = entry.ggml_type
    if not isinstance(kind, NestedType) or (kind.base, kind.top) != widths:
        keys.fail("base", f"and top are {widths[0]}..{widths[1]}, {entry.name} is of another type")
    if len(entry.shape) != _STACK_DIMENSIONS or entry.shape[0] % GROUP_LENGTH:
        keys.fail("tensors", f"names {entry.name}, which is no stack of experts: {entry.shape}")
    row_length, n_rows, n_expert = entry.shape
    layout = NestedLayout(n_rows, row_length, *widths)
    if layout.expert_bytes * n_expert != entry.size_bytes or not math.prod(entry.shape):
        keys.fail("tensors", f"names {entry.name}, whose size is not that of its experts")
    try:
        check_gains(gains, *widths)
    except ValueError as error:
        keys.fail("gains", f"hold {error} for {entry.name}")
    return NestedTensor(entry, layout, n_expert, digest, gains)


class _Keys:
    """Typed access to the keys of nested precision."""

    def __init__(self, file: TensorFile) -> None:
        self._file = file

    def number(self, key: str) -> int:
        value = self._file.metadata.get(KEY + key)
        if self._file.value_types.get(KEY + key) is not ValueType.UINT32:
            self.fail(key, "is missing or no uint32")
        return value if isinstance(value, int) else 0

    def text(self, key: str) -> str:
        value = self._file.metadata.get(KEY + key)
        if not isinstance(value, str):
            self.fail(key, "is missing or no string")
        return value

    def strings(self, key: str) -> list[str]:
        value = self._file.metadata.get(KEY + key)
        if not isinstance(value, ArrayField) or value.element_type is not ValueType.STRING:
            self.fail(key, "is missing or no array of strings")
        return [str(text) for text in value.read()]

    def numbers(self, key: str, count: int) -> list[int]:
        value = self._file.metadata.get(KEY + key)
        if not isinstance(value, ArrayField) or value.element_type is not ValueType.UINT32:
            self.fail(key, "is missing or no array of uint32")
        if value.count != count:
            self.fail(key, f"has {value.count:,} numbers, wanted {count:,}")
        return [int(number) for number in value.read()]

    def fail(self, key: str, message: str) -> NoReturn:
        raise FormatError(f"key {KEY}{key} {message}", path=self._file.path, hint=_DAMAGED_HINT)
