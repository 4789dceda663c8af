"""Encodes the experts of a model, calibrated where something is known of their inputs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from quant.nested.code import Floats, NestedMatrix, encode
from quant.nested.compensate import BALANCE, Balance, calibrate
from quant.nested.moments import Moments
from quant.nested.source import ExpertStack, TensorReader

_MOST_EXTRA_BITS = 2
_MEASURED_EXPERTS = 16  # of a stack; the noise of the others is as theirs


@dataclass(slots=True)
class Losses:
    """Squared errors of what experts make of their inputs, beside the squares of that.

    Without calibration the inputs count as uncorrelated and alike.
    """

    widths: tuple[int, int]
    _sums: dict[tuple[str, int], list[float]] = field(default_factory=dict)

    def add(self, kind: str, weights: Floats, matrix: NestedMatrix, moments: Floats | None) -> None:
        """Add an expert of a kind of stack."""
        whole = _power(weights, moments)
        for width in range(self.widths[0], self.widths[1] + 1):
            sums = self._sums.setdefault((kind, width), [0.0, 0.0])
            sums[0] += _power(matrix.values(width) - weights, moments)
            sums[1] += whole

    def relative(self) -> dict[str, dict[int, float]]:
        """Return the share of noise in the output, by kind and width."""
        shares: dict[str, dict[int, float]] = {}
        for (kind, width), (error, whole) in self._sums.items():
            shares.setdefault(kind, {})[width] = error / whole if whole else 0.0
        return shares

    def down_extra_bits(self) -> int:
        """Return how many bits, each a quarter of the noise, bring `down` to the others' level."""
        shares = self.relative()
        down = shares.pop("down", {}).get(self.widths[0], 0.0)
        others = [share[self.widths[0]] for share in shares.values()]
        if not down or not any(others):
            return 0
        extra_bits = round(math.log(down * len(others) / sum(others), 4))
        return min(max(extra_bits, 0), _MOST_EXTRA_BITS)


@dataclass(slots=True)
class ModelEncoder:
    """An `Encoder`: codes of the source where it has them, else nearest or calibrated ones.

    Attributes:
        reader: The source.
        widths: Base and top.
        moments: Of the inputs of each stack, by name; without any nothing is calibrated.
        balance: Which widths matter to calibration.
        losses: Of what was encoded so far, or a sample of it.
        uncalibrated: Experts by stack that no row entered.
    """

    reader: TensorReader
    widths: tuple[int, int]
    moments: Mapping[str, Moments] = field(default_factory=dict)
    balance: Balance = BALANCE
    losses: Losses = field(init=False)
    uncalibrated: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.losses = Losses(self.widths)

    def encode(self, stack: ExpertStack, expert: int) -> NestedMatrix:
        """Return the code of an expert."""
        weights = self.reader.weights(stack, expert)
        known = self.moments.get(stack.entry.name)
        moments = None if known is None else known.of(expert)
        if known is not None and moments is None:
            self.uncalibrated.setdefault(stack.entry.name, []).append(expert)
        if moments is None:
            matrix = self.reader.adopt(stack, expert, *self.widths) or encode(weights, *self.widths)
        else:
            matrix = calibrate(weights, moments, self.widths, self.balance)
        if expert % max(1, stack.n_expert // _MEASURED_EXPERTS) == 0:
            self.losses.add(stack.kind, weights, matrix, moments)
        return matrix

    def down_extra_bits(self) -> int:
        """Say how much wider down-projections should be kept."""
        return self.losses.down_extra_bits()


def moments_stack(stacks: Mapping[str, ExpertStack]) -> dict[str, str]:
    """Return, for each stack, the one of its layer whose inputs are observed for both."""
    firsts: dict[tuple[int | None, bool], str] = {}
    shared = {}
    for name, stack in stacks.items():
        place = (stack.entry.layer_index, stack.kind == "down")
        shared[name] = firsts.setdefault(place, name)
    return shared


def _power(weights: Floats, moments: Floats | None) -> float:
    """Return the mean square that rows of these moments make of weights, summed over their rows."""
    if moments is None:
        return float(np.einsum("ij,ij->", weights, weights))
    if moments.ndim == 1:
        return float(np.einsum("ij,ij,j->", weights, weights, moments))
    return float(np.einsum("ij,ij->", weights @ moments, weights))
