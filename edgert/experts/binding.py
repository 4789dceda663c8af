"""Points llama.cpp's routed products at slots: other weights and ids, the same node and kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np

from edgert.errors import BackendError
from edgert.experts.arena import Arena
from edgert.experts.ids import Ids, IdTensors
from edgert.experts.routed import Stack, Turn, stacks_of
from edgert.llama.lib import LlamaLibrary, TensorFields

_I32 = 26


class Binding:
    """Rewrites the operands of `mul_mat_id` nodes just before they are computed.

    Args:
        library: The checked libraries.
        arena: Whose tensors replace the weights.
        turns: Layers with experts.
    """

    def __init__(self, library: LlamaLibrary, arena: Arena, turns: Sequence[Turn]) -> None:
        self._ids = IdTensors(library, turns)
        self.tensors = {s.index: arena.tensor_of(s.index) for s in stacks_of(turns)}
        self.stacks: Mapping[int, Stack] = {
            address: stack
            for stack in stacks_of(turns)
            for address in (*stack.addresses, arena.tensor_of(stack.index))
        }

    def bind(self, node: TensorFields, stack: Stack) -> None:
        """Make a node read slots instead of the model's own tensor."""
        node.src[0] = self.tensors[stack.index]
        node.src[2] = self._ids.of(stack)

    def choose(self, stack: Stack, slots: Sequence[int], experts: Ids) -> None:
        """Write the slots of the chosen experts where the node will read them.

        Args:
            stack: Which.
            slots: Slot by expert.
            experts: (n_tokens, n_used) as the router chose.
        """
        rows = np.asarray(slots, np.int32)[experts].ravel()
        self._ids.write(stack, rows, experts.shape)

    def choose_one(self, stack: Stack, slots: Sequence[int], experts: Sequence[int]) -> None:
        """Write the slots of one token's experts."""
        rows = [slots[expert] for expert in experts]
        self._ids.write(stack, rows, (1, len(rows)))

    def close(self) -> None:
        """Free the tensors."""
        self._ids.close()


def chosen_by_one(node: TensorFields, n_experts: int) -> list[int] | None:
    """Return the ids that a router's node holds for one token; None if there are several tokens.

    Raises:
        BackendError: an id is out of range, or the node is no matrix of them.
    """
    if node.ne[1] != 1:
        return None
    if node.type != _I32 or not node.data or node.nb[0] != 4 or node.ne[2] * node.ne[3] != 1:
        raise BackendError(f"{node.name.decode()} is no matrix of ids")
    ids = list((ctypes.c_int32 * node.ne[0]).from_address(node.data))
    if min(ids) < 0 or max(ids) >= n_experts:
        raise BackendError(f"{node.name.decode()} chooses expert {max(ids)} of {n_experts}")
    return ids


def chosen_experts(node: TensorFields, n_experts: int) -> Ids:
    """Return the ids that a router's node holds, (n_tokens, n_used).

    Raises:
        BackendError: an id is out of range, or the node is no matrix of them.
    """
    n_used, n_tokens = node.ne[0], node.ne[1]
    if node.type != _I32 or not node.data or node.nb[0] != 4 or node.ne[2] * node.ne[3] != 1:
        raise BackendError(f"{node.name.decode()} is no matrix of ids")
    row_ids = node.nb[1] // 4
    count = row_ids * (n_tokens - 1) + n_used
    flat = np.ctypeslib.as_array((ctypes.c_int32 * count).from_address(node.data))
    ids = np.lib.stride_tricks.as_strided(flat, (n_tokens, n_used), (node.nb[1], 4)).copy()
    if ids.min() < 0 or ids.max() >= n_experts:
        raise BackendError(f"{node.name.decode()} chooses expert {ids.max()} of {n_experts}")
    return ids
