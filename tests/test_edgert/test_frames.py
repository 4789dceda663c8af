"""Headers of frames: byte layout, and what is refused before a size is believed."""

from __future__ import annotations

import random
import struct
from binascii import crc32

import pytest

from edgert.errors import CapacityError, LinkError
from edgert.hosts.frames import (
    HEADER_BYTES,
    FrameKind,
    decode_error,
    decode_header,
    encode_error,
    encode_header,
)

MOST = 1 << 20


def header(**changes: int) -> bytes:
    """Write a header by hand, with a checksum that fits it."""
    facts = {"version": 1, "kind": 4, "zero": 0, "sequence": 7, "n_bytes": 8192, **changes}
    fields = b"EDGX" + struct.pack("<BBHII", *facts.values())
    return fields + struct.pack("<I", crc32(fields))


def test_header_is_laid_out_as_documented() -> None:
    assert encode_header(FrameKind.TENSOR, 7, 8192) == header()
    # magic, version 1, kind 4, zero, sequence 7, 0x2000 bytes
    assert header()[:16].hex(" ", -4) == "45444758 01040000 07000000 00200000"
    assert len(header()) == HEADER_BYTES == 20


@pytest.mark.parametrize("kind", FrameKind)
def test_every_kind_is_read_back(kind: FrameKind) -> None:
    for sequence in (0, (1 << 32) - 1):
        assert decode_header(encode_header(kind, sequence, 0), sequence, MOST) == (kind, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"HTTP/1.1 400 Bad Req", "begins with 48545450, wanted 45444758"),
        (header(version=2), "frames of version 2, wanted 1"),
        (header(kind=0), "unknown kind 0"),
        (header(kind=11), "unknown kind 11"),
        (header(zero=1), "unknown kind 4, flags 1"),
        (header(sequence=8), "frame number 8, wanted 7"),
        (header(sequence=6), "frame number 6, wanted 7"),
        (header(n_bytes=MOST + 1), "TENSOR of 1,048,577 bytes, wanted 1,048,576 at most"),
        (header(n_bytes=0xFFFFFFFF), "TENSOR of 4,294,967,295 bytes"),
        (header(kind=1, n_bytes=4097), "HELLO of 4,097 bytes, wanted 4,096 at most"),
        (header(kind=7, n_bytes=1), "PING of 1 bytes, wanted 0 at most"),
    ],
    ids=range(11),
)
def test_headers_that_are_wrong_say_what_was_seen_and_wanted(content: bytes, message: str) -> None:
    with pytest.raises(LinkError, match=message):
        decode_header(content, 7, MOST)


def test_every_changed_bit_of_a_header_is_refused() -> None:
    for bit in range(HEADER_BYTES * 8):
        changed = bytearray(header())
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(LinkError):
            decode_header(changed, 7, MOST)


def test_frames_larger_than_their_kind_are_not_written() -> None:
    with pytest.raises(ValueError, match="BYE of 1 bytes, 0 at most"):
        encode_header(FrameKind.BYE, 0, 1)


def test_error_says_its_class_message_and_hint() -> None:
    words = decode_error(encode_error(CapacityError("no room", hint="buy some")))
    assert (words.message, words.hint) == ("reports CapacityError: no room", "buy some")
    assert decode_error(encode_error(LinkError("gone"))).hint is None


def test_error_is_bounded_and_harmless_to_a_terminal() -> None:
    error = LinkError("\x1b[2J" + '"\\\U0001f600' * 4000, hint="\r\n" * 4000)
    payload = encode_error(error)
    assert len(payload) <= 8192
    words = decode_error(payload)
    assert words.message.startswith('reports LinkError:  [2J"\\')
    assert (words.message + str(words.hint)).isprintable()


def test_error_that_says_nothing_sensible_is_an_error_all_the_same() -> None:
    rng = random.Random(1)
    payload = encode_error(LinkError("a", hint="b"))
    contents = [b"", b"{}", b"[]", b'{"message": 3}', b'{"message": "\\ud800"}', b"\xff" * 9]
    contents += [payload[: rng.randrange(len(payload))] for _ in range(50)]
    for content in contents:
        assert decode_error(content).message == "reports an error that cannot be read"
    odd = decode_error(b'{"message": "m", "hint": 3, "error": ["x"]}')
    assert (odd.message, odd.hint) == ("reports ['x']: m", None)
