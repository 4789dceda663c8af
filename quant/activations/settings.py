"""What an activation codec is asked for: its kind, the error it may make, what is an outlier."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quant.activations.basis import Basis

CodecKind = Literal["f32", "f16", "adaptive"]

DEFAULT_BOUND = 0.1
DEFAULT_THRESHOLD = 8.0
LEAST_BOUND, MOST_BOUND = 1e-3, 1.0
_LEAST_THRESHOLD = 2.0


@dataclass(frozen=True, slots=True)
class CodecSettings:
    """How hidden states are written.

    Attributes:
        kind: "f32" and "f16" write every value; "adaptive" what follows.
        bound: Most error of a token, as a share of the length (L2) of what is no outlier in it.
        threshold: An outlier is larger than so many root mean squares of the others, which are
            taken to be normally distributed.
        basis: Directions in which tokens take fewer bits; both sides must have the same. None
            codes the values themselves.
    """

    kind: CodecKind = "adaptive"
    bound: float = DEFAULT_BOUND
    threshold: float = DEFAULT_THRESHOLD
    basis: Basis | None = None

    def __post_init__(self) -> None:
        """Check the ranges; ValueError for what is outside."""
        if not LEAST_BOUND <= self.bound <= MOST_BOUND:
            raise ValueError(f"bound is {self.bound}, wanted {LEAST_BOUND} to {MOST_BOUND}")
        if not self.threshold >= _LEAST_THRESHOLD:
            raise ValueError(f"threshold is {self.threshold}, wanted {_LEAST_THRESHOLD} or more")
