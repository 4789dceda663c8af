"""Has the experts in memory that a pass routes to: the tap's primitive *resident*, by expert."""

from __future__ import annotations

from typing import Literal

import numpy as np

from edgert.experts.binding import Binding, chosen_by_one, chosen_experts
from edgert.experts.cache import ExpertCache
from edgert.experts.foresight import Foresight
from edgert.experts.loads import Load
from edgert.experts.partial import PartialProduct
from edgert.experts.rounds import Arrivals, Emptied, Rounds, TurnRows
from edgert.experts.routed import Stack, Turn
from edgert.experts.script import Script
from edgert.llama.lib import TensorFields, tensor_at
from edgert.llama.tap import GraphObserver, Tap

LoadingOrder = Literal["hottest", "id"]


class ExpertStreamer:
    """Watches routers and routed products (`GraphObserver`).

    The graph is split after the node that chooses: then every missing expert of the layer is asked
    for at once. A product waits for its own stack only, and is split off while later stacks of its
    layer are on their way, so that it is computed meanwhile.

    Args:
        cache: Who is in memory; knows the layers with experts.
        binding: Points nodes at slots.
        beside: Moves the weights that are not routed.
        foresight: Guesses the next turn; None for no guessing.
        partial: Computes products whose experts do not fit at once.
        tap: Where nothing but experts moves, to be spared the nodes that do not matter; else None.
    """

    def __init__(
        self,
        cache: ExpertCache,
        binding: Binding,
        beside: GraphObserver,
        foresight: Foresight | None,
        partial: PartialProduct,
        tap: Tap | None,
    ) -> None:
        turns = cache.turns
        self._by_ids = {turn.ids_name: turn for turn in turns}
        self._used = [(turn.n_weights, turn.n_bits) for turn in turns]
        self._cache = cache
        self._binding = binding
        self._beside = beside
        self._foresight = foresight
        self._tap = tap
        self._script = None if tap is None else Script(tap.pass_over)
        self._pending: dict[int, list[Load]] = {}
        self._choosing: Turn | None = None
        self._partial = partial
        self._rounds: Rounds | Arrivals | None = None
        self.order: LoadingOrder = "hottest"
        self._emptied = Emptied()

    def begin_pass(self, n_tokens: int, n_logits: int) -> None:
        """Prepare for a decode."""
        self._pending = {}
        self._choosing = self._rounds = None
        if self._script is not None:
            self._script.begin(n_logits if n_tokens == 1 else None)

    def end_pass(self, *, complete: bool) -> None:
        """Finish a decode, also one that ended early.

        Raises:
            BackendError: the graph was not the one it should have been.
        """
        self._pending = {}
        self._emptied.restore()
        self._cache.end_turn()
        if self._script is not None and self._tap is not None:
            self._script.end(complete=complete, n_passed_over=self._tap.n_passed_over)

    def before(self, node: int) -> bool:
        """Point routed products at their slots; True where the graph must split."""
        script = self._script
        if script is None:
            return self._before(tensor_at(node), node)[0]
        if script.skips():
            return False
        tensor = tensor_at(node)
        splits, matters = self._before(tensor, node)
        script.saw(tensor.name, matters=matters)
        return splits

    def after(self, node: int) -> None:
        """Ask for the experts that a router chose."""
        self._emptied.restore()
        if self._choosing is not None:
            turn, self._choosing = self._choosing, None
            self._routed(turn, tensor_at(node))
        else:
            self._beside.after(node)

    def _before(self, tensor: TensorFields, node: int) -> tuple[bool, bool]:
        """Return whether the graph splits here, and whether the node matters at all."""
        stack = self._binding.stacks.get(tensor.src[0] or 0)
        if self._rounds is not None:
            if stack is None:
                self._beside.before(node)  # biases between the products may stream
            return self._in_rounds(self._rounds, tensor, stack), True
        if stack is not None:
            self._binding.bind(tensor, stack)
            self._wait(stack)
            return bool(self._pending), True
        turn = self._by_ids.get(tensor.name)
        if turn is not None:
            self._choosing = turn
            return True, True
        splits = self._beside.before(node)
        return splits, splits

    def _routed(self, turn: Turn, node: TensorFields) -> None:
        if not node.ne[1]:
            return  # the last layer of a batch that wants no logits has no rows
        one = chosen_by_one(node, turn.stacks[0].n_experts)
        if one is None:
            self._routed_batch(turn, node)
        else:
            self._routed_one(turn, one)
        if self._foresight is not None and not isinstance(self._rounds, Rounds):
            self._foresight.look(turn, node, self._cache)

    def _routed_one(self, turn: Turn, experts: list[int]) -> None:
        """Serve the choice of a single token."""
        cache, n = self._cache, len(experts)
        cache.scores.chose(turn.index, experts)
        n_weights, n_bits = self._used[turn.index]
        cache.tally.used(turn.index, n_weights * n, n_bits * n)
        cache.tally.wanted(turn.index, len(turn.stacks) * n)
        self._pending = {}
        if not cache.has_all(turn, experts):
            self._pending = cache.need(turn, [stack.index for stack in turn.stacks], experts)
        for stack in turn.stacks:
            self._binding.choose_one(stack, cache.slots(stack.index), experts)

    def _routed_batch(self, turn: Turn, node: TensorFields) -> None:
        """Serve the choices of several tokens, or have them computed in rounds."""
        experts = chosen_experts(node, turn.stacks[0].n_experts)
        counts = np.bincount(experts.ravel(), minlength=turn.stacks[0].n_experts)
        self._cache.scores.routed(turn.index, counts, experts.shape[0])
        n_weights, n_bits = self._used[turn.index]
        self._cache.tally.used(turn.index, n_weights * experts.size, n_bits * experts.size)
        wanted = np.flatnonzero(counts).tolist()
        if self.order == "hottest":  # what most tokens wait for is read first, computed longest
            wanted.sort(key=lambda expert: -counts[expert])
        rows = TurnRows(turn, experts.ravel(), self._cache, self._partial, self._binding.tensors)
        if not self._cache.fits(turn, len(wanted)):
            self._rounds = Rounds(rows)
            return
        stacks = [stack.index for stack in turn.stacks]
        self._cache.tally.wanted(turn.index, len(stacks) * len(wanted))
        self._pending = self._cache.need(turn, stacks, wanted)
        if self._pending:
            self._rounds = Arrivals(rows, self._pending)
            return
        for stack in turn.stacks:
            self._binding.choose(stack, self._cache.slots(stack.index), experts)

    def _in_rounds(
        self, rounds: Rounds | Arrivals, tensor: TensorFields, stack: Stack | None
    ) -> bool:
        """Compute products here, leaving llama.cpp nothing to do; split after every other node.

        A node's output may lie where an operand of an earlier node was, so all of those have to be
        computed before anything is written there.
        """
        if stack is not None:
            rounds.compute(tensor, stack)
            self._emptied.take(tensor)
            if stack is rounds.turn.stacks[-1]:
                self._rounds = None
        return True

    def _wait(self, stack: Stack) -> None:
        for load in self._pending.pop(stack.index, ()):
            self._cache.wait_for(load)
