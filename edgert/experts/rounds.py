"""Routed products whose experts do not fit at once: computed in rounds, each expert read once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgert.experts.cache import ExpertCache
from edgert.experts.ids import Ids
from edgert.experts.partial import PartialProduct
from edgert.experts.routed import Stack, Turn
from edgert.llama.lib import TensorFields


class Rounds:
    """Computes one turn's products, as many experts at a time as there is room for.

    While a group is computed the next one is read, so a group is half of what fits.

    Args:
        turn: Whose products.
        experts: (n_tokens, n_used) as the router chose.
        cache: Brings experts.
        partial: Computes rows.
        weights: The tensor that reads a stack's slots, by the stack's index.
    """

    def __init__(
        self,
        turn: Turn,
        experts: Ids,
        cache: ExpertCache,
        partial: PartialProduct,
        weights: dict[int, int],
    ) -> None:
        self.turn = turn
        self._chosen = experts.ravel()
        self._cache = cache
        self._partial = partial
        self._weights = weights

    def compute(self, node: TensorFields, stack: Stack) -> None:
        """Compute the whole product of a stack into the node's output.

        Raises:
            FormatError: an expert cannot be read.
        """
        wanted = [int(expert) for expert in np.unique(self._chosen)]
        wanted.sort(key=lambda expert: not self._cache.holds(stack.index, expert))
        size = max(1, self._cache.room(stack.index) // 2)
        groups = [wanted[i : i + size] for i in range(0, len(wanted), size)]
        self._cache.tally.wanted(stack.turn, len(wanted))
        self._cache.need(self.turn, (stack.index,), groups[0])
        for group, following in zip(groups, [*groups[1:], []], strict=True):
            self._cache.need(self.turn, (stack.index,), [*group, *following])
            for expert in group:
                self._cache.wait(stack.index, expert)
            self._compute_group(node, stack, group)
        self._cache.end_turn()

    def _compute_group(self, node: TensorFields, stack: Stack, group: Sequence[int]) -> None:
        rows = np.flatnonzero(np.isin(self._chosen, group))
        table = np.asarray(self._cache.slots(stack.index), np.int32)
        slots = table[self._chosen[rows]]
        self._partial.compute(node, self._weights[stack.index], rows, slots)
