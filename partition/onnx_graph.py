"""Turns an ONNX model with inferred shapes into `OnnxGraph`: in order, every name resolved."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping
from pathlib import Path

from onnx import AttributeProto, GraphProto, NodeProto, TensorProto, ValueInfoProto

from edgert.errors import FormatError
from partition.onnx_file import node_label, subgraphs
from partition.onnx_model import (
    ELEMENT_BITS,
    TYPE_NAMES,
    Attribute,
    OnnxGraph,
    OnnxNode,
    OnnxTensor,
    OnnxWeight,
    tensor_bytes,
)
from partition.onnx_shapes import shape_of

_CONSTANT_LISTS = {"value_ints": "i64", "value_floats": "f32"}
_CONSTANT_SCALARS = {"value_int": "i64", "value_float": "f32"}


def build_graph(path: Path, graph: GraphProto, outside: frozenset[str] = frozenset()) -> OnnxGraph:
    """Sort the nodes, resolve every name, and take out constants.

    Args:
        path: For messages.
        graph: Of a model, or a subgraph.
        outside: Names that the graph around a subgraph offers.

    Raises:
        FormatError: a name that nothing makes, made twice, or nodes that wait for each other.
    """
    weights = {tensor.name: _weight(tensor.name, tensor) for tensor in graph.initializer}
    for sparse in graph.sparse_initializer:
        parts = [_weight(sparse.values.name, t) for t in (sparse.values, sparse.indices)]
        size = sum(part.size_bytes for part in parts)
        name = sparse.values.name
        weights[name] = OnnxWeight(name, parts[0].type_name, tuple(sparse.dims), size)
    inputs = tuple(value.name for value in graph.input if value.name not in weights)
    nodes: list[NodeProto] = []
    for node in graph.node:
        constant = _constant(node) if node.op_type == "Constant" and not node.domain else None
        if constant is None:
            nodes.append(node)
        else:
            _check_new(path, node, constant.name, weights)
            weights[constant.name] = constant
    made = _producers(path, nodes, {*weights, *inputs})
    names = frozenset({*weights, *inputs, *made})
    parsed = [_node(path, node, i, names | outside) for i, node in enumerate(nodes)]
    known = names | outside
    for item in parsed:
        missing = [name for name in item.needed if name not in known]
        if missing:
            raise FormatError(
                f"node {item.name} reads {missing[0]!r}, which nothing makes", path=path
            )
    outputs = tuple(value.name for value in graph.output)
    lost = [name for name in outputs if name not in known]
    if lost:
        raise FormatError(f"output {lost[0]!r} is made by no node", path=path)
    described = {v.name: v for v in (*graph.input, *graph.value_info, *graph.output)}
    tensors = {name: _tensor(name, described.get(name)) for name in (*inputs, *made)}
    return OnnxGraph(_sorted(path, parsed, made), tensors, weights, inputs, outputs)


def _producers(path: Path, nodes: Iterable[NodeProto], given: set[str]) -> dict[str, int]:
    """Return which node makes each name."""
    made: dict[str, int] = {}
    for index, node in enumerate(nodes):
        for name in filter(None, node.output):
            if name in made or name in given:
                raise FormatError(f"node {node_label(node)} makes {name!r} again", path=path)
            made[name] = index
    return made


def _check_new(path: Path, node: NodeProto, name: str, weights: Mapping[str, OnnxWeight]) -> None:
    if name in weights:
        raise FormatError(f"node {node_label(node)} makes {name!r} again", path=path)


def _sorted(path: Path, nodes: list[OnnxNode], made: Mapping[str, int]) -> tuple[OnnxNode, ...]:
    """Order nodes by what they wait for, otherwise as in the file."""
    waits = [{made[name] for name in node.needed if name in made} for node in nodes]
    readers: list[list[int]] = [[] for _ in nodes]
    for index, sources in enumerate(waits):
        for source in sources:
            readers[source].append(index)
    open_counts = [len(sources) for sources in waits]
    ready = [index for index, count in enumerate(open_counts) if not count]
    order: list[int] = []
    while ready:
        index = heapq.heappop(ready)
        order.append(index)
        for reader in readers[index]:
            open_counts[reader] -= 1
            if not open_counts[reader]:
                heapq.heappush(ready, reader)
    if len(order) < len(nodes):
        stuck = next(nodes[i] for i, count in enumerate(open_counts) if count)
        raise FormatError(f"node {stuck.name} waits for its own result: a cycle", path=path)
    return tuple(nodes[index] for index in order)


def _node(path: Path, node: NodeProto, index: int, names: frozenset[str]) -> OnnxNode:
    inner = tuple((name, build_graph(path, graph, names)) for name, graph in subgraphs(node))
    captured = sorted(
        {
            name
            for _, graph in inner
            for name in _wanted(graph)
            if name in names and name not in graph.tensors and name not in graph.weights
        }
    )
    return OnnxNode(
        name=node.name or f"{node.op_type}_{index}",
        op_type=node.op_type,
        domain="" if node.domain == "ai.onnx" else node.domain,
        inputs=tuple(node.input),
        outputs=tuple(node.output),
        attributes=_attributes(node),
        captured=tuple(captured),
        subgraphs=inner,
    )


def _wanted(graph: OnnxGraph) -> Iterable[str]:
    yield from graph.outputs
    for node in graph.nodes:
        yield from node.needed


def _attributes(node: NodeProto) -> dict[str, Attribute]:
    found: dict[str, Attribute] = {}
    for attribute in node.attribute:
        match attribute.type:
            case AttributeProto.INT:
                found[attribute.name] = attribute.i
            case AttributeProto.INTS:
                found[attribute.name] = tuple(attribute.ints)
            case AttributeProto.FLOAT:
                found[attribute.name] = attribute.f
            case AttributeProto.STRING:
                found[attribute.name] = attribute.s.decode("utf-8", "replace")
            case _:
                pass
    return found


def _weight(name: str, tensor: TensorProto) -> OnnxWeight:
    type_name = TYPE_NAMES[tensor.data_type]
    shape = tuple(tensor.dims)
    if type_name in ELEMENT_BITS:
        size = tensor_bytes(type_name, shape)
    else:
        size = sum(len(text) for text in tensor.string_data)
    return OnnxWeight(name, type_name, shape, size)


def _constant(node: NodeProto) -> OnnxWeight | None:
    """Return the value of a Constant node; None for kinds that are none of a weight's."""
    if len(node.output) != 1 or len(node.attribute) != 1:
        return None
    attribute, name = node.attribute[0], node.output[0]
    if attribute.name == "value" and attribute.type == AttributeProto.TENSOR:
        found = _weight(name, attribute.t)
        return OnnxWeight(name, found.type_name, found.shape, found.size_bytes, constant=True)
    if attribute.name in _CONSTANT_SCALARS:
        type_name = _CONSTANT_SCALARS[attribute.name]
        return OnnxWeight(name, type_name, (), tensor_bytes(type_name, ()), constant=True)
    if attribute.name in _CONSTANT_LISTS:
        type_name = _CONSTANT_LISTS[attribute.name]
        shape = (len(attribute.ints) + len(attribute.floats),)
        return OnnxWeight(name, type_name, shape, tensor_bytes(type_name, shape), constant=True)
    return None


def _tensor(name: str, described: ValueInfoProto | None) -> OnnxTensor:
    if described is None:
        why = "its shape depends on data, or on an operation without a rule"
        return OnnxTensor(name, None, None, why)
    shape, why = shape_of(described.type)
    code = described.type.tensor_type.elem_type if described.type.HasField("tensor_type") else 0
    type_name = TYPE_NAMES.get(code)
    if type_name is None and not why:
        why = "its type is unknown"
    return OnnxTensor(name, type_name, shape if type_name else None, why)
