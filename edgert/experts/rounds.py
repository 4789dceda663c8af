"""Routed products of batches, computed expert by expert: as they arrive, or in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgert.experts.cache import ExpertCache
from edgert.experts.ids import Ids
from edgert.experts.loads import Load
from edgert.experts.partial import PartialProduct, Rows
from edgert.experts.routed import Stack, Turn
from edgert.llama.lib import TensorFields

_NO_OPERATION = 0  # GGML_OP_NONE: a node that is passed over


@dataclass(frozen=True, slots=True)
class TurnRows:
    """The rows of one turn's products, and what computes them.

    Attributes:
        turn: Whose products.
        chosen: (n_tokens * n_used,) the expert of each row.
        cache: Brings experts.
        partial: Computes rows.
        weights: The tensor that reads a stack's slots, by the stack's index.
    """

    turn: Turn
    chosen: Ids
    cache: ExpertCache
    partial: PartialProduct
    weights: Mapping[int, int]

    def of(self, experts: Sequence[int]) -> Rows:
        """Return the rows of these experts."""
        return np.flatnonzero(np.isin(self.chosen, experts))

    def compute(self, node: TensorFields, stack: Stack, rows: Rows) -> None:
        """Compute rows whose experts are there, into the node's output."""
        if len(rows):
            table = np.asarray(self.cache.slots(stack.index), np.int32)
            slots = table[self.chosen[rows]]
            self.partial.compute(node, self.weights[stack.index], rows, slots)


class Arrivals:
    """Computes one turn's products in the order in which its experts arrive.

    What is in memory is computed while the rest is read, and every expert as soon as it is there.

    Args:
        rows: Of the turn; the cache holds all their experts, or is reading them.
        pending: What has not arrived, by stack, in the order in which it was asked for.
    """

    def __init__(self, rows: TurnRows, pending: Mapping[int, Sequence[Load]]) -> None:
        self.turn = rows.turn
        self._rows = rows
        self._pending = pending

    def compute(self, node: TensorFields, stack: Stack) -> None:
        """Compute the whole product of a stack into the node's output.

        Raises:
            FormatError: an expert cannot be read.
        """
        loads = list(self._pending.get(stack.index, ()))
        rows, cache = self._rows, self._rows.cache
        absent = [load.expert for load in loads]
        rows.compute(node, stack, np.flatnonzero(~np.isin(rows.chosen, absent)))
        while loads:
            cache.wait_for(loads[0])
            there = [load for load in loads if load.done]
            for load in there:
                cache.wait_for(load)
            loads = [load for load in loads if load not in there]
            rows.compute(node, stack, rows.of([load.expert for load in there]))


class Rounds:
    """Computes one turn's products, as many experts at a time as there is room for.

    While a group is computed the next one is read, so a group is half of what fits.

    Args:
        rows: Of the turn.
    """

    def __init__(self, rows: TurnRows) -> None:
        self.turn = rows.turn
        self._rows = rows

    def compute(self, node: TensorFields, stack: Stack) -> None:
        """Compute the whole product of a stack into the node's output.

        Raises:
            FormatError: an expert cannot be read.
        """
        rows, cache = self._rows, self._rows.cache
        wanted = [int(expert) for expert in np.unique(rows.chosen)]
        wanted.sort(key=lambda expert: not cache.holds(stack.index, expert))
        size = max(1, cache.room(stack.index) // 2)
        groups = [wanted[i : i + size] for i in range(0, len(wanted), size)]
        cache.tally.wanted(stack.turn, len(wanted))
        cache.need(self.turn, (stack.index,), groups[0])
        for group, following in zip(groups, [*groups[1:], []], strict=True):
            cache.need(self.turn, (stack.index,), [*group, *following])
            for expert in group:
                cache.wait(stack.index, expert)
            rows.compute(node, stack, rows.of(group))
        cache.end_turn()


class Emptied:
    """At most one node whose operation was taken away, because its output is there already."""

    def __init__(self) -> None:
        self._node: tuple[TensorFields, int] | None = None

    def take(self, node: TensorFields) -> None:
        """Leave llama.cpp nothing to do at a node."""
        self._node = (node, node.op)
        node.op = _NO_OPERATION

    def restore(self) -> None:
        """Give the node its operation back: llama.cpp may use the graph again."""
        if self._node is not None:
            node, operation = self._node
            node.op, self._node = operation, None
