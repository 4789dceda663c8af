"""How many bits each chosen expert is worth: dual routing by the router's own weights.

The share of a token's routing weight that stands before an expert says how much its error can
matter (HOBBIT, arXiv 2411.01433, section 4.1): the first always gets the most bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ConfigError
from edgert.llama.options import LoadOptions
from quant.nested.file import NestedModel

Floats = NDArray[np.float32]
Levels = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class WidthPolicy:
    """Widths by how much routing weight stands before an expert.

    Attributes:
        widths: Bits, ascending; a level is an index into them.
        cuts: One fewer than widths, ascending in [0, 1]: an expert gets the widest width while the
            share before it is below the first cut, the next while below the second, and so on.
        quality: What the cuts were calibrated to: perplexity at the widest width over perplexity
            with them; None if they were not.
        exact: Compute each row in exactly its bits, for measuring what they cost. Otherwise an
            expert that is there in more bits than a token wants is used as it is.
    """

    widths: tuple[int, ...]
    cuts: tuple[float, ...] = ()
    quality: float | None = None
    exact: bool = False

    def __post_init__(self) -> None:
        ascending = list(self.widths) == sorted(set(self.widths))
        if not self.widths or not ascending or len(self.cuts) != len(self.widths) - 1:
            raise ValueError(f"widths {self.widths} with cuts {self.cuts}")
        if list(self.cuts) != sorted(self.cuts) or not all(0 <= c <= 1 for c in self.cuts):
            raise ValueError(f"cuts {self.cuts}, wanted ascending shares")

    def levels(self, weights: Floats) -> Levels:
        """Return the level of each choice.

        Args:
            weights: (n_tokens, n_used) routing weights, not negative.
        """
        if len(self.widths) == 1:
            return np.zeros(weights.shape, np.int64)
        total = np.maximum(weights.sum(axis=1, keepdims=True), np.float32(1e-20))
        # Where a bias took part in the choice, the heaviest need not come first.
        order = np.argsort(-weights, axis=1, kind="stable")
        ordered = np.take_along_axis(weights, order, axis=1)
        before = (np.cumsum(ordered, axis=1) - ordered) / total
        passed = (before[:, :, None] >= np.asarray(self.cuts, np.float32)).sum(axis=2)
        levels: Levels = np.empty(weights.shape, np.int64)
        np.put_along_axis(levels, order, len(self.widths) - 1 - passed, axis=1)
        return levels

    def describe(self) -> str:
        """Say it for people."""
        if len(self.widths) == 1:
            return f"{self.widths[0]} bits"
        cuts = ", ".join(f"{cut:.2f}" for cut in self.cuts)
        bits = "/".join(str(width) for width in reversed(self.widths))
        quality = "" if self.quality is None else f" for a quality of {self.quality:g}"
        return f"{bits} bits by routing weight (cuts {cuts}){quality}"


def level_counts(experts: NDArray[np.int32], levels: Levels, n_levels: int) -> dict[int, int]:
    """Return the highest level that any token wants each chosen expert at."""
    wanted: dict[int, int] = {}
    for level in range(n_levels):
        for expert in np.unique(experts[levels == level]).tolist():
            wanted[expert] = level
    return wanted


def choose_widths(nested: NestedModel, options: LoadOptions) -> WidthPolicy:
    """Return the policy that was asked for; the widest width if none was.

    Raises:
        ConfigError: the widths or cuts are wrong.
    """
    widths = options.expert_bits or (nested.top,)
    cuts = options.expert_cuts
    if len(widths) > 1 and not cuts:
        cuts = tuple((i + 1) / len(widths) for i in range(len(widths) - 1))
    try:
        return WidthPolicy(widths, cuts, options.quality, options.exact_bits)
    except ValueError as error:
        raise ConfigError(
            f"--expert-bits: {error}", hint="ascending widths, such as --expert-bits 3,8"
        ) from error
