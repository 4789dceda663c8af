"""A group of tokens as bytes, each in the width and with the step that suit it.

2 a token  mode in the upper four bits, step in the lower twelve (`steps`)
rows       tokens of mode `_HALF`, then those of `_FULL`
bits       of all other tokens (`prefix`), the first bit highest, up to a whole byte with zeros
4 each     outliers as float32, in order
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgert.errors import FormatError
from quant.activations.basis import Basis
from quant.activations.prefix import (
    LEAST_WIDTH,
    MOST_WIDTH,
    OUTLIER,
    Counts,
    Widths,
    read_bits,
    split,
    write_bits,
)
from quant.activations.settings import CodecSettings
from quant.activations.steps import (
    LEAST_VALUE,
    MOST_VALUE,
    Quantized,
    Steps,
    direction_widths,
    find_outliers,
    quantize,
    step_values,
    widths_of,
)

Floats = NDArray[np.float32]
Modes = NDArray[np.uint16]

_ZEROS, _FIRST_WIDTH = 0, 1
_HALF = _FIRST_WIDTH + MOST_WIDTH - LEAST_WIDTH + 1
_FULL = _HALF + 1
_STEP_BITS = 12
_OUTLIER_BITS = 32


def write_group(states: Floats, largest: Floats, settings: CodecSettings) -> bytes:
    """Write tokens.

    Args:
        states: (n_tokens, n_embd), finite.
        largest: (n_tokens,), the largest magnitude of each.
        settings: Of kind "adaptive".
    """
    basis = settings.basis
    odd = (largest > MOST_VALUE) | ((largest < LEAST_VALUE) & (largest > 0))
    rows = np.where(odd[:, None], np.float32(0), states) if odd.any() else states
    shifts = None if basis is None else basis.shifts
    values = rows if basis is None else rows @ basis.matrix
    outliers = find_outliers(values, settings.threshold, shifts)
    rest = values if outliers is None else np.where(outliers, np.float32(0), values)
    found = quantize(rest, settings.bound)
    widths = widths_of(found.codes, shifts)
    parts = split(found.codes, direction_widths(widths, shifts), outliers)
    modes = (widths - LEAST_WIDTH + _FIRST_WIDTH).astype(np.uint16)
    modes[(parts.numbers.max(axis=1) == 0) & (parts.classes.max(axis=1) == 0)] = _ZEROS
    n_bits, kept = parts.n_bits(), parts.outliers()
    if kept is not None:
        n_bits += _OUTLIER_BITS * kept.sum(axis=1, dtype=np.int32)
    _choose_plain(states, rest, n_bits, found, settings.bound, modes)
    modes[odd] = _FULL
    coded = (modes != _ZEROS) & (modes < _HALF)
    steps = np.where(coded, found.steps, 0).astype(np.uint16)
    if not coded.all():
        parts, values = parts.of(coded), values[coded]
        kept = parts.outliers()
    return b"".join((
        (modes << _STEP_BITS | steps).astype("<u2").tobytes(),
        states[modes == _HALF].astype("<f2").tobytes(),
        states[modes == _FULL].astype("<f4").tobytes(),
        np.packbits(write_bits(parts)).tobytes(),
        b"" if kept is None else values[kept].astype("<f4").tobytes(),
    ))  # fmt: skip


def _choose_plain(
    states: Floats,
    rest: Floats,
    n_bits: Counts,
    found: Quantized,
    bound: float,
    modes: Modes,
) -> None:
    """Set the modes of tokens that are no shorter as codes, or that codes cannot hold."""
    n_embd = states.shape[1]
    rows = np.flatnonzero(((n_bits >= 16 * n_embd) | ~found.meets) & (modes != _ZEROS))
    if not rows.size:
        return
    with np.errstate(over="ignore"):
        errors = states[rows] - states[rows].astype(np.float16).astype(np.float32)
        powers = np.einsum("ij,ij->i", errors, errors)
    length = np.einsum("ij,ij->i", rest[rows], rest[rows])
    good = powers <= np.float32(bound * bound) * length
    as_coded = found.meets[rows] & (n_bits[rows] < 32 * n_embd)
    modes[rows] = np.where(good, _HALF, np.where(as_coded, modes[rows], _FULL))


def read_group(data: bytes, n_tokens: int, n_embd: int, basis: Basis | None) -> Floats:
    """Read what `write_group` wrote; values that are not finite may be among them.

    Raises:
        FormatError: it is anything else.
    """
    end, most = 2 * n_tokens, n_tokens * (2 + 4 * n_embd)
    if not end <= len(data) <= most:
        raise FormatError(
            f"{n_tokens} hidden states in {len(data):,} bytes, wanted {end} to {most}"
        )
    words = np.frombuffer(data, "<u2", n_tokens)
    modes, steps = words >> _STEP_BITS, (words & (1 << _STEP_BITS) - 1).astype(np.int32)
    coded = (modes != _ZEROS) & (modes < _HALF)
    if modes.max(initial=0) > _FULL or steps[~coded].any():
        raise FormatError("a hidden state is of a mode that is not known here")
    states = np.zeros((n_tokens, n_embd), np.float32)
    for mode, dtype in ((_HALF, np.dtype("<f2")), (_FULL, np.dtype("<f4"))):
        plain = modes == mode
        count = int(np.count_nonzero(plain)) * n_embd
        if end + count * dtype.itemsize > len(data):
            raise FormatError(f"hidden states end after {len(data):,} bytes")
        states[plain] = np.frombuffer(data, dtype, count, end).reshape(-1, n_embd)
        end += count * dtype.itemsize
    widths = modes[coded].astype(np.int8) + np.int8(LEAST_WIDTH - _FIRST_WIDTH)
    values = _read_codes(data[end:], widths, steps[coded], n_embd, basis)
    if coded.all():
        return values
    states[coded] = values
    return states


def _read_codes(
    data: bytes,
    widths: Widths,
    steps: Steps,
    n_embd: int,
    basis: Basis | None,
) -> Floats:
    """Read codes and outliers, all that is left of a message."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8))
    own_widths = direction_widths(widths, None if basis is None else basis.shifts)
    codes, classes, n_bits = read_bits(bits, own_widths, (len(widths), n_embd))
    n_bytes = (n_bits + 7) // 8
    outliers = classes == OUTLIER
    n_outliers = int(np.count_nonzero(outliers))
    check_length(data, n_bytes + 4 * n_outliers)
    if bits[n_bits : 8 * n_bytes].any():
        raise FormatError("bits after the last hidden value are not zero")
    values: Floats = codes * step_values(steps)[:, None]
    if n_outliers:
        values[outliers] = np.frombuffer(data, "<f4", n_outliers, n_bytes)
    if basis is None:
        return values
    with np.errstate(over="ignore", invalid="ignore"):
        turned: Floats = values @ basis.matrix.T
    return turned


def check_length(data: bytes, wanted: int) -> None:
    """Raise FormatError where there are more or fewer bytes."""
    if len(data) != wanted:
        raise FormatError(f"hidden states in {len(data):,} bytes, wanted {wanted:,}")
