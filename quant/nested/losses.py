"""What is lost at each width, seen through the inputs, and the gains that make up for a part."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from quant.nested.code import Floats, NestedMatrix
from quant.nested.gains import LEAST, MOST, UNIT, Gains, has_gain, no_gains

_MOST_EXTRA_BITS = 2


@dataclass(slots=True)
class _Sums:
    """Of weights w and errors e, seen through the inputs: w w, w e and e e."""

    whole: float = 0.0
    along: float = 0.0
    error: float = 0.0

    def noise(self, gain: float) -> float:
        """Return the square of g (w + e) - w."""
        rest = gain - 1
        return gain**2 * self.error + 2 * gain * rest * self.along + rest**2 * self.whole


@dataclass(slots=True)
class Losses:
    """Squared errors of what experts make of their inputs, beside the squares of that.

    Without calibration the inputs count as uncorrelated and alike.
    """

    widths: tuple[int, int]
    _sums: dict[tuple[str, str], dict[int, _Sums]] = field(default_factory=dict)
    _gains: dict[str, Gains] = field(default_factory=dict)

    def add(
        self,
        stack: tuple[str, str],
        weights: Floats,
        matrix: NestedMatrix,
        moments: Floats | None,
    ) -> None:
        """Add an expert of a stack of this name and kind; of one stack all have moments, or none.

        Args:
            stack: Name and kind.
            weights: (n_rows, row_length).
            matrix: What became of them.
            moments: Of what enters the expert, see `calibrate`.
        """
        by_width = self._sums.setdefault(stack, {width: _Sums() for width in self._every_width})
        seen = _seen(weights, moments)
        whole = float(np.einsum("ij,ij->", seen, weights))
        for width, sums in by_width.items():
            error = matrix.values(width) - weights
            sums.whole += whole
            sums.along += float(np.einsum("ij,ij->", seen, error))
            sums.error += float(np.einsum("ij,ij->", _seen(error, moments), error))

    def settle(self, name: str, most: int) -> Gains:
        """Fix the gains of a stack that is whole; its noise is with them from then on.

        A gain is the one after which errors have no part along the weights.

        Args:
            name: Of the stack; if none of it was added, its gains are one.
            most: No gain is larger.
        """
        found = no_gains(*self.widths)
        for (own, _), by_width in self._sums.items():
            if own == name:
                found = tuple(
                    min(_gain(sums, width, self.widths[1]), most)
                    for width, sums in by_width.items()
                )
        self._gains[name] = found
        return found

    def relative(self) -> dict[str, dict[int, float]]:
        """Return the share of noise in the output, by kind and width."""
        totals: dict[tuple[str, int], list[float]] = {}
        for (name, kind), by_width in self._sums.items():
            gains = self._gains.get(name, no_gains(*self.widths))
            for (width, sums), gain in zip(by_width.items(), gains, strict=True):
                total = totals.setdefault((kind, width), [0.0, 0.0])
                total[0] += sums.noise(gain / UNIT)
                total[1] += sums.whole
        shares: dict[str, dict[int, float]] = {}
        for (kind, width), (noise, whole) in totals.items():
            shares.setdefault(kind, {})[width] = noise / whole if whole else 0.0
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

    @property
    def _every_width(self) -> range:
        return range(self.widths[0], self.widths[1] + 1)


def _gain(sums: _Sums, width: int, top: int) -> int:
    left = sums.whole + sums.along
    if not has_gain(width, top) or left <= 0:
        return UNIT
    return min(max(round(UNIT * sums.whole / left), LEAST), MOST)


def _seen(weights: Floats, moments: Floats | None) -> Floats:
    """Return weights times the moments of their inputs."""
    if moments is None:
        return weights
    seen: Floats = weights * moments if moments.ndim == 1 else weights @ moments
    return seen
