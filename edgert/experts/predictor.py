"""Guesses the next layer's experts from what enters this layer's router.

The hidden state changes little from layer to layer, so the next layer's router applied to this
layer's router input finds most of its choice (HOBBIT, arXiv 2411.01433, section 4.2). What the
layer between adds is much the same for neighbouring tokens: the mean of the last tokens' errors,
kept by layer and expert, corrects the guess.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

_DRIFT_HALF_LIFE_TOKENS = 4.0
_TINY = 1e-20


class RouterPredictor:
    """Guesses by turn.

    Args:
        routers: (n_experts, n_embd) by turn; turns without one are not guessed.
    """

    def __init__(self, routers: Mapping[int, Floats]) -> None:
        self._routers = routers
        self._forget = np.float32(0.5 ** (1.0 / _DRIFT_HALF_LIFE_TOKENS))
        self._drift: dict[int, Floats] = {}
        self._raw: dict[int, Floats] = {}

    def knows(self, turn: int) -> bool:
        """Say whether a turn can be guessed."""
        return turn in self._routers

    def guess(self, turn: int, inputs: Floats) -> Floats:
        """Return how much the router of `turn` will want each expert, (n_experts,).

        Args:
            turn: The turn to come.
            inputs: (n_tokens, n_embd) router inputs of the turn before it.
        """
        # Without BLAS: its threads would spin beside those that compute.
        raw: Floats = np.einsum("ij,tj->ti", self._routers[turn], inputs).max(axis=0)
        self._raw[turn] = raw
        drift = self._drift.get(turn)
        return raw if drift is None else raw + drift

    def chose(self, turn: int, selection: Floats) -> None:
        """Learn from what the router of `turn` came to.

        Args:
            turn: The turn that has come.
            selection: (n_tokens, n_experts) that the choice is made by, larger is likelier:
                probabilities, or scores with a bias; minus infinity for what is ruled out.
        """
        raw = self._raw.pop(turn, None)
        if raw is None:
            return
        actual = _as_logits(selection).max(axis=0)
        known = np.isfinite(actual)  # where experts come in groups, most groups are ruled out
        if not known.any():
            return
        error = actual - raw
        error[known] -= error[known].mean()
        drift = self._drift.setdefault(turn, np.where(known, error, np.float32(0.0)))
        drift[known] = self._forget * drift[known] + (np.float32(1.0) - self._forget) * error[known]


def _as_logits(selection: Floats) -> Floats:
    """Undo a softmax up to a constant; other scores, and what is ruled out, are left alone."""
    finite = np.isfinite(selection)
    if selection.min(initial=0.0, where=finite) < 0.0:
        return selection
    logits: Floats = np.log(np.maximum(selection, np.float32(_TINY)))
    return np.where(finite, logits, selection)
