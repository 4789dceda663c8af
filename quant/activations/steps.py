"""The distance between codes of each token: the largest that keeps its error within a bound."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.activations.prefix import LEAST_WIDTH, MOST_WIDTH, Codes, Widths

Floats = NDArray[np.float32]
Steps = NDArray[np.int32]
Flags = NDArray[np.bool_]

# A step is the upper bits of a float32 from 2**-63 up: 7 of its exponent, 5 of its mantissa.
N_STEPS = 1 << 12
_FIRST, _SHIFT = 64 << 5, 18
_MORE_ROUNDS = 2
_NORMAL_RATIO = np.float32(1.2533)  # root mean square of normal values, in mean magnitudes
# Beyond these, tokens are written as they are: squares of them must not overflow.
LEAST_VALUE, MOST_VALUE = 1e-12, 1e12
_MOST_CODE = (1 << 14) - 1  # every width has it among its outliers
# Errors are summed up in float32.
_MARGIN = 1 - 1e-5
# Mean magnitude of codes where the narrowest widths are as good as the next.
_EVEN = 0.72


def step_values(steps: Steps) -> Floats:
    """Return the floats that indices of steps mean."""
    values: Floats = ((steps + _FIRST) << _SHIFT).astype(np.int32).view(np.float32)
    return values


def step_below(values: Floats) -> Steps:
    """Return the index of the largest step that is no larger, within what there is."""
    bits = np.ascontiguousarray(values, np.float32).view(np.int32) >> _SHIFT
    indices: Steps = np.clip(bits - _FIRST, 0, N_STEPS - 1)
    return indices


@dataclass(frozen=True, slots=True)
class Quantized:
    """Tokens as codes.

    Attributes:
        codes: (n_tokens, n_embd); those of outliers mean nothing.
        steps: (n_tokens,) indices.
        meets: (n_tokens,), whether the error is within the bound.
    """

    codes: Codes
    steps: Steps
    meets: Flags


def find_outliers(
    values: Floats, threshold: float, shifts: NDArray[np.int8] | None
) -> Flags | None:
    """Mark what is far larger than the others: few large values hardly move a mean magnitude.

    Args:
        values: (n_tokens, n_embd).
        threshold: In root mean squares, if the others are normally distributed.
        shifts: (n_embd,) of a basis; where values reach farther, so does the threshold.

    Returns:
        (n_tokens, n_embd), or None where there are none.
    """
    scaled = np.abs(values)
    if shifts is not None:
        scaled = np.ldexp(scaled, -np.maximum(shifts, 0).astype(np.int32))
    most = np.float32(threshold) * _NORMAL_RATIO
    limits = most * scaled.mean(axis=1)
    rows = np.flatnonzero(scaled.max(axis=1) > limits)
    if not rows.size:
        return None
    found = np.zeros(values.shape, np.bool_)
    own = scaled[rows]
    beyond = own > limits[rows, None]
    for _ in range(_MORE_ROUNDS):
        n_rest = np.maximum(own.shape[1] - np.count_nonzero(beyond, axis=1), 1)
        means = np.where(beyond, np.float32(0), own).sum(axis=1) / n_rest.astype(np.float32)
        beyond = own > most * means[:, None]
    found[rows] = beyond
    return found


def quantize(rest: Floats, bound: float) -> Quantized:
    """Choose a step for each token and round to it.

    Args:
        rest: (n_tokens, n_embd), outliers as 0.
        bound: Most error, as a share of the length of `rest`.
    """
    allowed = np.float32(bound * bound * _MARGIN) * np.einsum("ij,ij->i", rest, rest)
    guess = np.sqrt(allowed * np.float32(12 / rest.shape[1]))
    steps = step_below(guess)
    codes, errors = _round(rest, steps)
    # The error goes with the square of the step, and is less where many values round to 0.
    with np.errstate(divide="ignore", invalid="ignore"):
        better = step_below(guess * np.sqrt(np.minimum(allowed / errors, 4)))
    better = np.where(errors > 0, better, steps)
    better = np.where(errors > allowed, np.minimum(better, steps - 1), better)
    better = np.maximum(better, 0).astype(np.int32)
    rows = np.flatnonzero(better != steps)
    fallback = np.where(errors <= allowed, steps, 0)
    while rows.size:
        own_codes, own_errors = _round(rest[rows], better[rows])
        fits = (own_errors <= allowed[rows]) | (better[rows] == 0)
        done = rows[fits]
        codes[done], errors[done], steps[done] = own_codes[fits], own_errors[fits], better[done]
        rows = rows[~fits]
        better[rows] = np.maximum(better[rows] - 1, fallback[rows])
    return Quantized(codes, steps, errors <= allowed)


def widths_of(codes: Codes, shifts: NDArray[np.int8] | None) -> Widths:
    """Return a width for each token, (n_tokens,).

    Args:
        codes: (n_tokens, n_embd), outliers as 0.
        shifts: (n_embd,), what `direction_widths` adds.
    """
    magnitudes = np.abs(codes, dtype=np.float32)
    if shifts is not None:
        magnitudes = np.ldexp(magnitudes, -shifts.astype(np.int32))
    with np.errstate(divide="ignore"):
        widths = np.floor(np.log2(magnitudes.mean(axis=1) / _EVEN))
    clipped: Widths = np.clip(widths, LEAST_WIDTH, MOST_WIDTH).astype(np.int8)
    return clipped


def direction_widths(widths: Widths, shifts: NDArray[np.int8] | None) -> Widths:
    """Return the width of every value, (n_tokens, n_embd), or (n_tokens, 1) where they are equal.

    Args:
        widths: (n_tokens,).
        shifts: (n_embd,) of a basis.
    """
    if shifts is None:
        return widths[:, None]
    each: Widths = np.clip(widths[:, None] + shifts, LEAST_WIDTH, MOST_WIDTH).astype(np.int8)
    return each


def _round(rest: Floats, steps: Steps) -> tuple[Codes, Floats]:
    """Return codes and the squares of the errors, (n_tokens,)."""
    values = step_values(steps)[:, None]
    rounded = np.rint(rest / values)
    np.clip(rounded, -_MOST_CODE, _MOST_CODE, out=rounded)
    codes = rounded.astype(np.int16)
    rounded *= values
    rounded -= rest
    return codes, np.einsum("ij,ij->i", rounded, rounded)
