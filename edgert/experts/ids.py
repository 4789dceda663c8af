"""Tensors of ids that stand in for a router's own: slots instead of experts."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.experts.routed import Stack, Turn
from edgert.llama.lib import LlamaLibrary, tensor_at

_I32 = 26

Ids = NDArray[np.int32]


class IdTensors:
    """One tensor for each place that a stack has in its layer; layers take turns with them.

    Args:
        library: The checked libraries.
        turns: Layers with experts.
    """

    def __init__(self, library: LlamaLibrary, turns: Sequence[Turn]) -> None:
        self._library = library
        n_places = max(len(turn.stacks) for turn in turns)
        self._context = library.new_context(n_places)
        self._tensors: list[int] = [
            library.base.ggml_new_tensor_2d(self._context, _I32, 1, 1) for _ in range(n_places)
        ]
        self._buffers = [(ctypes.c_int32 * 1)() for _ in range(n_places)]
        self._shapes: list[tuple[int, ...]] = [()] * n_places
        self._place = {s.index: i for turn in turns for i, s in enumerate(turn.stacks)}

    def of(self, stack: Stack) -> int:
        """Return the tensor of a stack."""
        return self._tensors[self._place[stack.index]]

    def write(self, stack: Stack, slots: Sequence[int] | Ids, shape: tuple[int, ...]) -> None:
        """Write slots for the rows of a product.

        Args:
            stack: Whose product.
            slots: One for each row, row after row.
            shape: (n_tokens, n_used).
        """
        place = self._place[stack.index]
        n_rows = len(slots)
        if self._shapes[place] != shape:
            self._reshape(place, n_rows, shape)
        if isinstance(slots, np.ndarray):
            rows = np.ascontiguousarray(slots, np.int32)
            ctypes.memmove(self._buffers[place], rows.ctypes.data, rows.nbytes)
        else:
            self._buffers[place][:n_rows] = list(slots)

    def _reshape(self, place: int, n_rows: int, shape: tuple[int, ...]) -> None:
        if len(self._buffers[place]) < n_rows:
            self._buffers[place] = (ctypes.c_int32 * n_rows)()
        n_tokens, n_used = shape
        tensor = tensor_at(self._tensors[place])
        tensor.data = ctypes.addressof(self._buffers[place])
        tensor.ne[0], tensor.ne[1] = n_used, n_tokens
        tensor.nb[1] = 4 * n_used
        tensor.nb[2] = tensor.nb[3] = 4 * n_rows
        self._shapes[place] = shape

    def close(self) -> None:
        """Free the tensors."""
        self._library.base.ggml_free(self._context)
