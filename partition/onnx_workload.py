"""Work of an ONNX model: operations and weights of its nodes, and where it may be cut.

A cut is a point between two nodes in topological order. It is legal when every tensor that crosses
it has a known size. Units are the runs of nodes between the cuts that were chosen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import FormatError
from partition.onnx_file import external_files, load_model
from partition.onnx_flops import MOVES, UnknownWork, node_flops
from partition.onnx_graph import build_graph
from partition.onnx_model import OnnxGraph, OnnxNode, OnnxTensor, OnnxWeight
from partition.onnx_shapes import GIVEN, Assumption, with_shapes

Shape = tuple[int, ...]
_LOOKUPS = frozenset({"Gather", "EmbedLayerNormalization"})


@dataclass(frozen=True, slots=True)
class NodeWork:
    """What one node costs.

    Attributes:
        name: Of the node.
        op_type: Its operation.
        flops: Operations; None when they cannot be counted, and `why_unknown` says why.
        weights: Names of the weights it reads, those of its subgraphs among them.
        product_type: Element type of the weight it multiplies by; None for nodes without.
        lookup_bytes: Bytes of single rows that it reads of a table, in place of the whole table.
        why_unknown: See `flops`.
        outputs: Names of its results.
    """

    name: str
    op_type: str
    flops: int | None
    weights: tuple[str, ...]
    product_type: str | None
    lookup_bytes: int | None
    why_unknown: str = ""
    outputs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Cut:
    """A point between two nodes.

    Attributes:
        position: Nodes before it, 1 to n - 1.
        tensors: What is made or fed before and needed after, by name.
        size_bytes: Of all of them; None when one is unknown, which makes the cut illegal.
        why_illegal: Empty for legal cuts.
    """

    position: int
    tensors: tuple[str, ...]
    size_bytes: int | None
    why_illegal: str = ""


@dataclass(frozen=True, slots=True)
class OnnxWorkload:
    """A model as work.

    Attributes:
        path: The file.
        nodes: In topological order.
        weights: Initializers and constants by name, those of subgraphs among them.
        tensors: Inputs and results by name.
        inputs: What is fed.
        outputs: What is returned.
        cuts: Every point between two nodes, illegal ones too.
        live_bytes: While each node runs: its inputs, its results, and what waits for later nodes;
            None where a size is unknown.
        assumptions: Dimensions that the file leaves open.
        external: Files with weights, relative to the folder of `path`.
    """

    path: Path
    nodes: tuple[NodeWork, ...]
    weights: Mapping[str, OnnxWeight]
    tensors: Mapping[str, OnnxTensor]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    cuts: tuple[Cut, ...]
    live_bytes: tuple[int | None, ...]
    assumptions: tuple[Assumption, ...]
    external: tuple[str, ...] = ()

    @property
    def weight_bytes(self) -> int:
        """Bytes of all initializers, sparse ones with their indices, constants left out."""
        return sum(w.size_bytes for w in self.weights.values() if not w.constant)

    @property
    def constant_bytes(self) -> int:
        """Bytes of the values of Constant nodes."""
        return sum(w.size_bytes for w in self.weights.values() if w.constant)

    @property
    def flops(self) -> int:
        """Operations of all nodes that can be counted; see `unknown` for the others."""
        return sum(node.flops or 0 for node in self.nodes)

    @property
    def unknown(self) -> tuple[tuple[str, str], ...]:
        """Nodes whose operations are not known, with the reason."""
        return tuple((node.name, node.why_unknown) for node in self.nodes if node.flops is None)

    @property
    def open_dimensions(self) -> tuple[Assumption, ...]:
        """Dimensions that neither the file nor the caller fixes."""
        return tuple(item for item in self.assumptions if item.reason != GIVEN)

    @property
    def legal_cuts(self) -> tuple[Cut, ...]:
        """Points where the model may be cut."""
        return tuple(cut for cut in self.cuts if cut.size_bytes is not None)

    def peak_bytes(self, first: int, end: int) -> int | None:
        """Return the most activations alive while nodes [first, end) run; None when unknown."""
        sizes = self.live_bytes[first:end]
        known = [size for size in sizes if size is not None]
        return max(known, default=0) if len(known) == len(sizes) else None


def describe_onnx(path: Path | str, dimensions: Mapping[str, int] | None = None) -> OnnxWorkload:
    """Read an ONNX model and count its work.

    Args:
        path: The file; external data is looked up beside it and sized, never loaded.
        dimensions: Values of open dimensions by name, or by `input:axis`; others are taken as 1,
            which `assumptions` records.

    Raises:
        ConfigError: no such file, or a dimension that the model does not have.
        FormatError: the model is malformed; names node or tensor.
    """
    path = Path(path)
    loaded = load_model(path)
    external = external_files(loaded)
    model, assumptions = with_shapes(path, loaded, dimensions or {})
    graph = build_graph(path, model.graph)
    if not graph.nodes and not graph.outputs:
        raise FormatError("the graph has neither nodes nor outputs", path=path)
    weights = dict(graph.weights)
    nodes = tuple(_node_work(node, graph, weights) for node in graph.nodes)
    cuts, live_bytes = _cuts(graph)
    return OnnxWorkload(
        path=path,
        nodes=nodes,
        weights=weights,
        tensors=graph.tensors,
        inputs=graph.inputs,
        outputs=graph.outputs,
        cuts=cuts,
        live_bytes=live_bytes,
        assumptions=assumptions,
        external=external,
    )


def _node_work(node: OnnxNode, graph: OnnxGraph, weights: dict[str, OnnxWeight]) -> NodeWork:
    shapes: dict[str, Shape | None] = {}
    _add_shapes(shapes, graph)
    why = ""
    flops: int | None = None
    try:
        flops = _flops(node, shapes)
    except UnknownWork as error:
        why = str(error)
    read = [name for name in node.needed if name in graph.weights]
    for attribute, inner in node.subgraphs:
        read += _inner_weights(f"{node.name}/{attribute}", inner, weights)
    multiplied = _multiplied(node, graph)
    lookup_bytes = None
    if node.op_type in _LOOKUPS and read and node.outputs[0] in graph.tensors:
        lookup_bytes = graph.tensors[node.outputs[0]].size_bytes
    return NodeWork(
        name=node.name,
        op_type=node.op_type,
        flops=flops,
        weights=tuple(dict.fromkeys(read)),
        product_type=multiplied.type_name if multiplied else None,
        lookup_bytes=lookup_bytes,
        why_unknown=why,
        outputs=tuple(name for name in node.outputs if name),
    )


def _flops(node: OnnxNode, shapes: Mapping[str, Shape | None]) -> int:
    if node.subgraphs:
        return _control_flops(node, shapes)
    inputs = [shapes.get(name) if name else None for name in node.inputs]
    outputs = [shapes.get(name) if name else None for name in node.outputs]
    return node_flops(node, inputs, outputs)


def _control_flops(node: OnnxNode, shapes: Mapping[str, Shape | None]) -> int:
    """Count the dearer branch of an If; how often a loop turns is in no shape."""
    if node.op_type != "If":
        raise UnknownWork(f"how often a {node.op_type} repeats is not in the file")
    branches = []
    for _, graph in node.subgraphs:
        inner = dict(shapes)
        _add_shapes(inner, graph)
        branches.append(sum(_flops(child, inner) for child in graph.nodes))
    return max(branches)


def _add_shapes(shapes: dict[str, Shape | None], graph: OnnxGraph) -> None:
    shapes.update((name, tensor.shape) for name, tensor in graph.tensors.items())
    shapes.update((name, weight.shape) for name, weight in graph.weights.items())


def _inner_weights(scope: str, graph: OnnxGraph, weights: dict[str, OnnxWeight]) -> list[str]:
    """Add the weights of a subgraph under names of their own; return these."""
    names = [f"{scope}/{name}" for name in graph.weights]
    weights.update(zip(names, graph.weights.values(), strict=True))
    for node in graph.nodes:
        for attribute, inner in node.subgraphs:
            names += _inner_weights(f"{scope}/{node.name}/{attribute}", inner, weights)
    return names


def _multiplied(node: OnnxNode, graph: OnnxGraph) -> OnnxWeight | None:
    """Return the largest weight of a node that does arithmetic."""
    if node.op_type in MOVES:
        return None
    found = [graph.weights[name] for name in node.needed if name in graph.weights]
    return max(found, key=lambda weight: weight.size_bytes, default=None)


def _cuts(graph: OnnxGraph) -> tuple[tuple[Cut, ...], tuple[int | None, ...]]:
    """Walk through the nodes with the set of tensors that later nodes need."""
    last_use = dict.fromkeys(graph.tensors, -1)
    for index, node in enumerate(graph.nodes):
        for name in node.needed:
            if name in last_use:
                last_use[name] = index
    leaving: dict[int, list[str]] = {}
    for name, index in last_use.items():
        leaving.setdefault(index, []).append(name)
    crossing = _Crossing(graph)
    for name in graph.inputs:
        if last_use[name] >= 0:
            crossing.add(name)
    kept = set(graph.outputs)
    cuts: list[Cut] = []
    live: list[int | None] = []
    finished = _Crossing(graph)  # results that wait in memory to be returned
    for index, node in enumerate(graph.nodes):
        made = [name for name in node.outputs if name in graph.tensors]
        for name in made:
            crossing.add(name)
        live.append(crossing.plus(finished))
        for name in leaving.get(index, []):
            crossing.remove(name)
        for name in made:
            if last_use[name] < 0:
                crossing.remove(name)
            if name in kept:
                finished.add(name)
        if index + 1 < len(graph.nodes):
            cuts.append(crossing.cut(index + 1))
    return tuple(cuts), tuple(live)


class _Crossing:
    """Tensors on the way from one node to later ones, and what they weigh together."""

    def __init__(self, graph: OnnxGraph) -> None:
        self._tensors = graph.tensors
        self._names: dict[str, None] = {}
        self._unknown: dict[str, None] = {}
        self._size_bytes = 0

    def add(self, name: str) -> None:
        size = self._tensors[name].size_bytes
        self._names[name] = None
        if size is None:
            self._unknown[name] = None
        else:
            self._size_bytes += size

    def remove(self, name: str) -> None:
        if name not in self._names:
            return
        del self._names[name]
        size = self._tensors[name].size_bytes
        if size is None:
            del self._unknown[name]
        else:
            self._size_bytes -= size

    def plus(self, other: _Crossing) -> int | None:
        if self._unknown or other._unknown:
            return None
        twice = sum(self._tensors[n].size_bytes or 0 for n in other._names if n in self._names)
        return self._size_bytes + other._size_bytes - twice

    def cut(self, position: int) -> Cut:
        names = tuple(self._names)
        if not self._unknown:
            return Cut(position, names, self._size_bytes)
        tensor = self._tensors[next(iter(self._unknown))]
        why = f"size of {tensor.name!r} is unknown: {tensor.why_unknown or tensor.type_name}"
        return Cut(position, names, None, why)
