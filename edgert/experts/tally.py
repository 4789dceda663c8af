"""What an expert cache did: hits, bytes, waits, and whether guessing paid."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_MOST_RANKS = 64
_WORTH_READING = 0.4
_FORGET = np.float32(0.98)


@dataclass(slots=True)
class Tally:
    """Counters since the model was opened.

    Attributes:
        n_turns: Layers with experts.
        wanted_by_turn: Experts of single stacks that each turn wanted.
        missed_by_turn: Of those, neither there nor on their way.
        missed_bytes_by_turn: Their bytes.
        stall_s_by_turn: Seconds that computing waited for them.
        bytes_read: Everything read, guessed or needed.
        early_bytes: Of that, read because it was guessed.
        saved_bytes: Of that, what was then needed.
    """

    n_turns: int
    wanted_by_turn: NDArray[np.int64] = field(init=False)
    missed_by_turn: NDArray[np.int64] = field(init=False)
    missed_bytes_by_turn: NDArray[np.int64] = field(init=False)
    stall_s_by_turn: NDArray[np.float64] = field(init=False)
    bytes_read: int = 0
    early_bytes: int = 0
    saved_bytes: int = 0
    _useful: NDArray[np.float32] = field(init=False)

    def __post_init__(self) -> None:
        """Start at zero; every rank of a guess begins as worth reading."""
        self.wanted_by_turn = np.zeros(self.n_turns, np.int64)
        self.missed_by_turn = np.zeros(self.n_turns, np.int64)
        self.missed_bytes_by_turn = np.zeros(self.n_turns, np.int64)
        self.stall_s_by_turn = np.zeros(self.n_turns, np.float64)
        self._useful = np.full(_MOST_RANKS, 0.5, np.float32)

    def wanted(self, turn: int, n: int) -> None:
        """Count experts that a turn wants."""
        self.wanted_by_turn[turn] += n

    def missed(self, turn: int, n_bytes: int) -> None:
        """Count one that has to be read now."""
        self.missed_by_turn[turn] += 1
        self.missed_bytes_by_turn[turn] += n_bytes

    def stalled(self, turn: int, seconds: float) -> None:
        """Add up what computing waited."""
        self.stall_s_by_turn[turn] += seconds

    def begun_early(self, n_bytes: int) -> None:
        """Count bytes that are read because they were guessed; negative where that was undone."""
        self.early_bytes += n_bytes

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
    def stall_s(self) -> float:
        """Seconds waited in all."""
        return float(self.stall_s_by_turn.sum())

    @property
    def hit_rate(self) -> float | None:
        """Share of what was wanted that was there or on its way; None before anything was."""
        wanted = int(self.wanted_by_turn.sum())
        return 1.0 - int(self.missed_by_turn.sum()) / wanted if wanted else None
