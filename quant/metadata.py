"""The key-value part of a GGUF header: value types, scalars, and arrays that stay on disk."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from types import MappingProxyType

from edgert.errors import FormatError


class ValueType(IntEnum):
    """Type ids of metadata values (`enum gguf_type`, ggml/include/gguf.h)."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALAR_CODES: Mapping[ValueType, struct.Struct] = MappingProxyType(
    {
        ValueType.UINT8: struct.Struct("<B"),
        ValueType.INT8: struct.Struct("<b"),
        ValueType.UINT16: struct.Struct("<H"),
        ValueType.INT16: struct.Struct("<h"),
        ValueType.UINT32: struct.Struct("<I"),
        ValueType.INT32: struct.Struct("<i"),
        ValueType.FLOAT32: struct.Struct("<f"),
        ValueType.BOOL: struct.Struct("<?"),
        ValueType.UINT64: struct.Struct("<Q"),
        ValueType.INT64: struct.Struct("<q"),
        ValueType.FLOAT64: struct.Struct("<d"),
    }
)

_LENGTH = struct.Struct("<Q")


def decode_text(raw: bytes) -> str:
    """Decode a metadata string; bytes that are not UTF-8 become surrogates (`surrogateescape`).

    Encoding with the same handler gives the bytes back. Token strings may be any bytes, so refusing
    them would refuse valid models.
    """
    return raw.decode("utf-8", "surrogateescape")


@dataclass(frozen=True, slots=True)
class ArrayField:
    """A metadata array left in its file until somebody reads it."""

    element_type: ValueType
    count: int
    path: Path
    offset_bytes: int
    size_bytes: int

    def read(self) -> list[int] | list[float] | list[bool] | list[str]:
        """Return the elements; strings as `decode_text` has them.

        Raises:
            FormatError: the file changed since its header was checked.
        """
        raw = self.read_bytes()
        if self.element_type is ValueType.STRING:
            return [decode_text(text) for text in self._split(raw)]
        code = SCALAR_CODES[self.element_type].format[-1]
        return list(struct.unpack(f"<{self.count}{code}", raw))

    def read_strings(self) -> list[bytes]:
        """Return the elements of a string array as bytes; FormatError if it is none."""
        if self.element_type is not ValueType.STRING:
            raise FormatError(
                f"wanted an array of strings, saw {self.element_type.name.lower()}",
                path=self.path,
                offset=self.offset_bytes,
            )
        return self._split(self.read_bytes())

    def read_bytes(self) -> bytes:
        """Return the array as it lies in the file."""
        try:
            with self.path.open("rb") as file:
                raw = os.pread(file.fileno(), self.size_bytes, self.offset_bytes)
        except OSError as error:
            raise FormatError(
                f"metadata array unreadable: {error.strerror}",
                path=self.path,
                offset=self.offset_bytes,
            ) from error
        if len(raw) != self.size_bytes:
            raise self._changed()
        return raw

    def _split(self, raw: bytes) -> list[bytes]:
        texts, position = [], 0
        try:
            for _ in range(self.count):
                (length,) = _LENGTH.unpack_from(raw, position)
                position += 8 + length
                texts.append(raw[position - length : position])
        except struct.error as error:
            raise self._changed() from error
        if position != len(raw):
            raise self._changed()
        return texts

    def _changed(self) -> FormatError:
        return FormatError(
            "metadata array differs from when the header was read",
            path=self.path,
            offset=self.offset_bytes,
            hint="the file changed while in use; load it again",
        )


MetadataValue = bool | int | float | str | ArrayField
