"""Encodes the experts of a model, calibrated where something is known of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from quant.nested.code import LARGEST, NestedMatrix, encode
from quant.nested.compensate import BALANCE, Balance, calibrate
from quant.nested.gains import UNIT, Gains, no_gains
from quant.nested.losses import Losses
from quant.nested.moments import Moments
from quant.nested.source import ExpertStack, TensorReader

_MEASURED_EXPERTS = 16  # of a stack; the noise of the others is as theirs


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
    _largest: dict[str, float] = field(default_factory=dict)  # scale of each stack

    def __post_init__(self) -> None:
        self.losses = Losses(self.widths)

    def encode(self, stack: ExpertStack, expert: int) -> NestedMatrix:
        """Return the code of an expert."""
        weights = self.reader.weights(stack, expert)
        known = self.moments.get(stack.entry.name)
        moments = None if known is None else known.of(expert)
        name = stack.entry.name
        if moments is not None:
            matrix = calibrate(weights, moments, self.widths, self.balance)
        elif known is not None:
            self.uncalibrated.setdefault(name, []).append(expert)
            matrix = encode(weights, *self.widths, has_gains=True)
        else:
            matrix = self.reader.adopt(stack, expert, *self.widths) or encode(weights, *self.widths)
        is_measured = expert % max(1, stack.n_expert // _MEASURED_EXPERTS) == 0
        if is_measured and (moments is None) is (known is None):
            self.losses.add((name, stack.kind), weights, matrix, moments)
        largest = float(np.abs(matrix.scales).max())
        self._largest[name] = max(self._largest.get(name, 0.0), largest)
        return matrix

    def gains(self, name: str) -> Gains:
        """Return the gains of a stack, no larger than its blocks can hold."""
        if name not in self.moments:
            return no_gains(*self.widths)
        whole = self._largest[name] * (1 << self.widths[1] - 1)
        return self.losses.settle(name, max(UNIT, int(UNIT * LARGEST / max(whole, 1.0))))

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
