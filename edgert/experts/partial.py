"""Computes some rows of a routed product with ggml's own kernel, in a graph of one node.

A row is one expert applied to one token. Its kernel sees the same weights, the same activations and
as many rows for each expert as in the whole product, so the bits are those of the whole product.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError
from edgert.llama.ggml_graph import Processor, Tensors
from edgert.llama.lib import LlamaLibrary, TensorFields, tensor_at

_F32, _I32 = 0, 26
_ROOM_FOR_TENSORS = 8
_MOST_ROWS = 512  # at once, unless one expert has more: what they take is copied in and out

Floats = NDArray[np.float32]
Rows = NDArray[np.int64]


class PartialProduct:
    """One reusable graph: weights x activations by id.

    Args:
        library: The checked libraries.
        processor: Computes it.
    """

    def __init__(self, library: LlamaLibrary, processor: Processor) -> None:
        self._processor = processor
        self._tensors = Tensors(library, _ROOM_FOR_TENSORS)
        self._activations, self._ids, self._node, self._graph = self._tensors.routed_product()
        self._inputs = np.empty(0, np.float32)
        self._outputs = np.empty(0, np.float32)
        self._slots = np.empty(0, np.int32)

    def compute(
        self, node: TensorFields, weight: int, rows: Rows, slots: Sequence[int] | NDArray[np.int32]
    ) -> None:
        """Compute rows of a `mul_mat_id` node and write them where the node's output belongs.

        Args:
            node: The node; every node before it is computed.
            weight: The tensor whose slots hold the experts.
            rows: Indices into the node's (n_tokens * n_used) rows.
            slots: The slot of each row's expert.
        """
        for part in _parts(np.asarray(slots, np.int32)):
            self._compute(node, weight, rows[part], np.asarray(slots, np.int32)[part])

    def _compute(
        self, node: TensorFields, weight: int, rows: Rows, slots: NDArray[np.int32]
    ) -> None:
        inputs, outputs = _operand(node), _result(node)
        n_used = outputs.shape[1]
        tokens, places = np.divmod(rows, n_used)
        gathered = inputs[tokens, places % inputs.shape[1]]
        n_rows, n_columns = len(rows), outputs.shape[2]
        self._reserve(n_rows, gathered.shape[1], n_columns)
        self._inputs[: gathered.size] = gathered.ravel()
        self._slots[:n_rows] = slots
        self._shape(weight, n_rows, gathered.shape[1], n_columns)
        self._processor.compute(self._graph)
        outputs[tokens, places] = self._outputs[: n_rows * n_columns].reshape(n_rows, n_columns)

    def close(self) -> None:
        """Free the graph."""
        self._tensors.close()

    def _reserve(self, n_rows: int, row_length: int, n_columns: int) -> None:
        if len(self._inputs) < n_rows * row_length:
            self._inputs = np.empty(n_rows * row_length, np.float32)
        if len(self._outputs) < n_rows * n_columns:
            self._outputs = np.empty(n_rows * n_columns, np.float32)
        if len(self._slots) < n_rows:
            self._slots = np.empty(n_rows, np.int32)

    def _shape(self, weight: int, n_rows: int, row_length: int, n_columns: int) -> None:
        _lay_out(self._activations, self._inputs.ctypes.data, (row_length, 1, n_rows))
        _lay_out(self._ids, self._slots.ctypes.data, (1, n_rows, 1))
        _lay_out(self._node, self._outputs.ctypes.data, (n_columns, 1, n_rows))
        tensor_at(self._node).src[0] = weight


def _parts(slots: NDArray[np.int32]) -> list[NDArray[np.int64] | slice]:
    """Cut rows where their experts change: an expert's rows stay together, as in the whole."""
    if len(slots) <= _MOST_ROWS:
        return [slice(None)]
    order = np.argsort(slots, kind="stable")
    ends = [*np.flatnonzero(np.diff(slots[order])) + 1, len(slots)]
    parts: list[NDArray[np.int64] | slice] = []
    start = end = 0
    for following in ends:
        if following - start > _MOST_ROWS and end > start:
            parts.append(order[start:end])
            start = end
        end = int(following)
    parts.append(order[start:])
    return parts


def _lay_out(address: int, data: int, shape: tuple[int, int, int]) -> None:
    """Make a tensor of 4-byte elements contiguous in this shape, over this memory."""
    tensor = tensor_at(address)
    tensor.data = data
    n_bytes = 4
    for axis, length in enumerate(shape):
        tensor.ne[axis] = length
        tensor.nb[axis] = n_bytes
        n_bytes *= length
    tensor.nb[3] = n_bytes


def _operand(node: TensorFields) -> Floats:
    """View a node's activations as (n_tokens, 1 or n_used, row_length)."""
    if not node.src[1]:
        raise BackendError(f"{node.name.decode()} has no activations")
    return _cube(tensor_at(node.src[1]))


def _result(node: TensorFields) -> Floats:
    """View a node's output as (n_tokens, n_used, n_columns)."""
    return _cube(node)


def _cube(tensor: TensorFields) -> Floats:
    width, height, depth = tensor.ne[0], tensor.ne[1], tensor.ne[2]
    if tensor.type != _F32 or tensor.nb[0] != 4 or tensor.ne[3] != 1 or not tensor.data:
        raise BackendError(f"{tensor.name.decode()} is no float32 tensor in memory")
    n_bytes = (depth - 1) * tensor.nb[2] + (height - 1) * tensor.nb[1] + width * 4
    memory = (ctypes.c_float * (n_bytes // 4)).from_address(tensor.data)
    strides = (tensor.nb[2], tensor.nb[1], 4)
    return np.lib.stride_tricks.as_strided(
        np.ctypeslib.as_array(memory), (depth, height, width), strides
    )
