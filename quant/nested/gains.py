"""Gains of narrow widths, and the scales that outlive them.

Seen through the inputs, the middles of wide cells have less of the weights in them than there is:
every layer would shrink what it passes on, and layers add that up where noise averages out. So
everything that a width means in a stack of experts is multiplied by one number.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quant.nested.layout import Scales

UNIT = 1024  # a gain of one; steps of 1/1024 are far below the noise of every width with a gain
LEAST, MOST = UNIT // 2, 2 * UNIT

_WIDEST = 5
_FINEST = 3  # the bits of an f16 that a scale on the grid does without

_LARGEST = 65408.0  # number on the grid

Gains = tuple[int, ...]  # in 1/1024, of the widths from base to top


def has_gain(width: int, top: int) -> bool:
    """Say whether a width may have a gain: those whose ggml blocks have a minimum.

    From six bits on, a gain would be one to within 1/1024.
    """
    return width < top and width <= _WIDEST


def no_gains(base: int, top: int) -> Gains:
    """Return gains of one."""
    return (UNIT,) * (top - base + 1)


def check_gains(gains: Gains, base: int, top: int) -> None:
    """ValueError unless every width has a gain that it may have."""
    if len(gains) != top - base + 1:
        raise ValueError(f"{len(gains)} gains for the widths {base} to {top}")
    for width, gain in zip(range(base, top + 1), gains, strict=True):
        least, most = (LEAST, MOST) if has_gain(width, top) else (UNIT, UNIT)
        if not least <= gain <= most:
            raise ValueError(f"a gain of {gain} at {width} bits, wanted {least} to {most}")


def gained_scales(scales: Scales, top: int) -> Scales:
    """Return scales that blocks of a width with a gain give back; see `on_grid`."""
    most = np.float16(_LARGEST / (1 << top - 1))
    rounded: Scales = on_grid(scales.view(np.uint16)).view(np.float16).clip(-most, most)
    return rounded


def on_grid(scales: NDArray[np.uint16]) -> NDArray[np.uint16]:
    """Round f16 scales, given by their bits, to those whose two lowest bits are zero.

    Blocks hold f16(d g) of a scale d and a gain g; this gives d back of f16(f16(d g) / g) if d is
    on the grid and 1/2 <= g <= 2. Rounding d g to an f16 errs by at most 2^-11 d g, or by 2^-25
    where d g is subnormal; divided by g, that is at most one step of f16s at d (2^-24 among
    subnormals), and rounding the quotient to an f16 leaves it at most one step away. Numbers of the
    grid are four steps apart.
    """
    rounded: NDArray[np.uint16] = (scales + np.uint16(2)) & np.uint16(0xFFFF ^ _FINEST)
    return rounded
