"""Routed products of batches, computed expert by expert: as they arrive, or in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.experts.cache import ExpertCache
from edgert.experts.ids import Ids
from edgert.experts.loads import Load
from edgert.experts.partial import PartialProduct
from edgert.experts.routed import Stack, Turn
from edgert.llama.lib import TensorFields


class Arrivals:
    """Computes one turn's products in the order in which its experts arrive.

    What is in memory is computed while the rest is read, and every expert as soon as it is there.

    Args:
        turn: Whose products.
        experts: (n_tokens, n_used) as the router chose.
        cache: Holds all of them, or is reading them.
        partial: Computes rows.
        weights: The tensor that reads a stack's slots, by the stack's index.
        pending: What has not arrived, by stack, in the order in which it was asked for.
    """

    def __init__(
        self,
        turn: Turn,
        experts: Ids,
        cache: ExpertCache,
        partial: PartialProduct,
        weights: dict[int, int],
        pending: Mapping[int, Sequence[Load]],
    ) -> None:
        self.turn = turn
        self._chosen = experts.ravel()
        self._cache = cache
        self._partial = partial
        self._weights = weights
        self._pending = pending

    def compute(self, node: TensorFields, stack: Stack) -> None:
        """Compute the whole product of a stack into the node's output.

        Raises:
            FormatError: an expert cannot be read.
        """
        loads = list(self._pending.get(stack.index, ()))
        absent = [load.expert for load in loads]
        table = np.asarray(self._cache.slots(stack.index), np.int32)
        self._compute(node, stack, table, np.flatnonzero(~np.isin(self._chosen, absent)))
        while loads:
            self._cache.wait_for(loads[0])
            there = [load for load in loads if load.done]
            for load in there:
                self._cache.wait_for(load)
            loads = [load for load in loads if load not in there]
            arrived = [load.expert for load in there]
            self._compute(node, stack, table, np.flatnonzero(np.isin(self._chosen, arrived)))

    def _compute(
        self, node: TensorFields, stack: Stack, table: NDArray[np.int32], rows: NDArray[np.int64]
    ) -> None:
        if len(rows):
            slots = table[self._chosen[rows]]
            self._partial.compute(node, self._weights[stack.index], rows, slots)


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
