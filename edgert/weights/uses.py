"""Learns which weights a graph uses, where and how often, from a pass that computes nothing."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from edgert.errors import BackendError, Cancelled
from edgert.llama.context import LlamaContext
from edgert.llama.lib import GGML_OP_GET_ROWS_NAME, LlamaLibrary, TensorFields, tensor_at
from edgert.llama.part_graph import PartRun, last_node
from edgert.llama.tap import Tap

logger = logging.getLogger(__name__)

_LAST_STREAMABLE_SLOT = 1
_ROUTED_PRODUCT = b"MUL_MAT_ID"
_MOST_STEPS_TO_ROUTER = 10


@dataclass(slots=True)
class WeightUse:
    """How the graphs use one weight.

    Attributes:
        name: The tensor.
        order: Place of its first read among all weights.
        addresses: Its tensor structures; more than one when llama.cpp duplicated it.
        lookups: Whether rows of it are looked up by ids that are inputs of the graph.
        n_reads: Nodes of one graph that read it whole.
        viewed: Whether another tensor is a view of it, so that its address is known elsewhere.
        stays: Whether it cannot move: viewed, read by several nodes, or by an operand that the
            streamer does not watch.
        operation: The ggml operation that reads it whole.
        routed_by: Name of the node whose ids pick experts from it; empty for other weights, and
            where no single node has that name.
        router: The weight whose product those ids were chosen by, if there is one.
    """

    name: str
    order: int
    addresses: set[int] = field(default_factory=set)
    lookups: bool = False
    n_reads: int = 0
    viewed: bool = False
    stays: bool = False
    operation: bytes = b""
    routed_by: bytes = b""
    router: str = ""

    @property
    def rows_only(self) -> bool:
        """Whether nothing but looked-up rows is ever read."""
        return self.lookups and self.n_reads == 0 and not self.viewed


def record_uses(
    context: LlamaContext, tap: Tap, names: frozenset[str], part: PartRun | None = None
) -> dict[str, WeightUse]:
    """Run two graphs, of one token and of two, that stop before they compute.

    Args:
        context: Made with the tap's callback; its KV cache is empty afterwards.
        tap: Without an observer.
        names: Every tensor of the file.
        part: How a part of a model is run: hidden states enter, and it may end early.

    Returns:
        Uses by name, for the weights that any graph uses.

    Raises:
        BackendError: the graph reads weights in a way that cannot be followed.
    """
    end = last_node(context.model.n_layer) if part is not None and part.to_hidden else None
    recorder = _Recorder(context.model.library, names, end)
    tap.observer = recorder
    try:
        for n_tokens in (1, min(2, context.n_batch)):
            tap.begin()
            context.abort(stop=True)
            _decode_nothing(context, n_tokens, hidden=part is not None)
            context.abort(stop=False)
            tap.raise_error()
            recorder.end_graph()
            context.clear()
    finally:
        context.abort(stop=False)
        tap.observer = None
    if not recorder.uses:
        raise BackendError("llama.cpp's graph uses no weight of the file")
    if recorder.untold:
        logger.info(
            "%d stacks of experts are used whole, such as %s: no node's name says which are chosen",
            len(recorder.untold), min(recorder.untold),
        )  # fmt: skip
    return recorder.uses


def _decode_nothing(context: LlamaContext, n_tokens: int, *, hidden: bool) -> None:
    try:
        if hidden:
            context.decode_hidden(np.zeros((n_tokens, context.model.n_embd), np.float32), 0, 1)
        else:
            context.decode([context.model.vocab.bos or 0] * n_tokens, 0, 1)
    except Cancelled:
        return


class _Recorder:
    def __init__(
        self, library: LlamaLibrary, names: frozenset[str], end: bytes | None = None
    ) -> None:
        self._library = library
        self._end = end
        self._ended = False
        self._names = {name.encode(): name for name in names}
        self._reads: dict[str, int] = {}
        self._computed_lookups: set[str] = set()
        self._order = 0
        self._named: Counter[bytes] = Counter()
        self.uses: dict[str, WeightUse] = {}
        self.untold: set[str] = set()

    def before(self, node: int) -> bool:
        """Note the weights among a node's operands."""
        tensor = tensor_at(node)
        self._named[tensor.name] += 1
        operation = self._library.op_name(tensor.op)
        seen = []
        for slot, source in enumerate(tensor.src):
            if source is not None:
                for name, address, through_view in self._weights(source):
                    use = self._note(name, address)
                    use.viewed |= through_view or tensor.view_src == address
                    self._note_operand(use, tensor, operation, slot)
                    seen.append(use)
        for use in seen if len(seen) > 1 else ():
            use.stays = True  # the streamer has one weight in use at a time
        return False

    def after(self, node: int) -> None:
        """Nothing is computed."""

    def end_graph(self) -> None:
        """Add up what one graph reads."""
        self._ended = False
        for name, n_reads in self._reads.items():
            use = self.uses[name]
            use.n_reads = max(use.n_reads, n_reads)
            use.stays |= use.viewed or n_reads > 1
            # Ids may be an input or come from unnamed nodes, and may be computed anew for each use.
            if use.routed_by and (self._named[use.routed_by] != 1 or n_reads > 1):
                use.routed_by, use.router = b"", ""
                self.untold.add(name)
        self._reads.clear()
        self._named.clear()

    def _note(self, name: str, address: int) -> WeightUse:
        use = self.uses.setdefault(name, WeightUse(name, order=len(self.uses)))
        use.addresses.add(address)
        return use

    def _note_operand(
        self, use: WeightUse, tensor: TensorFields, operation: bytes, slot: int
    ) -> None:
        if operation == GGML_OP_GET_ROWS_NAME and slot == 0:
            if _ids_are_input(tensor) and use.name not in self._computed_lookups:
                use.lookups = True
                return
            self._computed_lookups.add(use.name)
            use.lookups, use.stays = False, True
        if use.name not in self._reads and use.n_reads == 0:
            self._order += 1
            use.order = self._order
        self._reads[use.name] = self._reads.get(use.name, 0) + 1
        use.operation = operation
        if operation == _ROUTED_PRODUCT and slot == 0 and tensor.src[2] is not None:
            use.routed_by = tensor_at(tensor.src[2]).name
            use.router = self._router_behind(tensor.src[2])
        use.stays |= slot > _LAST_STREAMABLE_SLOT

    def _router_behind(self, ids: int) -> str:
        """Walk from chosen ids back to the product they were chosen by; return its weight."""
        node: int | None = ids
        for _ in range(_MOST_STEPS_TO_ROUTER):
            if node is None:
                break
            tensor = tensor_at(node)
            first = tensor.src[0]
            if first is not None and self._library.op_name(tensor.op) == b"MUL_MAT":
                return next((name for name, _, _ in self._weights(first)), "")
            node = first
        return ""

    def _weights(self, source: int) -> Iterator[tuple[str, int, bool]]:
        tensor = tensor_at(source)
        if tensor.op != 0:
            return
        name = self._names.get(tensor.name)
        if name is not None and tensor.view_src is None:
            yield name, source, False
        elif tensor.view_src is not None:
            for found, address, _ in self._weights(tensor.view_src):
                yield found, address, True


def _ids_are_input(tensor: TensorFields) -> bool:
    if tensor.src[1] is None:
        return False
    ids = tensor_at(tensor.src[1])
    table = tensor_at(tensor.src[0] or tensor.src[1])
    flat = table.ne[2] == table.ne[3] == 1
    return bool(flat and ids.op == 0 and ids.view_src is None)
