"""The tap: llama.cpp's eval callback, turned into four primitives that know nothing of models.

*resident*: a `GraphObserver` sees every node before and after it is computed and may move weights.
*replace*: a node's output is overwritten with a result computed elsewhere.
*capture / stop*: a node's output is copied or looked at, and the rest of the graph may be skipped.
*inject*: hidden states enter in place of tokens (`LlamaContext.decode_hidden`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError, ConfigError
from edgert.llama.lib import LlamaLibrary, TensorFields, tensor_at

_F32 = 0
Floats = NDArray[np.float32]


class GraphObserver(Protocol):
    """Sees every node of every graph, in order."""

    def before(self, node: int) -> bool:
        """Take the address of a node about to be computed; True asks for a call after it.

        A node that answers True is the last one computed before `after` is called.
        """
        ...

    def after(self, node: int) -> None:
        """Take the address of a node that is computed, with every node before it."""
        ...


@dataclass(slots=True)
class Capture:
    """The latest output of a node.

    Attributes:
        stop: Whether the graph ends after the node.
        value: (n_tokens, width) copy, None until the node was computed.
    """

    stop: bool = False
    value: Floats | None = None


@dataclass(slots=True)
class _Named:
    captures: dict[bytes, Capture] = field(default_factory=dict)
    watches: dict[bytes, Callable[[TensorFields], None]] = field(default_factory=dict)
    replacements: dict[bytes, Callable[[Floats], Floats]] = field(default_factory=dict)

    def wants(self, name: bytes) -> bool:
        return name in self.captures or name in self.replacements or name in self.watches

    def any(self) -> bool:
        return bool(self.captures or self.replacements or self.watches)


class Tap:
    """Owns the callback; create it before the context and pass `callback` to it.

    Nothing may be raised through C, so a failure inside the callback is kept in `error`, the
    computation is stopped, and whoever called decode raises it (`raise_error`).

    Args:
        library: The checked libraries.
    """

    def __init__(self, library: LlamaLibrary) -> None:
        self.callback = library.api.ggml_backend_sched_eval_callback(self._called)
        self.observer: GraphObserver | None = None
        self.error: BaseException | None = None
        self._named = _Named()
        self._stopped = self._ends = False
        self.n_passed_over = 0

    def pass_over(self, n_nodes: int) -> bool:
        """Answer for the next nodes that they need no look; False where others want to see them."""
        if self._named.any():
            return False
        self.n_passed_over = n_nodes
        return True

    def capture(self, name: str, *, stop: bool = False) -> Capture:
        """Copy the output of the node called `name` each time; `stop` ends the graph there."""
        return self._named.captures.setdefault(name.encode(), Capture(stop))

    def replace(self, name: str, compute: Callable[[Floats], Floats]) -> None:
        """Overwrite the output of the node called `name`.

        Args:
            name: The node, such as `ffn_out-3`.
            compute: Takes the (n_tokens, width) output, returns what goes there, same shape.
        """
        self._named.replacements[name.encode()] = compute

    def watch(self, name: bytes, look: Callable[[TensorFields], None]) -> None:
        """Have `look` see the node called `name` each time that it is computed."""
        self._named.watches[name] = look

    def release(self, name: str) -> None:
        """Forget captures, replacements and watches of a node."""
        self._named.watches.pop(name.encode(), None)
        self._named.captures.pop(name.encode(), None)
        self._named.replacements.pop(name.encode(), None)

    def begin(self) -> None:
        """Forget the last computation's error and stop."""
        self.error = None
        self._stopped = self._ends = False
        self.n_passed_over = 0

    def end_graph(self) -> None:
        """End the running graph after the node that was just computed."""
        self._ends = True

    def raise_error(self) -> None:
        """Raise what went wrong inside the callback, if anything did."""
        if self.error is not None:
            error, self.error = self.error, None
            raise error

    def _called(self, node: int, ask: bool, _user: int | None) -> bool:
        if ask and self.n_passed_over:  # hundreds of times for every token
            self.n_passed_over -= 1
            return False
        try:
            return self._ask(node) if ask else self._done(node)
        except BaseException as error:  # noqa: BLE001  must not cross the C frame; raised later
            self.error = error
            self._stopped = True
            self.n_passed_over = 0
            return ask

    def _ask(self, node: int) -> bool:
        if self._stopped:
            return True
        wanted = self.observer.before(node) if self.observer is not None else False
        if self._named.any():
            wanted = self._named.wants(tensor_at(node).name) or wanted
        return wanted

    def _done(self, node: int) -> bool:
        if self._stopped:
            return False
        if self._named.any():
            self._apply_named(tensor_at(node))
        if self.observer is not None:
            self.observer.after(node)
        if self._ends:
            self._ends, self.n_passed_over = False, 0
            return False
        return not self._stopped

    def _apply_named(self, tensor: TensorFields) -> None:
        watch = self._named.watches.get(tensor.name)
        if watch is not None:
            watch(tensor)
        compute = self._named.replacements.get(tensor.name)
        if compute is not None:
            view = node_values(tensor)
            result = compute(view.copy())
            if result.shape != view.shape:
                raise ConfigError(f"replacement has shape {result.shape}, wanted {view.shape}")
            view[...] = result
        capture = self._named.captures.get(tensor.name)
        if capture is not None:
            capture.value = node_values(tensor).copy()
            self._stopped = self._stopped or capture.stop


def node_values(tensor: TensorFields) -> Floats:
    """View a contiguous float32 node of at most two dimensions as (n_tokens, width).

    Raises:
        BackendError: another type, a layout with gaps, or not in this process's memory.
    """
    width, rows = tensor.ne[0], tensor.ne[1]
    dense = tensor.nb[0] == 4 and tensor.nb[1] == 4 * width
    if tensor.type != _F32 or not dense or tensor.ne[2] * tensor.ne[3] != 1 or not tensor.data:
        raise BackendError(
            f"node {tensor.name.decode()} is not a plain float32 matrix "
            f"(type {tensor.type}, shape {list(tensor.ne)})"
        )
    pointer = ctypes.cast(tensor.data, ctypes.POINTER(ctypes.c_float))
    return np.ctypeslib.as_array(pointer, shape=(rows, width))
