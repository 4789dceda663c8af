"""Nested codes as nibbles: what planes and ggml's blocks have in common.

A code is held as two nibbles, the upper four bits and the lower four, left-aligned; four words hold
the 32 nibbles of a group as ggml's four-bit blocks do. Between planes and nibbles lies a
transposition of 4 x 4 bits, its own inverse.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quant.nested.blocks import (
    Q8_0,
    block_form,
    code_scales,
    in_plane_order,
    in_weight_order,
    scale_and_min_words,
)
from quant.nested.layout import Words

_LOW, _HIGH = 0x0F0F0F0F, 0xF0F0F0F0
_EACH = 0x11111111
_SIGNS = 0x88888888


class Work:
    """Room for the nibbles of a piece."""

    def __init__(self, length: int) -> None:
        self._rows = np.empty((14, length), np.uint32)

    def of(self, piece: slice) -> Nibbles:
        """Return cleared nibbles of as many groups as the piece has."""
        return Nibbles(self._rows[:, : piece.stop - piece.start])


class Nibbles:
    """The codes of a piece: `high` and `low` are four words of nibbles each, (4, n_groups)."""

    def __init__(self, rows: Words) -> None:
        self.high, self.low, self.spare, self.swap = rows[:4], rows[4:8], rows[8:12], rows[12:]
        self.has_low = False
        self.is_empty = True

    def load_planes(self, planes: Words, first: int, end: int) -> None:
        """Set bits `first` to `end` of the codes, the others of these nibbles are kept."""
        for half, offset in ((self.high, 0), (self.low, 4)):
            inside = range(max(first, offset), min(end, offset + 4))
            if not inside:
                continue
            fresh = self.is_empty if offset == 0 else not self.has_low
            target = half if fresh else self.spare
            for bit in range(offset, offset + 4):
                row = target[3 - (bit - offset)]
                if bit in inside:
                    row[...] = planes[bit - first]
                else:
                    row[...] = 0
            self._transpose(target)
            if not fresh:
                half |= self.spare
            self.has_low |= offset == 4
        self.is_empty = False

    def store_planes(self, planes: Words) -> None:
        """Take the codes apart into planes, highest bit first; spoils these nibbles."""
        self._transpose(self.high)
        if self.has_low:
            self._transpose(self.low)
        for bit, plane in enumerate(planes):
            plane[...] = self.high[3 - bit] if bit < 4 else self.low[7 - bit]

    def _transpose(self, rows: Words) -> None:
        """Exchange, in every nibble lane, bit i of word j with bit j of word i."""
        swap = self.swap
        # Two pairs of words at once: (0, 2) and (1, 3).
        self._exchange(rows[:2], rows[2:], swap, 2, 0x33333333)
        self._exchange(rows[0::2], rows[1::2], swap, 1, 0x55555555)

    @staticmethod
    def _exchange(a: Words, b: Words, swap: Words, shift: int, mask: int) -> None:
        np.right_shift(a, shift, out=swap)
        np.bitwise_xor(swap, b, out=swap)
        np.bitwise_and(swap, mask, out=swap)
        np.bitwise_xor(b, swap, out=b)
        np.left_shift(swap, shift, out=swap)
        np.bitwise_xor(a, swap, out=a)


def store_blocks(
    nibbles: Nibbles,
    scales: NDArray[np.uint16],
    blocks: NDArray[np.void],
    width: int,
    top: int,
    gain: int,
) -> None:
    """Write codes of `width` bits as blocks, with these scales of the code; spoils the nibbles."""
    high, low, spare, form = nibbles.high, nibbles.low, nibbles.spare, block_form(width, top)
    if form.has_min:
        blocks["dm"] = np.take(scale_and_min_words(width, top, gain), scales)
    else:
        blocks["d"] = scales
    if form is Q8_0:
        _store_bytes(nibbles, blocks["qs"], width)
        return
    if width <= 4:
        if width < 4:
            np.right_shift(high, 4 - width, out=high)
            np.bitwise_and(high, _EACH * ((1 << width) - 1), out=high)
        for c in range(4):
            blocks["qs"][:, c] = high[c]
        return
    np.right_shift(high, 3, out=spare)
    np.bitwise_and(spare, _EACH, out=spare)
    blocks["qh"] = in_weight_order(spare[0] | spare[1] << 1 | spare[2] << 2 | spare[3] << 3)
    np.right_shift(low, 3, out=low)
    np.bitwise_and(low, _EACH, out=low)
    np.left_shift(high, 1, out=high)
    np.bitwise_and(high, 0xEEEEEEEE, out=high)
    for c in range(4):
        blocks["qs"][:, c] = high[c] | low[c]


def _store_bytes(nibbles: Nibbles, words: Words, width: int) -> None:
    """Store q8_0's integers: the code less 128; a code of 6 or 7 bits with half a step."""
    high, low, spare = nibbles.high, nibbles.low, nibbles.spare
    if width < 8:
        half_step = _EACH << 7 - width
        np.bitwise_and(low, _EACH * (0xF & 0xF << 8 - width), out=low)
        np.bitwise_or(low, half_step, out=low)
    np.bitwise_xor(high, _SIGNS, out=high)
    np.bitwise_and(high, _LOW, out=spare)
    np.left_shift(spare, 4, out=spare)
    np.bitwise_and(high, _HIGH, out=high)
    for c in range(4):
        words[:, c] = spare[c] | (low[c] & _LOW)
    np.right_shift(low, 4, out=low)
    np.bitwise_and(low, _LOW, out=low)
    for c in range(4):
        words[:, c + 4] = high[c] | low[c]


def load_blocks(
    nibbles: Nibbles, blocks: NDArray[np.void], width: int, top: int, gain: int
) -> NDArray[np.uint16]:
    """Read blocks into nibbles; returns the scales of the code."""
    high, low, form = nibbles.high, nibbles.low, block_form(width, top)
    nibbles.is_empty = False
    nibbles.has_low = width > 4
    qs = blocks["qs"]
    if form is Q8_0:
        for c in range(4):
            first, second = qs[:, c], qs[:, c + 4]
            high[c] = (first >> 4 & _LOW | second & _HIGH) ^ _SIGNS
            low[c] = first & _LOW | (second & _LOW) << 4
        if width < 8:
            np.bitwise_and(low, _EACH * (0xF & 0xF << 8 - width), out=low)
    elif width == 5:
        lowest = in_plane_order(blocks["qh"])
        for c in range(4):
            high[c] = (qs[:, c] >> 1 & 0x77777777) | (lowest >> c & _EACH) << 3
            low[c] = (qs[:, c] & _EACH) << 3
    else:
        for c in range(4):
            high[c] = qs[:, c] << 4 - width
    if form.has_min:
        scales: NDArray[np.uint16] = np.take(
            code_scales(width, top, gain), (blocks["dm"] & 0xFFFF).astype(np.uint16)
        )
        return scales
    return blocks["d"].copy()
