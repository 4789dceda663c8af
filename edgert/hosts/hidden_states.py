"""Hidden states in payloads of steps and results, in the codec that a manifest gives a link.

Four bytes before them say how they are written: version (u8), kind (u8), 0 (u16). The kinds are
`RowsKind`; f32 is taken whatever the codec is, since it loses nothing: what was decoded once and
is sent again comes to the same values.
"""

from __future__ import annotations

import struct
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from edgert.errors import FormatError
from quant.activations.codec import decode, encode
from quant.activations.settings import CodecSettings

Floats = NDArray[np.float32]
Buffer = bytes | memoryview

VERSION = 1
F32 = CodecSettings(kind="f32")

_TAG = struct.Struct("<BBH")
_PIECE = struct.Struct("<II")
TAG_BYTES = _TAG.size


class RowsKind(IntEnum):
    """How rows are written."""

    F32 = 0  # as they lie
    F16 = 1  # as `quant.activations.codec` writes them, like the next one
    ADAPTIVE = 2
    LOGITS = 3  # `edgert.hosts.candidates`
    SEVERAL = 4  # pieces: tokens (u32), bytes (u32), a tagged message


_KINDS = {"f32": RowsKind.F32, "f16": RowsKind.F16, "adaptive": RowsKind.ADAPTIVE}


def tag(kind: RowsKind) -> bytes:
    """Return the four bytes before rows."""
    return _TAG.pack(VERSION, kind, 0)


def write_hidden(rows: Floats, codec: CodecSettings = F32) -> tuple[bytes, Buffer]:
    """Return the tag and the bytes of hidden states; f32 without a copy where they lie in a row.

    Args:
        rows: (n_tokens, n_embd).
        codec: Of the link.

    Raises:
        FormatError: a value is not finite, or too large for f16.
    """
    if not len(rows):
        return tag(RowsKind.F32), b""
    if codec.kind == "f32":
        return tag(RowsKind.F32), np.ascontiguousarray(rows, "<f4").data.cast("B")
    return tag(_KINDS[codec.kind]), encode(rows, codec)


def read_hidden(payload: Buffer, n_rows: int, width: int, codec: CodecSettings = F32) -> Floats:
    """Return hidden states that came; a view where they are f32.

    Args:
        payload: Tag and rows.
        n_rows: That must be there.
        width: Of each.
        codec: Of the link.

    Raises:
        FormatError: they are not as many, damaged, or in another codec.
    """
    kind, body = read_tag(payload)
    if kind is RowsKind.SEVERAL:
        return _read_several(body, n_rows, width, codec)
    if kind is RowsKind.F32:
        if len(body) != 4 * n_rows * width:
            raise FormatError(f"{len(body):,} bytes for {n_rows} x {width} values")
        plain: Floats = np.frombuffer(body, "<f4").reshape(n_rows, width)
        return plain
    if kind is not _KINDS[codec.kind]:
        raise FormatError(f"rows as {kind.name.lower()} on a link of codec {codec.kind}")
    return decode(bytes(body), n_rows, width, codec.basis)


def read_tag(payload: Buffer) -> tuple[RowsKind, memoryview]:
    """Return how rows are written, and their bytes; FormatError for anything else."""
    if len(payload) < TAG_BYTES:
        raise FormatError(f"rows of {len(payload)} bytes, wanted at least {TAG_BYTES}")
    version, kind, zero = _TAG.unpack_from(payload)
    if version != VERSION or zero or kind not in {*RowsKind}:
        raise FormatError(f"rows of version {version}, kind {kind}: not known here")
    return RowsKind(kind), memoryview(payload)[TAG_BYTES:]


def join_hidden(pieces: list[tuple[int, bytes]]) -> bytes:
    """Return one payload of several messages, each with how many tokens it is of."""
    parts = [tag(RowsKind.SEVERAL)]
    for n_tokens, message in pieces:
        parts += [_PIECE.pack(n_tokens, len(message)), message]
    return b"".join(parts)


def _read_several(body: memoryview, n_rows: int, width: int, codec: CodecSettings) -> Floats:
    states = np.empty((n_rows, width), np.float32)
    there = at = 0
    while at < len(body):
        if len(body) - at < _PIECE.size:
            raise FormatError(f"{len(body) - at} bytes after the last of several messages")
        n_tokens, n_bytes = _PIECE.unpack_from(body, at)
        at += _PIECE.size
        message = body[at : at + n_bytes]
        if n_bytes != len(message) or not 1 <= n_tokens <= n_rows - there:
            raise FormatError(
                f"a message of {n_tokens} tokens and {n_bytes:,} bytes, {n_rows - there} and "
                f"{len(body) - at:,} are left"
            )
        if read_tag(message)[0] is RowsKind.SEVERAL:
            raise FormatError("several messages within one of several")
        states[there : there + n_tokens] = read_hidden(message, n_tokens, width, codec)
        there, at = there + n_tokens, at + n_bytes
    if there != n_rows:
        raise FormatError(f"several messages of {there} tokens, wanted {n_rows}")
    return states
