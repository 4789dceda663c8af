"""Calibrated codes: scales weighed by what inputs make of errors, and errors made up for.

Every width has errors of its own, so each is compensated in a stream of its own (as GPTQ does,
arXiv 2210.17323); one code is chosen for all of them, so that widths stay nested. Then every code
is chosen again in view of all others (coordinate descent, as in arXiv 2309.01885).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quant.nested.code import (
    Codes,
    Floats,
    NestedMatrix,
    cell_middles,
    largest_scales,
    nearest_codes,
)
from quant.nested.gains import gained_scales
from quant.nested.layout import GROUP_LENGTH, NestedLayout, Scales

Order = NDArray[np.intp]  # columns, the most important first

_BLOCK = 32  # columns whose errors are passed on at once to all later ones


@dataclass(frozen=True, slots=True)
class Balance:
    """What a width's error weighs: a power of its cell, from all alike to all in proportion.

    At 0 a squared error weighs the same at every width, so that the narrowest decide; at 1 it is
    weighed beside the cell of its width, so that the widest decide.

    Attributes:
        scales: For the choice of scales.
        codes: For the choice of codes.
        factors: Of the largest weight's scale that are tried for each group.
        sweeps: How often every code is chosen again. The first brings 1.0 dB at two bits and 0.5 at
            four, the second 0.1 and 0.2, further ones less.
    """

    scales: float = 0.5
    codes: float = 0.35
    factors: tuple[float, ...] = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)
    sweeps: int = 2


BALANCE = Balance()


def calibrate(
    weights: Floats, moments: Floats, widths: tuple[int, int], balance: Balance = BALANCE
) -> NestedMatrix:
    """Quantize one expert for the inputs it has seen.

    Args:
        weights: (n_rows, row_length), finite.
        moments: Second moments of its inputs, (row_length, row_length), positive definite, or
            their diagonal, (row_length,).
        widths: Base and top.
        balance: Which widths matter.
    """
    n_rows, row_length = weights.shape
    layout = NestedLayout(n_rows, row_length, *widths)
    groups = weights.reshape(-1, GROUP_LENGTH)
    diagonal = np.diagonal(moments) if moments.ndim == 2 else moments
    scales = _chosen_scales(groups, diagonal, layout, balance)
    if moments.ndim == 1:
        return NestedMatrix(layout, scales, nearest_codes(groups, scales, layout.top))
    chooser = _Chooser(layout, scales, balance.codes)
    order = np.argsort(-np.diagonal(moments), kind="stable")
    codes = _compensated(weights, moments, order, chooser)
    for _ in range(balance.sweeps):
        errors = weights - chooser.values(codes)
        _choose_again(codes, errors, (weights, moments), order, chooser)
    return NestedMatrix(layout, scales, codes.reshape(-1, GROUP_LENGTH))


def _chosen_scales(
    groups: Floats, diagonal: Floats, layout: NestedLayout, balance: Balance
) -> Scales:
    """Return, of a few scales for each group, the one whose errors weigh least."""
    importance = np.tile(diagonal.reshape(-1, GROUP_LENGTH), (layout.n_rows, 1))
    largest = largest_scales(groups, layout.top)
    best = np.zeros(layout.n_groups, np.float16)
    least = np.full(layout.n_groups, np.inf, np.float32)
    for factor in balance.factors:
        scales = gained_scales((largest * np.float32(factor)).astype(np.float16), layout.top)
        codes = nearest_codes(groups, scales, layout.top)
        cost = np.zeros(layout.n_groups, np.float32)
        d = scales.astype(np.float32)[:, None]
        for width in range(layout.base, layout.top + 1):
            kept = codes >> np.uint8(layout.top - width)
            error = groups - d * cell_middles(width, layout.top)[kept]
            weight = _weight(width, layout.top, balance.scales)
            cost += weight * np.einsum("ij,ij,ij->i", error, error, importance)
        better = cost < least
        best = np.where(better, scales, best)
        least = np.where(better, cost, least)
    return best


def _compensated(weights: Floats, moments: Floats, order: Order, chooser: _Chooser) -> Codes:
    """Choose codes column by column, passing errors on to later ones."""
    n_rows, row_length = weights.shape
    passed = _passed_on(moments[np.ix_(order, order)])
    streams = np.repeat(weights[None, :, order], chooser.n_widths, axis=0)
    codes = np.empty((n_rows, row_length), np.uint8)
    for start in range(0, row_length, _BLOCK):
        end = min(start + _BLOCK, row_length)
        errors = np.empty((len(streams), n_rows, end - start), np.float32)
        for column in range(start, end):
            place = order[column]
            codes[:, place], values = chooser.choose(streams[:, :, column], place)
            error = (streams[:, :, column] - values) / passed[column, column]
            errors[:, :, column - start] = error
            streams[:, :, column + 1 : end] -= error[:, :, None] * passed[column, column + 1 : end]
        streams[:, :, end:] -= errors @ passed[start:end, end:]
    return codes


def _choose_again(
    codes: Codes,
    errors: Floats,
    inputs: tuple[Floats, Floats],
    order: Order,
    chooser: _Chooser,
) -> None:
    """Choose codes column by column, each to make up for the errors of all others.

    Args:
        codes: (n_rows, row_length), replaced.
        errors: Of every width, (n_widths, n_rows, row_length).
        inputs: Weights and moments.
        order: Of the columns.
        chooser: Chooses.
    """
    weights, moments = inputs[0][:, order], inputs[1][np.ix_(order, order)]
    errors = errors[:, :, order]
    seen = errors @ moments
    for start in range(0, len(order), _BLOCK):
        end = min(start + _BLOCK, len(order))
        changes = np.empty((*errors.shape[:2], end - start), np.float32)
        for column in range(start, end):
            place, power = order[column], moments[column, column]
            others = seen[:, :, column] / power - errors[:, :, column]
            codes[:, place], values = chooser.choose(weights[:, column] + others, place)
            change = weights[:, column] - values - errors[:, :, column]
            changes[:, :, column - start] = change
            seen[:, :, column + 1 : end] += change[:, :, None] * moments[column, column + 1 : end]
        seen[:, :, end:] += changes @ moments[start:end, end:]


def _passed_on(moments: Floats) -> Floats:
    """Return the upper Cholesky factor of the inverse: how an error is passed on to the right."""
    inverse = np.linalg.inv(moments.astype(np.float64))
    return np.ascontiguousarray(np.linalg.cholesky(inverse).T, dtype=np.float32)


def _weight(width: int, top: int, balance: float) -> float:
    return float(4.0 ** (balance * (width - top)))


class _Chooser:
    """Finds the codes whose errors, over all widths, weigh least."""

    def __init__(self, layout: NestedLayout, scales: Scales, balance: float) -> None:
        self._widths = range(layout.base, layout.top + 1)
        self._top = layout.top
        self._scales = scales.astype(np.float32).reshape(layout.n_rows, -1)
        self._middles = [cell_middles(width, layout.top) for width in self._widths]
        self._weights = [_weight(width, layout.top, balance) for width in self._widths]

    @property
    def n_widths(self) -> int:
        """Widths, from base to top."""
        return len(self._widths)

    def choose(self, columns: Floats, place: int) -> tuple[Codes, Floats]:
        """Choose the codes of one column.

        Args:
            columns: What they should mean at every width, (n_widths, n_rows).
            place: Which column.

        Returns:
            Codes, (n_rows,), and what they mean at every width.
        """
        d = self._scales[:, place // GROUP_LENGTH]
        with np.errstate(divide="ignore", invalid="ignore"):
            steps = np.where(d == 0, np.float32(0), columns / d)
        total = np.zeros((len(d), 1 << self._widths[0]), np.float32)
        for index, middles in enumerate(self._middles):
            if index:
                total = np.repeat(total, 2, axis=1)
            error = steps[index][:, None] - middles
            error *= error
            error *= np.float32(self._weights[index])
            total += error
        codes: Codes = total.argmin(axis=1).astype(np.uint8)
        values = np.empty_like(columns)
        for index, (width, middles) in enumerate(zip(self._widths, self._middles, strict=True)):
            values[index] = d * middles[codes >> np.uint8(self._top - width)]
        return codes, values

    def values(self, codes: Codes) -> Floats:
        """Return what codes, (n_rows, row_length), mean at every width, (n_widths, ...)."""
        d = np.repeat(self._scales, GROUP_LENGTH, axis=1)
        every = zip(self._widths, self._middles, strict=True)
        return np.stack([d * m[codes >> np.uint8(self._top - width)] for width, m in every])
