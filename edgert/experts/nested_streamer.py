"""Routed products over nested experts: each expert in the bits its tokens are worth."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from edgert.errors import CapacityError
from edgert.experts.binding import chosen_experts
from edgert.experts.gating import Gating
from edgert.experts.ids import Ids, IdTensors
from edgert.experts.loads import Load
from edgert.experts.nested_cache import NestedCache
from edgert.experts.partial import PartialProduct
from edgert.experts.rounds import Emptied
from edgert.experts.routed import Stack, Turn, stacks_of
from edgert.experts.script import Script
from edgert.experts.widths import Levels, WidthPolicy, level_counts
from edgert.llama.lib import LlamaLibrary, TensorFields, tensor_at
from edgert.llama.tap import GraphObserver, Tap


class NestedStreamer:
    """Watches routers and routed products (`GraphObserver`).

    llama.cpp's own product computes the rows of the level that most of them have, with the kernel
    of that level; the rows of other levels are computed right after it, into the same output.

    Args:
        library: The checked libraries.
        cache: Who is in memory, in how many bits.
        policy: Bits by routing weight.
        beside: Moves the weights that are not routed.
        tap: Spares it the nodes that do not matter.
        partial: Computes the rows of the other levels.
    """

    def __init__(
        self,
        library: LlamaLibrary,
        cache: NestedCache,
        policy: WidthPolicy,
        beside: GraphObserver,
        tap: Tap,
        partial: PartialProduct,
    ) -> None:
        turns = cache.turns
        self._levels: Levels = np.empty((0, 0), np.int64)
        self._by_ids = {turn.ids_name: turn for turn in turns}
        self._cache = cache
        self.policy = policy
        self._beside = beside
        self._partial = partial
        self._ids = IdTensors(library, turns)
        self._gating = Gating(library)
        self._stacks: dict[int, Stack] = {
            address: stack for stack in stacks_of(turns) for address in stack.addresses
        }
        for stack in stacks_of(turns):
            for level in range(len(policy.widths)):
                self._stacks[cache.tensor(stack.index, level)] = stack
        self._tap = tap
        self._script = Script(tap.pass_over)
        self._choosing: Turn | None = None
        self._experts: Ids = np.empty((0, 0), np.int32)
        self._pending: dict[int, list[Load]] = {}
        self._rounds: dict[int, int] | None = None
        self._others: tuple[Stack, _Rows] | None = None
        self._turn = turns[0]
        self._emptied = Emptied()

    def begin_pass(self, n_tokens: int, n_logits: int) -> None:
        """Prepare for a decode."""
        self._pending = {}
        self._choosing = self._others = self._rounds = None
        self._script.begin(n_logits if n_tokens == 1 else None)

    def end_pass(self, *, complete: bool) -> None:
        """Finish a decode, also one that ended early.

        Raises:
            BackendError: the graph was not the one it should have been.
        """
        self._pending = {}
        self._emptied.restore()
        self._cache.end_turn()
        self._script.end(complete=complete, n_passed_over=self._tap.n_passed_over)

    def before(self, node: int) -> bool:
        """Point routed products at their slots; True where the graph must split."""
        if self._script.skips():
            return False
        tensor = tensor_at(node)
        splits, matters = self._before(tensor, node)
        self._script.saw(tensor.name, matters=matters)
        return splits

    def after(self, node: int) -> None:
        """Ask for the experts that a router chose, or compute what a product left out."""
        self._emptied.restore()
        if self._choosing is not None:
            turn, self._choosing = self._choosing, None
            self._routed(turn, tensor_at(node))
        elif self._others is not None:
            (stack, rows), self._others = self._others, None
            self._compute(tensor_at(node), stack, rows)
        else:
            self._beside.after(node)

    def close(self) -> None:
        """Free the tensors of ids."""
        self._ids.close()

    def _before(self, tensor: TensorFields, node: int) -> tuple[bool, bool]:
        stack = self._stacks.get(tensor.src[0] or 0)
        if stack is not None and not tensor.ne[2]:
            return False, True  # the last layer of a batch that wants no logits has no rows
        if self._rounds is not None:
            if stack is not None:
                self._in_rounds(tensor, stack, self._rounds)
            else:
                self._beside.before(node)  # biases between the products may stream
            return True, True
        if stack is not None:
            for load in self._pending.pop(stack.index, ()):
                self._cache.wait(load)
            self._bind(tensor, stack)
            return bool(self._pending) or self._others is not None, True
        turn = self._by_ids.get(tensor.name)
        if turn is not None:
            self._choosing = turn
            return True, True
        splits = self._beside.before(node)
        return splits, splits

    def _routed(self, turn: Turn, node: TensorFields) -> None:
        if not node.ne[1]:
            return
        experts = chosen_experts(node, turn.stacks[0].n_experts)
        n_tokens = experts.shape[0]
        counts = np.bincount(experts.ravel(), minlength=turn.stacks[0].n_experts)
        self._cache.scores.routed(turn.index, counts, n_tokens)
        levels = self.policy.levels(self._gating.weights(node, experts))
        wanted = level_counts(experts, levels, len(self.policy.widths))
        # The hottest first: what most tokens wait for is computed first and longest.
        ordered = dict(sorted(wanted.items(), key=lambda item: (-counts[item[0]], item[0])))
        self._experts, self._levels, self._turn = experts, levels, turn
        stacks = [stack.index for stack in turn.stacks]
        self._cache.tally.wanted(turn.index, len(stacks) * len(ordered))
        self._rounds = None
        try:
            self._pending = self._cache.need(turn, stacks, ordered)
        except CapacityError:
            if n_tokens == 1:
                raise
            self._rounds = ordered

    def _bind(self, node: TensorFields, stack: Stack) -> None:
        """Let the node compute the rows of the commonest level, and keep the others for later."""
        chosen = self._experts.ravel().tolist()
        rows = self._split(stack, range(len(chosen)))
        places = {expert: self._cache.place(stack.index, expert) for expert in set(chosen)}
        if rows.by_level:
            level = max(rows.by_level, key=lambda key: len(rows.by_level[key]))
            any_slot = places[chosen[rows.by_level.pop(level)[0]]][1]
        else:
            level, any_slot = places[chosen[0]]
        slots = [places[expert][1] if places[expert][0] == level else any_slot for expert in chosen]
        node.src[0] = self._cache.tensor(stack.index, level)
        self._ids.write(stack, slots, self._experts.shape)
        node.src[2] = self._ids.of(stack)
        self._others = (stack, rows) if rows.by_level or rows.narrowed else None

    def _split(self, stack: Stack, rows: Iterable[int]) -> _Rows:
        """Group rows of a product by the level that their experts are computed at."""
        found = _Rows({}, {})
        chosen, levels = self._experts.ravel(), self._levels.ravel()
        for row in rows:
            expert = int(chosen[row])
            level = self._cache.place(stack.index, expert)[0]
            wanted = int(levels[row])
            if self.policy.exact and wanted < level:
                found.narrowed.setdefault((expert, wanted), []).append(row)
                self._cache.used(stack.index, wanted, 1)
            else:
                found.by_level.setdefault(level, []).append(row)
        for level, members in found.by_level.items():
            self._cache.used(stack.index, level, len(members))
        return found

    def _compute(self, node: TensorFields, stack: Stack, rows: _Rows) -> None:
        chosen = self._experts.ravel()
        for level, members in rows.by_level.items():
            slots = [self._cache.place(stack.index, int(chosen[row]))[1] for row in members]
            tensor = self._cache.tensor(stack.index, level)
            self._partial.compute(node, tensor, np.asarray(members, np.int64), slots)
        for (expert, level), members in rows.narrowed.items():
            tensor = self._cache.narrowed(stack.index, expert, level)
            self._partial.compute(node, tensor, np.asarray(members, np.int64), [0] * len(members))

    def _in_rounds(self, node: TensorFields, stack: Stack, wanted: Mapping[int, int]) -> None:
        """Compute a product here, as many experts at a time as there is room for."""
        order = list(wanted)
        size = max(1, self._cache.room(stack.index) // 2)
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        chosen = self._experts.ravel()
        for group, following in zip(groups, [*groups[1:], []], strict=True):
            levels = {expert: wanted[expert] for expert in (*group, *following)}
            pending = self._cache.need(self._turn, (stack.index,), levels)
            for load in pending.get(stack.index, ()):
                if load.expert in group:
                    self._cache.wait(load)
            rows = np.flatnonzero(np.isin(chosen, group)).tolist()
            self._compute(node, stack, self._split(stack, rows))
        self._cache.end_turn()
        self._emptied.take(node)
        if stack is self._turn.stacks[-1]:
            self._rounds = None


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a product by the level their experts are at, and those computed in fewer bits."""

    by_level: dict[int, list[int]]
    narrowed: dict[tuple[int, int], list[int]]
