"""The nested code itself: weights to scales and codes, codes to planes, and what a prefix means."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.nested.gains import UNIT, gained_scales
from quant.nested.layout import GROUP_LENGTH, NestedLayout, Scales, Words, check_widths

LARGEST = 65504.0  # of f16: a ggml block of any width keeps about the largest weight as an f16

Codes = NDArray[np.uint8]
Floats = NDArray[np.float32]


def _weight_of_bit() -> list[int]:
    """Return which weight of a group each bit of a plane's word belongs to.

    For c, m in 0..3: bit 8m + c is weight 4c + m, bit 8m + 4 + c is weight 4c + m + 16, so that
    `(word >> c) & 0x11111111` holds one bit of each nibble of the c-th word of a ggml block.
    """
    order = [0] * GROUP_LENGTH
    for c in range(4):
        for m in range(4):
            order[8 * m + c] = 4 * c + m
            order[8 * m + 4 + c] = 4 * c + m + 16
    return order


_WEIGHT_OF_BIT = _weight_of_bit()


@dataclass(frozen=True, slots=True)
class NestedMatrix:
    """One expert at its full width.

    Attributes:
        layout: Its shape and widths.
        scales: (n_groups,) f16; the sign is that of minus the largest weight of the group.
        codes: (n_groups, 32) of 0..2^top - 1; a weight is about scale * (code - 2^(top - 1)).
    """

    layout: NestedLayout
    scales: Scales
    codes: Codes

    def to_bytes(self) -> bytes:
        """Return the expert as the file holds it."""
        planes = split_planes(self.codes, self.layout.top)
        return self.scales.astype("<f2").tobytes() + planes.tobytes()

    def values(self, width: int, gain: int = UNIT) -> Floats:
        """Return what the first `width` bits mean, (n_rows, row_length); see `decode`."""
        prefix = self.codes >> np.uint8(self.layout.top - width)
        return _values(self.layout, self.scales, prefix, width, gain)


def encode(weights: Floats, base: int, top: int, *, has_gains: bool = False) -> NestedMatrix:
    """Quantize without calibration.

    Args:
        weights: (n_rows, row_length), finite, at most 65504 in magnitude.
        base: Narrowest width.
        top: Widest: 4, 5 or 8.
        has_gains: Whether other experts of its stack are calibrated, so that widths have gains.

    Raises:
        ValueError: a width, the shape or a weight is out of range.
    """
    if weights.ndim != 2:
        raise ValueError(f"weights {weights.shape}, wanted a matrix")
    n_rows, row_length = weights.shape
    layout = NestedLayout(n_rows, row_length, base, top)
    groups = weights.reshape(-1, GROUP_LENGTH)
    scales = largest_scales(groups, top)
    if has_gains:
        scales = gained_scales(scales, top)
    return NestedMatrix(layout, scales, nearest_codes(groups, scales, top))


def largest_scales(groups: Floats, top: int) -> Scales:
    """Return the scales that put the largest weight of each group at the lowest code.

    Source: `quantize_row_q4_0_ref`, ggml/src/ggml-quants.c of llama.cpp.
    """
    column = np.abs(groups).argmax(axis=1)
    largest = np.take_along_axis(groups, column[:, None], axis=1)[:, 0]
    if not (np.abs(largest) <= LARGEST).all():  # a NaN is the largest wherever it stands
        raise ValueError(f"weights must be finite and at most {LARGEST:,.0f} in magnitude")
    scales: Scales = (largest / np.float32(-(1 << top - 1))).astype(np.float16)
    return scales


def nearest_codes(groups: Floats, scales: Scales, top: int) -> Codes:
    """Return the codes nearest to the weights, (n_groups, 32)."""
    d = scales.astype(np.float32)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = np.where(d == 0, np.float32(0), groups / d)
    middle = 1 << top - 1
    codes: Codes = np.clip(np.floor(steps + 0.5) + middle, 0, 2 * middle - 1).astype(np.uint8)
    return codes


def cell_middles(width: int, top: int) -> Floats:
    """Return what each code of `width` bits means, in scales: (2^width,).

    Widths 6 and 7 of an eight-bit code are computed as q8_0, whose integers are half a step beside
    the middle of the cell; they mean those integers.
    """
    check_widths(min(width, top), top)
    step = 1 << top - width
    middle = (step - 1) / 2
    if top == 8 and width in (6, 7):
        middle = step / 2
    codes = np.arange(1 << width, dtype=np.float32)
    return (codes * step + np.float32(middle - (1 << top - 1))).astype(np.float32)


def decode(prefix: NDArray[np.uint8], layout: NestedLayout, width: int, gain: int = UNIT) -> Floats:
    """Return the weights that the first bytes of an expert hold: the reference for every kernel.

    Args:
        prefix: The expert's bytes to the end of plane `width`.
        layout: Of the expert.
        width: Bits of each code, base to top.
        gain: Of the width, in 1/1024.

    Returns:
        (n_rows, row_length).
    """
    scales, planes = layout.split(prefix, width)
    return _values(layout, scales, join_planes(planes), width, gain)


def split_planes(codes: Codes, top: int) -> Words:
    """Return the planes of codes, (top, n_groups), highest bit first."""
    ordered = np.ascontiguousarray(codes[:, _WEIGHT_OF_BIT])
    planes = np.empty((top, len(codes)), np.dtype("<u4"))
    for plane in range(top):
        bits = (ordered >> np.uint8(top - 1 - plane)) & np.uint8(1)
        planes[plane] = np.packbits(bits.ravel(), bitorder="little").view("<u4")
    return planes


def join_planes(planes: Words) -> Codes:
    """Return the codes of planes, (n_groups, 32); as many bits as there are planes."""
    n_groups = planes.shape[1]
    ordered = np.zeros((n_groups, GROUP_LENGTH), np.uint8)
    for plane in planes:
        word = np.ascontiguousarray(plane, np.dtype("<u4")).view(np.uint8).reshape(n_groups, 4)
        ordered <<= np.uint8(1)
        ordered |= np.unpackbits(word, axis=1, bitorder="little")
    codes = np.empty_like(ordered)
    codes[:, _WEIGHT_OF_BIT] = ordered
    return codes


def _values(layout: NestedLayout, scales: Scales, prefix: Codes, width: int, gain: int) -> Floats:
    steps = cell_middles(width, layout.top)[prefix]
    d = scales.astype(np.float32) * np.float32(gain / UNIT)
    values: Floats = d[:, None] * steps
    return values.reshape(layout.n_rows, layout.row_length)
