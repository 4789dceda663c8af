"""Which experts are worth keeping: recency, frequency, and how soon their layer's turn comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

Policy = Literal["recency", "frequency", "mixed", "steady"]
POLICIES: tuple[Policy, ...] = ("recency", "frequency", "mixed", "steady")
DEFAULT_POLICY: Policy = "mixed"

Floats = NDArray[np.float32]

# Routing drifts: a share that halves its memory every few tokens follows it and still tells experts
# that come back from those that came once. Compared on recorded traces (`edgert.experts.replay`).
_HALF_LIFE_TOKENS = 10.0
# Where routing hardly drifts, a longer memory misses up to a tenth less.
_STEADY_HALF_LIFE_TOKENS = 40.0
_FLOOR = 1e-30  # so low that experts nobody wants are still told apart by when they were wanted


class Scores(Protocol):
    """Worth of every expert of every turn; the least is dropped first."""

    def routed(self, turn: int, counts: NDArray[np.int64], n_tokens: int) -> None:
        """Note how many of `n_tokens` tokens chose each expert of a turn."""
        ...

    def chose(self, turn: int, experts: Sequence[int]) -> None:
        """Note what one token chose, each expert once."""
        ...

    def worth(self, turn: int) -> Floats:
        """Return (n_turns, n_experts) as it stands when it is `turn`'s turn."""
        ...


class Recency:
    """Least recently used goes first."""

    def __init__(self, n_turns: int, n_experts: int) -> None:
        self._clock = 0
        self._last = np.full((n_turns, n_experts), -1.0, np.float32)

    def routed(self, turn: int, counts: NDArray[np.int64], n_tokens: int) -> None:
        """Note who was chosen."""
        del n_tokens
        self._clock += 1
        self._last[turn, counts > 0] = self._clock

    def chose(self, turn: int, experts: Sequence[int]) -> None:
        """Note who was chosen."""
        self._clock += 1
        self._last[turn, experts] = self._clock

    def worth(self, turn: int) -> Floats:
        """Return when each was last chosen."""
        del turn
        return self._last


class Frequency:
    """Least often used, of all tokens so far, goes first."""

    def __init__(self, n_turns: int, n_experts: int) -> None:
        self._counts = np.zeros((n_turns, n_experts), np.float32)

    def routed(self, turn: int, counts: NDArray[np.int64], n_tokens: int) -> None:
        """Add up who was chosen."""
        del n_tokens
        self._counts[turn] += counts

    def chose(self, turn: int, experts: Sequence[int]) -> None:
        """Add up who was chosen."""
        self._counts[turn, experts] += 1

    def worth(self, turn: int) -> Floats:
        """Return how often each was chosen."""
        del turn
        return self._counts


class Mixed:
    """The longest expected wait goes first.

    An expert that a share p of the recent tokens chose, in a layer d layers ahead of n, is expected
    back after d/n + (1 - p)/p tokens. The share forgets with a half-life, so it is recency and
    frequency at once.
    """

    def __init__(self, n_turns: int, n_experts: int, half_life: float = _HALF_LIFE_TOKENS) -> None:
        self._keep = np.float32(0.5 ** (1.0 / half_life))
        self._gain = np.float32(1.0) - self._keep
        self._share = np.zeros((n_turns, n_experts), np.float32)
        ahead: Floats = (np.arange(n_turns) / max(n_turns, 1)).astype(np.float32)
        # One less than the distance: (1 - p)/p is 1/p - 1.
        self._ahead = [np.roll(ahead, turn + 1).reshape(-1, 1) - 1 for turn in range(n_turns)]

    def routed(self, turn: int, counts: NDArray[np.int64], n_tokens: int) -> None:
        """Forget a little and add who was chosen."""
        keep = self._keep**n_tokens
        row = self._share[turn]
        row *= keep
        row += (np.float32(1.0) - keep) / np.float32(n_tokens) * counts

    def chose(self, turn: int, experts: Sequence[int]) -> None:
        """Forget a little and add who was chosen."""
        row = self._share[turn]
        row *= self._keep
        row[experts] += self._gain

    def worth(self, turn: int) -> Floats:
        """Return minus the expected wait in tokens."""
        worth: Floats = np.maximum(self._share, np.float32(_FLOOR))
        np.divide(np.float32(-1.0), worth, out=worth)
        worth -= self._ahead[turn]
        return worth


def make_scores(policy: Policy, n_turns: int, n_experts: int) -> Scores:
    """Return the scores of a policy; ValueError if there is no such policy."""
    match policy:
        case "recency":
            return Recency(n_turns, n_experts)
        case "frequency":
            return Frequency(n_turns, n_experts)
        case "mixed":
            return Mixed(n_turns, n_experts)
        case "steady":
            return Mixed(n_turns, n_experts, _STEADY_HALF_LIFE_TOKENS)
    raise ValueError(f"policy {policy!r}, wanted one of {', '.join(POLICIES)}")
