"""Planes to the blocks that ggml's kernels read, and blocks of one width to those of another.

Everything works in pieces that stay in a core's cache.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quant.nested.blocks import BlockForm, block_form
from quant.nested.gains import UNIT
from quant.nested.layout import Scales, Words
from quant.nested.nibbles import Work, load_blocks, store_blocks

Bytes = NDArray[np.uint8]

_NO_GAINS = (UNIT, UNIT)
_PIECE = 4096  # groups worked on at once


def to_ggml(
    scales: Scales,
    planes: Words,
    width: int,
    top: int,
    out: Bytes | None = None,
    gain: int = UNIT,
) -> tuple[str, Bytes]:
    """Assemble ggml blocks from the first `width` planes.

    Args:
        scales: (n_groups,).
        planes: (width or more, n_groups), highest bit first.
        width: Bits to use.
        top: Bits of the whole code.
        out: Where to put the blocks, n_groups * block_bytes; None for a new buffer.
        gain: Of the width, in 1/1024; scales are on the grid where it is not one.

    Returns:
        The ggml type and the blocks.
    """
    form = block_form(width, top)
    blocks, out = _blocks(form, scales.size, out)
    words = scales.view(np.dtype("<u2"))
    work = Work(min(_PIECE, scales.size))
    for start in range(0, scales.size, _PIECE):
        piece = slice(start, min(start + _PIECE, scales.size))
        nibbles = work.of(piece)
        nibbles.load_planes(planes[:, piece], 0, width)
        store_blocks(nibbles, words[piece], blocks[piece], width, top, gain)
    return form.name, out


def rewiden(
    blocks: Bytes,
    planes: Words | None,
    widths: tuple[int, int],
    top: int,
    out: Bytes | None = None,
    gains: tuple[int, int] = _NO_GAINS,
) -> tuple[str, Bytes]:
    """Turn blocks of one width into blocks of another without the planes they were made of.

    Args:
        blocks: As `to_ggml` makes them at the first width.
        planes: Planes between the two widths, (second - first, n_groups); None to narrow.
        widths: From and to.
        top: Bits of the whole code.
        out: As for `to_ggml`; must not overlap `blocks`.
        gains: Of both widths; the bits of blocks do not depend on the widths they once had.

    Raises:
        ValueError: other planes than those between the widths.
    """
    width, wanted = widths
    n_planes = 0 if planes is None else planes.shape[0]
    if n_planes != max(0, wanted - width):
        raise ValueError(f"{n_planes} planes to go from {width} to {wanted} bits")
    before = blocks.view(block_form(width, top).block)
    form = block_form(wanted, top)
    after, out = _blocks(form, before.size, out)
    work = Work(min(_PIECE, before.size))
    for start in range(0, before.size, _PIECE):
        piece = slice(start, min(start + _PIECE, before.size))
        nibbles = work.of(piece)
        scales = load_blocks(nibbles, before[piece], width, top, gains[0])
        if planes is not None:
            nibbles.load_planes(planes[:, piece], width, wanted)
        store_blocks(nibbles, scales, after[piece], wanted, top, gains[1])
    return form.name, out


def planes_of(blocks: Bytes, width: int, top: int) -> tuple[Scales, Words]:
    """Take blocks without gains apart again: their scales, (n_groups,), and `width` planes."""
    records = blocks.view(block_form(width, top).block)
    scales = np.empty(records.size, np.dtype("<u2"))
    planes = np.empty((width, records.size), np.dtype("<u4"))
    work = Work(min(_PIECE, records.size))
    for start in range(0, records.size, _PIECE):
        piece = slice(start, min(start + _PIECE, records.size))
        nibbles = work.of(piece)
        scales[piece] = load_blocks(nibbles, records[piece], width, top, UNIT)
        nibbles.store_planes(planes[:, piece])
    return scales.view(np.dtype("<f2")), planes


def _blocks(form: BlockForm, n_groups: int, out: Bytes | None) -> tuple[NDArray[np.void], Bytes]:
    n_bytes = n_groups * form.block_bytes
    if out is None:
        out = np.empty(n_bytes, np.uint8)
    if out.size < n_bytes:
        raise ValueError(f"{out.size:,} bytes for {n_bytes:,} of {form.name}")
    return out[:n_bytes].view(form.block), out[:n_bytes]
