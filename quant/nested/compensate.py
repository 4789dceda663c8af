"""Calibrated codes: scales weighed by what inputs make of errors, and errors made up for.

Every width has errors of its own, so each is compensated in a stream of its own (as GPTQ does,
arXiv 2210.17323); one code is chosen for all of them, so that widths stay nested.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

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
    """

    scales: float = 0.5
    codes: float = 0.35
    factors: tuple[float, ...] = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.75, 0.7)


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
    codes = _compensated(weights, scales, moments, layout, balance.codes)
    return NestedMatrix(layout, scales, codes)


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


def _compensated(
    weights: Floats, scales: Scales, moments: Floats, layout: NestedLayout, balance: float
) -> Codes:
    """Choose codes column by column, the most important first, passing errors on to later ones."""
    n_rows, row_length = weights.shape
    order = np.argsort(-np.diagonal(moments), kind="stable")
    passed = _passed_on(moments[np.ix_(order, order)])
    streams = np.repeat(weights[None, :, order], layout.top - layout.base + 1, axis=0)
    by_group = scales.astype(np.float32).reshape(n_rows, -1)
    codes = np.empty((n_rows, row_length), np.uint8)
    chooser = _Chooser(layout, balance)
    for start in range(0, row_length, _BLOCK):
        end = min(start + _BLOCK, row_length)
        errors = np.empty((len(streams), n_rows, end - start), np.float32)
        for column in range(start, end):
            place = order[column]
            d = by_group[:, place // GROUP_LENGTH]
            codes[:, place], values = chooser.choose(streams[:, :, column], d)
            error = (streams[:, :, column] - values) / passed[column, column]
            errors[:, :, column - start] = error
            streams[:, :, column + 1 : end] -= error[:, :, None] * passed[column, column + 1 : end]
        streams[:, :, end:] -= errors @ passed[start:end, end:]
    return codes.reshape(-1, GROUP_LENGTH)


def _passed_on(moments: Floats) -> Floats:
    """Return the upper Cholesky factor of the inverse: how an error is passed on to the right."""
    inverse = np.linalg.inv(moments.astype(np.float64))
    return np.ascontiguousarray(np.linalg.cholesky(inverse).T, dtype=np.float32)


def _weight(width: int, top: int, balance: float) -> float:
    return float(4.0 ** (balance * (width - top)))


class _Chooser:
    """Finds the code whose errors, over all widths, weigh least."""

    def __init__(self, layout: NestedLayout, balance: float) -> None:
        self._widths = range(layout.base, layout.top + 1)
        self._top = layout.top
        self._middles = [cell_middles(width, layout.top) for width in self._widths]
        self._weights = [_weight(width, layout.top, balance) for width in self._widths]

    def choose(self, columns: Floats, d: Floats) -> tuple[Codes, Floats]:
        """Return codes, (n_rows,), and what they mean at every width, (n_widths, n_rows)."""
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
