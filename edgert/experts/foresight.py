"""Looks one layer ahead while a pass runs, as long as that pays."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

import numpy as np

from edgert.experts.cache import ExpertCache
from edgert.experts.gating import Floats, matrix_of, selection_of
from edgert.experts.predictor import RouterPredictor
from edgert.experts.routed import Turn
from edgert.llama.lib import TensorFields, tensor_at

_MOST_TOKENS = 32
_MOST_STEPS = 8
_TRIAL_TOKENS = 16
_USUALLY_RIGHT = 0.5  # of the bytes that are missed, so many a guess would have brought in time


class Foresight:
    """Feeds a predictor with what routers see, and a cache with its guesses.

    Args:
        turns: Layers with experts.
        predictor: Guesses.
        routers: Addresses of the router weights' tensors, by turn.
        n_used: Experts that a token chooses.
    """

    def __init__(
        self,
        turns: Sequence[Turn],
        predictor: RouterPredictor,
        routers: Mapping[int, int],
        n_used: int,
    ) -> None:
        self._turns = turns
        self._predictor = predictor
        self._routers = routers
        self._n_used = n_used
        self._n_tokens = 0
        self._before = (0.0, 0, 0)
        self._look_s = 0.0
        self._cost_s = 0.0
        self._stall_s_per_byte = 0.0
        self.looking = True

    def look(self, turn: Turn, ids: TensorFields, cache: ExpertCache) -> None:
        """Guess the turn after this one, and begin to read what is worth it.

        Args:
            turn: The turn whose router has just chosen.
            ids: The node that holds its choice; its operands are still in memory.
            cache: Reads.
        """
        if turn.index == 0:
            self._reconsider(cache)
        if self.looking:
            started_s = time.perf_counter()
            self._guess(turn, ids, cache)
            self._look_s += time.perf_counter() - started_s

    def _guess(self, turn: Turn, ids: TensorFields, cache: ExpertCache) -> None:
        found = _router_of(ids, self._routers.get(turn.index, 0))
        if found is None:
            return
        selection, inputs = found
        if inputs.shape[0] > _MOST_TOKENS:
            return
        self._predictor.chose(turn.index, selection)
        following = turn.index + 1
        if following < len(self._turns) and self._predictor.knows(following):
            wish = self._predictor.guess(following, inputs)
            n_ranks = min(self._n_used * inputs.shape[0], len(wish))
            order = np.argsort(-wish)[:n_ranks].tolist()
            cache.guess(self._turns[following], order, cache.tally.ranks_worth_reading())

    def _reconsider(self, cache: ExpertCache) -> None:
        """Every few tokens, compare the time that guessing takes with what it saves or would."""
        self._n_tokens += 1
        if self._n_tokens % _TRIAL_TOKENS:
            return
        tally = cache.tally
        now = (tally.stall_s, int(tally.missed_bytes_by_turn.sum()), tally.saved_bytes)
        stall_s, missed, saved = (
            after - before for after, before in zip(now, self._before, strict=True)
        )
        self._before = now
        if missed:
            self._stall_s_per_byte = stall_s / missed
        if self.looking:
            self._cost_s, self._look_s = self._look_s, 0.0
            self.looking = saved * self._stall_s_per_byte > self._cost_s
        else:
            self.looking = _USUALLY_RIGHT * stall_s > self._cost_s


def _router_of(ids: TensorFields, router: int) -> tuple[Floats, Floats] | None:
    """Walk from a choice back to what was chosen by, and to what entered the router."""
    if not router:
        return None
    selection = selection_of(ids)
    if selection is None:
        return None
    node = selection
    for _ in range(_MOST_STEPS):
        if node.src[0] == router and node.src[1]:
            chosen, inputs = matrix_of(selection), matrix_of(tensor_at(node.src[1]))
            return None if chosen is None or inputs is None else (chosen, inputs)
        if not node.src[0]:
            return None
        node = tensor_at(node.src[0])
    return None
