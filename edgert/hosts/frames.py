"""The frames of exchange links, encoded and checked: no sockets, no buffers.

A frame is a header of 20 bytes (little-endian) and a payload:

    0  magic "EDGX"    4  version    5  kind    6  0 (u16)    8  sequence number (u32)
    12 payload bytes (u32)    16  CRC-32 of the 16 bytes before

A header proves itself before its size is believed; TLS protects payloads.
"""

from __future__ import annotations

import json
import struct
from binascii import crc32
from enum import IntEnum
from typing import TYPE_CHECKING

from edgert.errors import EdgertError, FormatError, LinkError
from edgert.strict_json import read_json

if TYPE_CHECKING:
    from typing_extensions import Buffer

MAGIC = b"EDGX"
VERSION = 1
MOST_FRAME_BYTES = 1 << 30

_FIELDS = struct.Struct("<4sBBHII")
_HEADER = struct.Struct("<4sBBHIII")
_CHECKED = 0x2144DF1C  # the CRC-32 of anything with its CRC-32 behind it
HEADER_BYTES = _HEADER.size
SEQUENCE_END = 1 << 32  # the number after the last one is 0 again

_SHOWN_CHARACTERS = 1000  # two texts of them fit an ERROR frame, whatever they hold
_UPGRADE = "install the same version of edgert on both hosts"


class FrameKind(IntEnum):
    """What a frame is."""

    HELLO = 1
    READY = 2
    STEP = 3
    TENSOR = 4
    RESULT = 5
    CONTROL = 6
    PING = 7
    PONG = 8
    ERROR = 9
    BYE = 10


_KINDS: tuple[FrameKind | None, ...] = (None, *FrameKind)  # by number
_MOST_BYTES = (
    0,
    4 << 10,  # HELLO
    64 << 10,  # READY
    MOST_FRAME_BYTES,  # STEP
    MOST_FRAME_BYTES,  # TENSOR
    MOST_FRAME_BYTES,  # RESULT
    1 << 20,  # CONTROL
    0,  # PING
    0,  # PONG
    8 << 10,  # ERROR
    0,  # BYE
)


def encode_header(kind: FrameKind, sequence: int, n_bytes: int) -> bytes:
    """Return the header of a frame.

    Raises:
        ValueError: a frame of this kind cannot be that large.
    """
    if n_bytes > _MOST_BYTES[kind]:
        raise ValueError(f"{kind.name} of {n_bytes:,} bytes, {_MOST_BYTES[kind]:,} at most")
    fields = _FIELDS.pack(MAGIC, VERSION, kind, 0, sequence, n_bytes)
    return fields + crc32(fields).to_bytes(4, "little")


def decode_header(header: Buffer, sequence: int, most_bytes: int) -> tuple[FrameKind, int]:
    """Check a header and return kind and payload bytes of its frame.

    Args:
        header: `HEADER_BYTES` bytes.
        sequence: The number that is due.
        most_bytes: The largest payload that is taken on this link, whatever its kind.

    Raises:
        LinkError: what was seen and what was wanted, without the peer's name.
    """
    magic, version, code, zero, saw, n_bytes, _ = _HEADER.unpack(header)
    if magic != MAGIC:
        raise LinkError(f"a frame begins with {magic.hex()}, wanted {MAGIC.hex()}")
    if version != VERSION:
        raise LinkError(f"frames of version {version}, wanted {VERSION}", hint=_UPGRADE)
    if crc32(header) != _CHECKED:
        raise LinkError("a frame's header contradicts its own checksum")
    kind = _KINDS[code] if code < len(_KINDS) else None
    if kind is None or zero:
        raise LinkError(f"a frame of unknown kind {code}, flags {zero}", hint=_UPGRADE)
    if saw != sequence:
        raise LinkError(f"frame number {saw:,}, wanted {sequence:,}")
    if n_bytes > most_bytes or n_bytes > _MOST_BYTES[kind]:
        most = min(most_bytes, _MOST_BYTES[kind])
        raise LinkError(f"{kind.name} of {n_bytes:,} bytes, wanted {most:,} at most")
    return kind, n_bytes


def encode_error(error: EdgertError) -> bytes:
    """Write an error as the payload of an ERROR frame."""
    facts = {
        "error": type(error).__name__,
        "message": _shown(error.message),
        "hint": None if error.hint is None else _shown(error.hint),
    }
    return json.dumps(facts, ensure_ascii=False).encode()


def decode_error(payload: Buffer) -> LinkError:
    """Return what the payload of an ERROR frame says, or that it says nothing sensible."""
    try:
        facts = read_json(bytes(payload), "ERROR frame")
    except FormatError:
        facts = None
    if not isinstance(facts, dict) or not isinstance(facts.get("message"), str):
        return LinkError("reports an error that cannot be read")
    hint = facts.get("hint")
    return LinkError(
        f"reports {_shown(str(facts.get('error')))}: {_shown(facts['message'])}",
        hint=_shown(hint) if isinstance(hint, str) else None,
    )


def _shown(text: str) -> str:
    """Cut a text short and leave out what a terminal might obey."""
    clean = "".join(c if c.isprintable() else " " for c in text[:_SHOWN_CHARACTERS])
    return clean.encode("utf-8", "replace").decode()
