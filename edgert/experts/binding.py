"""Points llama.cpp's routed products at slots: other weights and ids, the same node and kernel."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError
from edgert.experts.arena import Arena
from edgert.experts.routed import Stack, Turn, stacks_of
from edgert.llama.lib import LlamaLibrary, TensorFields, tensor_at

_I32 = 26

Ids = NDArray[np.int32]


class Binding:
    """Rewrites the operands of `mul_mat_id` nodes just before they are computed.

    Args:
        library: The checked libraries.
        arena: Whose tensors replace the weights.
        turns: Layers with experts.
        most_ids: Ids of the largest batch: experts used times tokens.
    """

    def __init__(
        self, library: LlamaLibrary, arena: Arena, turns: Sequence[Turn], most_ids: int
    ) -> None:
        self._library = library
        n_places = max(len(turn.stacks) for turn in turns)
        self._context = library.new_context(n_places)
        self._buffers = [np.zeros(most_ids, np.int32) for _ in range(n_places)]
        self._ids = []
        for buffer in self._buffers:
            tensor = library.base.ggml_new_tensor_2d(self._context, _I32, most_ids, 1)
            tensor_at(tensor).data = buffer.ctypes.data
            self._ids.append(tensor)
        self.tensors = {s.index: arena.tensor_of(s.index) for s in stacks_of(turns)}
        self._place = {s.index: i for turn in turns for i, s in enumerate(turn.stacks)}
        self.stacks: Mapping[int, Stack] = {
            address: stack
            for stack in stacks_of(turns)
            for address in (*stack.addresses, arena.tensor_of(stack.index))
        }

    def bind(self, node: TensorFields, stack: Stack) -> None:
        """Make a node read slots instead of the model's own tensor."""
        node.src[0] = self.tensors[stack.index]
        node.src[2] = self._ids[self._place[stack.index]]

    def choose(self, stack: Stack, slots: Sequence[int], experts: Ids) -> None:
        """Write the slots of the chosen experts where the node will read them.

        Args:
            stack: Which.
            slots: Slot by expert.
            experts: (n_tokens, n_used) as the router chose.
        """
        place = self._place[stack.index]
        n_tokens, n_used = experts.shape
        buffer = self._buffers[place]
        if n_tokens == 1:
            for i, expert in enumerate(experts[0].tolist()):
                buffer[i] = slots[expert]
        else:
            buffer[: experts.size] = np.asarray(slots, np.int32)[experts].ravel()
        tensor = tensor_at(self._ids[place])
        tensor.ne[0], tensor.ne[1] = n_used, n_tokens
        tensor.nb[1] = 4 * n_used
        tensor.nb[2] = tensor.nb[3] = 4 * experts.size

    def close(self) -> None:
        """Free the tensors."""
        self._library.base.ggml_free(self._context)


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
