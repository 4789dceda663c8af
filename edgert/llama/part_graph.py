"""The graph of a part of a model: hidden states in, hidden states or logits out, sums exchanged.

A part is a complete model to llama.cpp. What makes it one is done at the graph's nodes: products
whose columns are shared between hosts are summed over them, and where later layers are elsewhere
the graph ends with its last layer, whose output is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError
from edgert.experts.script import Script
from edgert.llama.lib import tensor_at
from edgert.llama.tap import GraphObserver, Tap, node_values

Floats = NDArray[np.float32]
SumOverHosts = Callable[[Floats], None]

_NONE: Floats = np.empty((0, 0), np.float32)
# Their columns are shared out, so that every host has a part of each sum (TPI-LLM, section 3.1).
_SUMMED = (b"attn_output.weight", b"ffn_down.weight")


def last_node(n_layer: int) -> bytes:
    """Return the name of the node that is the output of the last layer (llm_graph_context::cb)."""
    return b"l_out-%d" % (n_layer - 1)


@dataclass(frozen=True, slots=True)
class PartRun:
    """How a part is run.

    Attributes:
        to_hidden: Whether it ends with its last layer and not with logits.
        sum_over_hosts: Adds up a product over all hosts, in place; (n_tokens, n_embd). None where
            its layers are whole.
    """

    to_hidden: bool = False
    sum_over_hosts: SumOverHosts | None = None


class PartGraph:
    """Watches the graph of a part, beside whoever moves its weights (`GraphObserver`).

    Args:
        run: What is done at its nodes.
        n_layer: Of the part.
    """

    def __init__(self, run: PartRun, n_layer: int) -> None:
        self._run = run
        self._last = last_node(n_layer)
        self._beside: GraphObserver | None = None
        self._tap: Tap | None = None
        self._script = Script()
        self._beside_asked = self._sum = self._ends = False
        self._rows: list[Floats] = []

    def install(self, tap: Tap) -> None:
        """Take the place of a tap's observer, which is asked as before."""
        self._beside, tap.observer = tap.observer, self
        self._tap = tap
        if self._beside is None:
            self._script = Script(tap.pass_over)

    def begin_pass(self, n_tokens: int, n_logits: int) -> None:
        """Prepare for a decode."""
        self._rows.clear()
        learns = self._beside is None and n_tokens == 1
        self._script.begin(n_logits if learns else None)

    def end_pass(self, *, complete: bool) -> None:
        """Finish a decode; BackendError if the graph was not the one it should have been."""
        if self._tap is not None:
            self._script.end(complete=complete, n_passed_over=self._tap.n_passed_over)

    def hidden(self, n_rows: int) -> Floats:
        """Return what the last layer put out, (n_rows, n_embd); BackendError if it did not."""
        found = self._rows[0] if len(self._rows) == 1 else np.concatenate(self._rows or [_NONE])
        if len(found) != n_rows:
            raise BackendError(
                f"the node {self._last.decode()} put out {len(found)} rows, wanted {n_rows}"
            )
        return found

    def before(self, node: int) -> bool:
        """Ask whoever moves weights; True where there is something to do once it is computed."""
        if self._script.skips():
            return False
        tensor = tensor_at(node)
        weight = tensor.src[0]
        self._ends = self._run.to_hidden and tensor.name == self._last
        self._sum = (
            self._run.sum_over_hosts is not None
            and weight is not None
            and tensor_at(weight).name.endswith(_SUMMED)
            and bool(tensor.ne[1])
        )
        self._beside_asked = self._beside is not None and self._beside.before(node)
        matters = self._ends or self._sum
        self._script.saw(tensor.name, matters=matters)
        return matters or self._beside_asked

    def after(self, node: int) -> None:
        """Sum over hosts, or keep the last layer's output and end the graph."""
        if self._beside_asked and self._beside is not None:
            self._beside.after(node)
        if self._sum and self._run.sum_over_hosts is not None:
            self._run.sum_over_hosts(node_values(tensor_at(node)))
        if self._ends and self._tap is not None:
            self._rows.append(node_values(tensor_at(node)).copy())
            self._tap.end_graph()
