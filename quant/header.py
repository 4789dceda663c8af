"""Bounds-checked parser of one GGUF header, versions 2 and 3, little-endian.

llama.cpp's own parser aborts or misreads on some inputs, so every length, count and type is checked
here first.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from edgert.errors import ConfigError, FormatError
from quant.metadata import SCALAR_CODES, ArrayField, MetadataValue, ValueType, decode_text

HEADER_CAP_BYTES = 512 << 20
KEY_CAP_BYTES = 64 << 10
NAME_CAP_BYTES = 63  # GGML_MAX_NAME counts the terminating zero
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4

_FIRST_READ_BYTES = 1 << 20
_SMALLEST_PAIR_BYTES = 8 + 1 + 4 + 1  # key length, one letter, type, one-byte value
_SMALLEST_TENSOR_BYTES = (
    8 + 1 + 4 + 8 + 4 + 8
)  # name length, one letter, n_dims, one dim, type, offset
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_PREAMBLE = struct.Struct("<IQQ")

_DAMAGED_HINT = "the header is damaged; download the file again"


@dataclass(frozen=True, slots=True)
class FileStamp:
    """Which file it is and when it last changed, to notice another in its place."""

    device: int
    inode: int
    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, descriptor: int) -> FileStamp:
        """Take the stamp of an open file."""
        status = os.fstat(descriptor)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A tensor as its header states it; type, shape and offset are not judged yet."""

    name: str
    shape: tuple[int, ...]
    type_id: int
    relative_offset_bytes: int
    header_offset_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything before the tensor data of one file."""

    path: Path
    size_bytes: int
    stamp: FileStamp
    version: int
    metadata: Mapping[str, MetadataValue]
    value_types: Mapping[str, ValueType]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset_bytes: int


def read_header(path: Path) -> Header:
    """Parse and check the header of a GGUF file.

    Raises:
        ConfigError: there is no such file, or it is not a regular, readable one.
        FormatError: the header is malformed, with the offset of the offence.
    """
    descriptor = _open_regular(path)
    try:
        return _Parser(path, descriptor).parse()
    finally:
        os.close(descriptor)


def _open_regular(path: Path) -> int:
    """Open for reading without ever blocking on a FIFO or touching a device."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise ConfigError(
                f"{path} is a directory, wanted a GGUF file", hint=_directory_hint(path)
            )
        if not stat.S_ISREG(mode):
            raise ConfigError(
                f"{path} is a {_kind(mode)}, wanted a regular file",
                hint="copy its content to a file first",
            )
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
        raise ConfigError(f"{path} is no longer a regular file")
    except FileNotFoundError as error:
        raise ConfigError(
            f"{path}: no such file", hint="check the path; models end in .gguf"
        ) from error
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the path
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{path!s}: cannot open: {reason}",
            hint="check the permissions of the file and its folders",
        ) from error


def _directory_hint(path: Path) -> str:
    try:
        models = sorted(entry.name for entry in path.iterdir() if entry.suffix == ".gguf")
    except OSError:
        models = []
    return f"name a file in it, such as {path / models[0]}" if models else "name a .gguf file"


def _kind(mode: int) -> str:
    if stat.S_ISFIFO(mode):
        return "FIFO"
    if stat.S_ISSOCK(mode):
        return "socket"
    return "device"


class _Parser:
    """Walks one header; `position` is an offset in the file, whose first bytes `data` holds."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor
        self.stamp = FileStamp.of(descriptor)
        self.size_bytes = self.stamp.size_bytes
        self.data = b""
        self.position = 0

    def parse(self) -> Header:
        """Parse the header from the start of the file to the start of its tensor data."""
        version, n_tensors, n_pairs = self._preamble()
        metadata: dict[str, MetadataValue] = {}
        types: dict[str, ValueType] = {}
        for _ in range(n_pairs):
            start = self.position
            key = self._name("key", KEY_CAP_BYTES)
            if key in metadata:
                self._fail(f"key {key} appears twice", start)
            types[key], metadata[key] = self._value(key)
        alignment = self._alignment(metadata, types)
        tensors = tuple(self._tensor() for _ in range(n_tensors))
        # A file without tensors has no data section to align (gguf_init_from_reader).
        data_offset = -(-self.position // alignment) * alignment if tensors else self.position
        return Header(
            self.path,
            self.size_bytes,
            self.stamp,
            version,
            metadata,
            types,
            tensors,
            alignment,
            data_offset,
        )

    def _preamble(self) -> tuple[int, int, int]:
        if self.size_bytes == 0:
            self._fail(
                "the file is empty, wanted a GGUF model", 0, hint="download or copy it again"
            )
        magic = self._peek(min(4, self.size_bytes))
        if magic != b"GGUF":
            self._fail(
                f"starts with {magic!r}, wanted b'GGUF'", 0, hint=_magic_hint(magic, self.path)
            )
        self.position = 4
        version, n_tensors, n_pairs = self._unpack(_PREAMBLE)
        if version not in (2, 3):
            self._fail(f"GGUF version {version}, wanted 2 or 3", 4, hint=_version_hint(version))
        left = self.size_bytes - self.position
        if n_tensors * _SMALLEST_TENSOR_BYTES + n_pairs * _SMALLEST_PAIR_BYTES > left:
            self._fail(
                f"{n_tensors:,} tensors and {n_pairs:,} metadata keys cannot fit into the "
                f"{left:,} bytes that follow",
                8,
            )
        return version, n_tensors, n_pairs

    def _value(self, key: str) -> tuple[ValueType, MetadataValue]:
        value_type = self._value_type(key)
        if value_type is ValueType.STRING:
            return value_type, decode_text(self._bytes(f"value of {key}"))
        if value_type is ValueType.ARRAY:
            return value_type, self._array(key)
        return value_type, self._unpack(SCALAR_CODES[value_type])[0]

    def _array(self, key: str) -> ArrayField:
        element_type = self._value_type(key)
        if element_type is ValueType.ARRAY:
            self._fail(
                f"key {key} holds an array of arrays, which llama.cpp does not read",
                self.position - 4,
            )
        start = self.position
        (count,) = self._unpack(_U64)
        step = 8 if element_type is ValueType.STRING else SCALAR_CODES[element_type].size
        if count * step > self.size_bytes - self.position:
            self._fail(
                f"key {key} states {count:,} elements, at least {count * step:,} bytes; "
                f"{self.size_bytes - self.position:,} are left in the file",
                start,
            )
        first = self.position
        if element_type is ValueType.STRING:
            self._skip_strings(key, count)
        else:
            self._need(count * step)
            self.position += count * step
        return ArrayField(element_type, count, self.path, first, self.position - first)

    def _skip_strings(self, key: str, count: int) -> None:
        # The hot loop: vocabularies have hundreds of thousands of entries.
        position, left, unpack = self.position, count, _U64.unpack_from
        while left:
            data = self.data
            last = len(data) - 8
            while left and position <= last:
                position += 8 + unpack(data, position)[0]
                left -= 1
            if position > self.size_bytes:
                self._fail(
                    f"string {count - left - 1:,} of key {key} reaches past the end of the file "
                    f"({position:,} > {self.size_bytes:,} bytes)",
                    self.position,
                )
            self.position = position
            self._need(8 if left else 0)

    def _value_type(self, key: str) -> ValueType:
        start = self.position
        (type_id,) = self._unpack(_U32)
        try:
            return ValueType(type_id)
        except ValueError:
            self._fail(f"key {key} has value type {type_id}, wanted 0 to {max(ValueType)}", start)

    def _tensor(self) -> TensorInfo:
        start = self.position
        name = self._name("tensor name", NAME_CAP_BYTES)
        (n_dims,) = self._unpack(_U32)
        if not 1 <= n_dims <= MAX_DIMS:
            self._fail(f"{n_dims} dimensions, wanted 1 to {MAX_DIMS}", start, tensor=name)
        shape = tuple(self._unpack(_U64)[0] for _ in range(n_dims))
        (type_id,) = self._unpack(_U32)
        (offset_bytes,) = self._unpack(_U64)
        return TensorInfo(name, shape, type_id, offset_bytes, start)

    def _alignment(
        self, metadata: Mapping[str, MetadataValue], types: Mapping[str, ValueType]
    ) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if "general.alignment" in types and types["general.alignment"] is not ValueType.UINT32:
            self._fail(
                f"general.alignment is a {types['general.alignment'].name.lower()}, wanted uint32",
                self.position,
            )
        # llama.cpp hands tensors to ggml in place, and ggml asserts 32-byte alignment.
        if (
            not isinstance(alignment, int)
            or alignment % 32
            or alignment & (alignment - 1)
            or alignment == 0
        ):
            self._fail(
                f"general.alignment is {alignment}, wanted a power of two of at least 32",
                self.position,
            )
        return alignment

    def _name(self, what: str, cap_bytes: int) -> str:
        start = self.position
        raw = self._bytes(what, cap_bytes)
        if not raw or b"\0" in raw:
            self._fail(f"{what} is {'empty' if not raw else repr(raw[:80])}", start)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self._fail(f"{what} {raw[:80]!r} is not UTF-8", start)

    def _bytes(self, what: str, cap_bytes: int = HEADER_CAP_BYTES) -> bytes:
        start = self.position
        (length,) = self._unpack(_U64)
        left = self.size_bytes - self.position
        if length > min(cap_bytes, left):
            limit = (
                f"{left:,} are left in the file"
                if length > left
                else f"wanted at most {cap_bytes:,}"
            )
            self._fail(f"{what} states a length of {length:,} bytes, {limit}", start)
        self._need(length)
        self.position += length
        return self.data[self.position - length : self.position]

    def _unpack(self, code: struct.Struct) -> tuple[int, ...]:
        self._need(code.size)
        self.position += code.size
        return code.unpack_from(self.data, self.position - code.size)

    def _peek(self, n_bytes: int) -> bytes:
        self._need(n_bytes)
        return self.data[self.position : self.position + n_bytes]

    def _need(self, n_bytes: int) -> None:
        """Have the next `n_bytes` in `data`, reading on in growing steps."""
        end = self.position + n_bytes
        if end <= len(self.data):
            return
        if end > self.size_bytes:
            self._fail(
                f"the file ends inside the header, after {self.size_bytes:,} bytes; "
                f"{end - self.size_bytes:,} more are wanted here",
                self.position,
                hint="the file is truncated; download it again",
            )
        if end > HEADER_CAP_BYTES:
            self._fail(f"the header is larger than {HEADER_CAP_BYTES:,} bytes", self.position)
        target = min(
            max(end, 2 * len(self.data), _FIRST_READ_BYTES), self.size_bytes, HEADER_CAP_BYTES
        )
        parts, have = [self.data], len(self.data)
        try:
            while have < target:
                parts.append(os.pread(self.descriptor, target - have, have))
                have += len(parts[-1])
                if not parts[-1]:
                    self._fail("the file shrank while its header was read", have)
        except OSError as error:
            raise FormatError(
                f"cannot read the header: {error.strerror}", path=self.path, offset=have
            ) from error
        self.data = b"".join(parts)

    def _fail(
        self, message: str, offset: int, *, tensor: str | None = None, hint: str = _DAMAGED_HINT
    ) -> NoReturn:
        raise FormatError(message, path=self.path, offset=offset, tensor=tensor, hint=hint)


def _magic_hint(magic: bytes, path: Path) -> str:
    if magic == b"FUGG":
        return "the file is big-endian; convert it with llama.cpp's gguf_convert_endian.py"
    if magic in (b"lmgg", b"fmgg", b"tjgg", b"algg", b"ggml", b"ggmf", b"ggjt"):
        return "this is a pre-GGUF ggml file; convert the original model again"
    if magic == b"vers":
        return "this is a Git LFS pointer, not the model; run: git lfs pull"
    if magic[:2] == b"PK" or path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        return "convert it to GGUF with llama.cpp's convert_hf_to_gguf.py"
    if magic.lstrip()[:1] == b"<":
        return "this looks like a web page; download the file itself"
    return "edgert reads GGUF models; check that the download finished"


def _version_hint(version: int) -> str:
    if version == 1:
        return "version 1 is obsolete; convert the model again with a current llama.cpp"
    if version & 0xFFFF == 0:
        return "the file looks big-endian; convert it with llama.cpp's gguf_convert_endian.py"
    return "the header is damaged, or the file is newer than this edgert"
