"""What a router's choice was made by, read from the nodes before it while they are in memory."""

from __future__ import annotations

import ctypes

import numpy as np
from numpy.typing import NDArray

from edgert.experts.ids import Ids
from edgert.llama.lib import LlamaLibrary, TensorFields, tensor_at

_F32 = 0
_MOST_STEPS = 8

Floats = NDArray[np.float32]


class Gating:
    """Finds the weights that a layer gives to what its experts compute.

    Args:
        library: The checked libraries.
    """

    def __init__(self, library: LlamaLibrary) -> None:
        self._product = library.op_number(b"MUL_MAT")
        self._add = library.op_number(b"ADD")

    def weights(self, ids: TensorFields, experts: Ids) -> Floats:
        """Return the weight of each choice up to a factor for each token; ones where unknown.

        Args:
            ids: The node that holds the choice.
            experts: (n_tokens, n_used), what it holds.

        Source: `llm_graph_context::build_moe_ffn`, src/llama-graph.cpp.
        """
        n_tokens, n_used = experts.shape
        selection = selection_of(ids)
        scores = None if selection is None else self._scores(selection)
        if scores is None or scores[0].shape[0] != n_tokens:
            return np.ones((n_tokens, n_used), np.float32)
        values, are_logits = scores
        chosen: Floats = np.take_along_axis(values, experts.astype(np.int64), axis=1)
        if are_logits:
            chosen = np.exp(chosen - chosen.max(axis=1, keepdims=True))
        return np.maximum(chosen, np.float32(0.0))

    def _scores(self, selection: TensorFields) -> tuple[Floats, bool] | None:
        """Return scores by expert, and whether a softmax of those chosen comes after.

        A bias on scores says what is chosen and not how it weighs, one on logits does both.
        """
        node, before = selection, selection
        for _ in range(_MOST_STEPS):
            if node.op == self._product or not node.src[0]:
                break
            following = tensor_at(node.src[0])
            if node.op == self._add and following.op != self._product:
                before = following
                break
            node = following
        values = matrix_of(before)
        if values is None:
            return None
        first = tensor_at(before.src[0]) if before.op == self._add and before.src[0] else before
        return values, first.op == self._product


def selection_of(ids: TensorFields) -> TensorFields | None:
    """Return the node by whose values a choice was made; None where it cannot be found."""
    address = ids.view_src or ids.src[0]
    argsort = tensor_at(address) if address else None
    return None if argsort is None or not argsort.src[0] else tensor_at(argsort.src[0])


def matrix_of(tensor: TensorFields) -> Floats | None:
    """View a float32 matrix, (rows, columns); None if it is something else."""
    columns, rows = tensor.ne[0], tensor.ne[1]
    plain = tensor.nb[0] == 4 and tensor.nb[1] == 4 * columns and tensor.ne[2] * tensor.ne[3] == 1
    if tensor.type != _F32 or not plain or not tensor.data:
        return None
    pointer = ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, shape=(rows, columns))
