"""Integers of hidden states as bits: a prefix code for normally distributed values, vectorised.

A code c is numbered z = 0, 1, 2, 3, 4 for c = 0, 1, -1, 2, -2. A width k says how z is split:

    low    max(k, 0) lowest bits of z, as they are
    class  of q = z >> low: 0 for q = 0 and 1, then q - 1; a width of -1 has class q.
           In unary: so many zeros and a one. 15 is an outlier, kept elsewhere.
    pick   one bit for class 0: which of the two q it is; none at width -1

At the right width that is 0.04 to 0.15 bits above the entropy of a normal distribution. Low bits of
all values come first, plane by plane, then all classes, then all picks. Unary needs no table, and
its ends are found all at once, as the ones in the bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import FormatError

Bits = NDArray[np.uint8]
Codes = NDArray[np.int16]
Counts = NDArray[np.int32]
Flags = NDArray[np.bool_]
Widths = NDArray[np.int8]

LEAST_WIDTH, MOST_WIDTH = -1, 7
OUTLIER = 15


@dataclass(frozen=True, slots=True)
class Split:
    """Codes taken apart; all (n_tokens, n_embd), widths may be (n_tokens, 1).

    Attributes:
        numbers: z, 0 for outliers.
        classes: 0 to 15.
        widths: -1 to 7.
    """

    numbers: Codes
    classes: Codes
    widths: Widths

    def of(self, tokens: Flags) -> Split:
        """Return some of the tokens."""
        return Split(self.numbers[tokens], self.classes[tokens], self.widths[tokens])

    def outliers(self) -> Flags | None:
        """Return which values are kept elsewhere, None for none."""
        largest = self.classes.max(initial=0)
        return self.classes == OUTLIER if largest == OUTLIER else None

    def n_bits(self) -> Counts:
        """Return the bits of each token, (n_tokens,), without those of outliers kept elsewhere."""
        n_embd = self.classes.shape[1]
        low, picked = np.maximum(self.widths, 0), (self.classes == 0) & (self.widths >= 0)
        n_low = low.sum(axis=1, dtype=np.int32) * (n_embd // low.shape[1])
        counts: Counts = (
            n_low + n_embd
            + self.classes.sum(axis=1, dtype=np.int32)
            + picked.view(np.int8).sum(axis=1, dtype=np.int32)
        )  # fmt: skip
        return counts


def split(codes: Codes, widths: Widths, outliers: Flags | None) -> Split:
    """Take codes apart.

    Args:
        codes: (n_tokens, n_embd), magnitudes below 2**14.
        widths: (n_tokens, n_embd) or (n_tokens, 1), -1 to 7.
        outliers: Which are kept elsewhere, beside those too large for their width.
    """
    numbers: Codes = np.abs(codes)
    numbers <<= 1
    numbers -= codes > 0
    classes: Codes = numbers >> np.maximum(widths, 0).astype(np.int16)
    classes -= (classes > 0) & (widths >= 0)
    if outliers is not None:
        classes[outliers] = OUTLIER
    if classes.size and classes.max() >= OUTLIER:
        classes = np.minimum(classes, OUTLIER)
        numbers[classes == OUTLIER] = 0
    return Split(numbers, classes, widths)


def write_bits(parts: Split) -> Bits:
    """Return the bits, one a byte."""
    numbers, classes, low = parts.numbers, parts.classes, np.maximum(parts.widths, 0)
    planes = []
    for plane in range(int(low.max(initial=0))):
        inside = low > plane
        chosen = numbers.ravel() if inside.all() else numbers[_spread(inside, numbers.shape)]
        planes.append(((chosen >> plane) & 1).astype(np.uint8))
    ends = np.cumsum(classes + np.int16(1), dtype=np.intp)
    ends -= 1
    unary = np.zeros(int(ends[-1]) + 1 if len(ends) else 0, np.uint8)
    unary[ends] = 1
    picked = np.flatnonzero((classes == 0) & (parts.widths >= 0))
    picks = (numbers >> low).astype(np.uint8).ravel()[picked]
    return np.concatenate([*planes, unary, picks])


def read_bits(bits: Bits, widths: Widths, shape: tuple[int, int]) -> tuple[Codes, Codes, int]:
    """Read what `write_bits` wrote, at the start of `bits`.

    Args:
        bits: One a byte, and whatever follows.
        widths: As they were written.
        shape: n_tokens, n_embd.

    Returns:
        Codes, classes, and the bits read.

    Raises:
        FormatError: there are too few bits, or a class is too large.
    """
    low = np.maximum(widths, 0)
    numbers = np.zeros(shape, np.int16)
    start = 0
    for plane in range(int(low.max(initial=0))):
        inside = _spread(low > plane, shape)
        count = int(np.count_nonzero(inside))
        values = _take(bits, start, count).astype(np.int16) << plane
        if count == inside.size:
            numbers |= values.reshape(shape)
        else:
            numbers[inside] |= values
        start += count
    longest = start + (OUTLIER + 1) * numbers.size
    ends = np.flatnonzero(bits[start:longest].view(np.bool_))[: numbers.size]
    if len(ends) < numbers.size:
        raise FormatError(f"{len(ends):,} hidden values are there, wanted {numbers.size:,}")
    gaps = np.empty(len(ends), np.int64)  # from one end to the next
    if len(ends):
        gaps[0] = ends[0]
        np.subtract(ends[1:], ends[:-1] + 1, out=gaps[1:])
        start += int(ends[-1]) + 1
    if gaps.max(initial=0) > OUTLIER:
        raise FormatError(f"a hidden value is of class {gaps.max()}, wanted at most {OUTLIER}")
    classes = gaps.astype(np.int16).reshape(shape)
    upper = classes + ((classes > 0) & (widths >= 0))
    picked = (classes == 0) & (widths >= 0)
    count = int(np.count_nonzero(picked))
    upper[picked] = _take(bits, start, count)
    upper <<= low
    numbers |= upper
    sign = (numbers & 1) - np.int16(1)  # -1 for even numbers, whose codes are negative
    numbers += 1
    numbers >>= 1
    numbers ^= sign
    numbers -= sign
    return numbers, classes, start + count


def _spread(inside: Flags, shape: tuple[int, ...]) -> Flags:
    return np.broadcast_to(inside, shape)


def _take(bits: Bits, start: int, count: int) -> Bits:
    if start + count > len(bits):
        raise FormatError(f"hidden states end after {len(bits):,} bits, wanted {start + count:,}")
    return bits[start : start + count]
