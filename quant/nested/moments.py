"""Second moments of what enters experts: how much an error in each weight, or pair, matters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

MOST_FULL_LENGTH = 1024  # of a row; for longer ones the diagonal must do, or it takes days
_PRIOR_ROWS = 64  # an expert's own moments count as much as its layer's once it has seen so many
_DAMPING = 0.01


@dataclass(slots=True)
class Moments:
    """Sums over the rows that entered each expert of one stack.

    Attributes:
        sums: (n_expert, row_length, row_length), or (n_expert, row_length) for long rows.
        counts: Rows of each expert.
    """

    sums: Floats
    counts: NDArray[np.int64]

    @classmethod
    def empty(cls, n_expert: int, row_length: int, most_bytes: int = 1 << 30) -> Moments:
        """Return moments of no rows: of pairs of inputs, or the diagonal if those are too many."""
        shape: tuple[int, ...] = (n_expert, row_length)
        if row_length <= MOST_FULL_LENGTH and n_expert * row_length**2 * 4 <= most_bytes:
            shape = (*shape, row_length)
        return cls(np.zeros(shape, np.float32), np.zeros(n_expert, np.int64))

    @property
    def is_full(self) -> bool:
        """Whether pairs of inputs are known, not only each by itself."""
        return self.sums.ndim == 3

    def add(self, rows: Floats, experts: NDArray[np.int32]) -> None:
        """Add rows, (n, row_length), that enter the experts of the given ids, (n,)."""
        order = np.argsort(experts, kind="stable")
        ids, starts = np.unique(experts[order], return_index=True)
        for expert, part in zip(ids, np.split(order, starts[1:]), strict=True):
            own = rows[part]
            self.sums[expert] += own.T @ own if self.is_full else (own * own).sum(axis=0)
            self.counts[expert] += len(own)

    def of(self, expert: int) -> Floats | None:
        """Return the mean moments of an expert, damped; None if nothing ever entered it.

        What few rows say of an expert is eked out by what all rows say of its layer.
        """
        count = int(self.counts[expert])
        if not count:
            return None
        layer = self.sums.sum(axis=0) * np.float32(_PRIOR_ROWS / self.counts.sum())
        mean: Floats = (self.sums[expert] + layer) / np.float32(count + _PRIOR_ROWS)
        if not self.is_full:
            mean += np.float32(_DAMPING) * mean.mean()
            return mean
        mean[np.diag_indices_from(mean)] += np.float32(_DAMPING) * np.diagonal(mean).mean()
        return mean
