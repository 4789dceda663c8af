"""What an expert cache did: hits, bytes, waits, and whether guessing paid."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.llama.backend import ExpertCounters, ExpertCounts

_MOST_RANKS = 64
_WORTH_READING = 0.55
_FORGET = np.float32(0.98)


class Tally:
    """Counters since the model was opened, by turn; see `ExpertCounts` for what each one is.

    Args:
        n_turns: Layers with experts.
    """

    def __init__(self, n_turns: int) -> None:
        self.wanted_by_turn = np.zeros(n_turns, np.int64)
        self.missed_by_turn = np.zeros(n_turns, np.int64)
        self.missed_bytes_by_turn = np.zeros(n_turns, np.int64)
        self.bytes_read_by_turn = np.zeros(n_turns, np.int64)
        self.early_bytes_by_turn = np.zeros(n_turns, np.int64)
        self.saved_bytes_by_turn = np.zeros(n_turns, np.int64)
        self.stall_s_by_turn = np.zeros(n_turns, np.float64)
        self.used_weights_by_turn = np.zeros(n_turns, np.int64)
        self.used_bits_by_turn = np.zeros(n_turns, np.float64)
        # Every rank of a guess begins as worth reading.
        self._useful: NDArray[np.float32] = np.full(_MOST_RANKS, 0.5, np.float32)

    def wanted(self, turn: int, n: int) -> None:
        """Count experts of single stacks that a turn wants."""
        self.wanted_by_turn[turn] += n

    def missed(self, turn: int, n_bytes: int) -> None:
        """Count one that has to be read now."""
        self.missed_by_turn[turn] += 1
        self.missed_bytes_by_turn[turn] += n_bytes

    def read(self, turn: int, n_bytes: int) -> None:
        """Count bytes that are read, guessed or needed; negative where that was undone."""
        self.bytes_read_by_turn[turn] += n_bytes

    def used(self, turn: int, n_weights: int, n_bits: float) -> None:
        """Count weights that tokens are computed with, and their bits."""
        self.used_weights_by_turn[turn] += n_weights
        self.used_bits_by_turn[turn] += n_bits

    def stalled(self, turn: int, seconds: float) -> None:
        """Add up what computing waited."""
        self.stall_s_by_turn[turn] += seconds

    def begun_early(self, turn: int, n_bytes: int) -> None:
        """Count bytes that are read because they were guessed; negative where that was undone."""
        self.early_bytes_by_turn[turn] += n_bytes

    def saved(self, turn: int, n_bytes: int) -> None:
        """Count guessed bytes that were then needed."""
        self.saved_bytes_by_turn[turn] += n_bytes

    def guessed(self, rank: int, *, useful: bool, begun: bool) -> None:
        """Learn whether the guess of a rank was right, begun or not."""
        del begun
        if rank < _MOST_RANKS:
            self._useful[rank] = _FORGET * self._useful[rank] + (np.float32(1) - _FORGET) * useful

    def ranks_worth_reading(self) -> int:
        """Return how many of the likeliest absent guesses have been right often enough."""
        poor = np.flatnonzero(self._useful < _WORTH_READING)
        return int(poor[0]) if len(poor) else _MOST_RANKS

    @property
    def bytes_read(self) -> int:
        """Everything read, guessed or needed."""
        return int(self.bytes_read_by_turn.sum())

    @property
    def early_bytes(self) -> int:
        """Of that, read because it was guessed."""
        return int(self.early_bytes_by_turn.sum())

    @property
    def saved_bytes(self) -> int:
        """Of that, what was then needed."""
        return int(self.saved_bytes_by_turn.sum())

    @property
    def stall_s(self) -> float:
        """Seconds waited in all."""
        return float(self.stall_s_by_turn.sum())

    @property
    def hit_rate(self) -> float | None:
        """Share of what was wanted that was there or on its way; None before anything was."""
        return self.counters([None] * len(self.wanted_by_turn)).total.hit_rate

    def counters(self, layers: Sequence[int | None]) -> ExpertCounters:
        """Return everything counted so far.

        Args:
            layers: The number of each turn's layer.
        """
        columns = (
            self.wanted_by_turn, self.missed_by_turn, self.bytes_read_by_turn,
            self.early_bytes_by_turn, self.saved_bytes_by_turn, self.stall_s_by_turn,
            self.used_weights_by_turn, self.used_bits_by_turn,
        )  # fmt: skip
        rows = zip(*(column.tolist() for column in columns), strict=True)
        total = ExpertCounts(*(column.sum().item() for column in columns))
        return ExpertCounters(total, tuple(ExpertCounts(*row) for row in rows), tuple(layers))
