"""ggml's blocks of every width, and the tables between them and a nested code."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from quant.nested.gains import UNIT, on_grid
from quant.nested.layout import Words, check_widths


@dataclass(frozen=True, slots=True)
class BlockForm:
    """How ggml holds the codes of one width: `name` is its type, a block is 32 weights.

    Fields of a block: `d` or (with a minimum) `dm` first, `qh` for fifth bits, `qs` for the rest.
    """

    name: str
    block: np.dtype[np.void]

    @property
    def has_min(self) -> bool:
        """Whether a block holds a scale and a minimum instead of a scale."""
        return "dm" in (self.block.names or ())

    @property
    def block_bytes(self) -> int:
        """Bytes of 32 weights."""
        return self.block.itemsize


def _form(name: str, *fields: tuple[str, str, int]) -> BlockForm:
    described = [(key, code, (count,)) if count > 1 else (key, code) for key, code, count in fields]
    return BlockForm(name, np.dtype(described))


_D, _DM, _QH, _QS = ("d", "<u2", 1), ("dm", "<u4", 1), ("qh", "<u4", 1), ("qs", "<u4", 4)
_Q4_0, _Q4_1 = _form("q4_0", _D, _QS), _form("q4_1", _DM, _QS)
_Q5_0, _Q5_1 = _form("q5_0", _D, _QH, _QS), _form("q5_1", _DM, _QH, _QS)
Q8_0 = _form("q8_0", _D, ("qs", "<u4", 8))


def block_form(width: int, top: int) -> BlockForm:
    """Return how ggml holds `width` bits of a code of `top` bits; ValueError for widths beyond."""
    check_widths(min(width, top), top)
    if width > top:
        raise ValueError(f"width {width} of a code of {top} bits")
    if width > 5:
        return Q8_0
    if width == 5:
        return _Q5_0 if top == 5 else _Q5_1
    return _Q4_0 if width == top else _Q4_1


@lru_cache(maxsize=64)
def scale_and_min_words(width: int, top: int, gain: int = UNIT) -> Words:
    """Return, for every f16 by its bits, the words `scale | min << 16` of a block of `width`."""
    step = 1 << top - width
    factor = np.float32(gain / UNIT)
    with np.errstate(over="ignore", invalid="ignore"):
        d = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        d *= factor  # exact: 11 bits each
        scale = (d * step).astype(np.float16).view(np.uint16).astype(np.uint32)
        least = (d * ((step - 1) / 2 - (1 << top - 1))).astype(np.float16)
    words: Words = (scale | least.view(np.uint16).astype(np.uint32) << 16).astype(np.uint32)
    return words


@lru_cache(maxsize=64)
def code_scales(width: int, top: int, gain: int = UNIT) -> NDArray[np.uint16]:
    """Return, for every block scale by its bits, the scale of the code.

    With a gain, scales of codes are on the grid.
    """
    step = np.float32((1 << top - width) * gain / UNIT)
    with np.errstate(over="ignore", invalid="ignore"):
        scale = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
        bits: NDArray[np.uint16] = (scale / step).astype(np.float16).view(np.uint16)
    return bits if gain == UNIT else on_grid(bits)


@lru_cache(maxsize=1)
def _spread() -> tuple[Words, Words]:
    """Return tables for a byte of a plane's word, and for one of a word in weight order."""
    values = np.arange(256, dtype=np.uint32)
    ordered = np.zeros(256, np.uint32)
    plane = np.zeros(256, np.uint32)
    for h in range(2):
        for c in range(4):
            ordered |= (values >> (4 * h + c) & 1) << (16 * h + 4 * c)
    # Byte 2h + i of the ordered word holds weights 16h + 8i and up, that is c = 2i and 2i + 1.
    for c in range(2):
        for m in range(4):
            plane |= (values >> (4 * c + m) & 1) << (8 * m + c)
    return ordered, plane


def in_weight_order(words: Words) -> Words:
    """Reorder the bits of plane words by weight: bit 8m + 4h + c goes to 16h + 4c + m."""
    table = _spread()[0]
    parts = np.ascontiguousarray(words, np.dtype("<u4")).view(np.uint8).reshape(-1, 4)
    result: Words = table[parts[:, 0]]
    for m in range(1, 4):
        result |= table[parts[:, m]] << m
    return result


def in_plane_order(words: Words) -> Words:
    """Undo `in_weight_order`."""
    table = _spread()[1]
    parts = np.ascontiguousarray(words, np.dtype("<u4")).view(np.uint8).reshape(-1, 4)
    result: Words = table[parts[:, 0]]
    for byte in range(1, 4):
        result |= table[parts[:, byte]] << 2 * (byte % 2) + 4 * (byte // 2)
    return result
