"""Computes the arithmetic on shapes inside an ONNX graph, so that more shapes can be inferred.

Exporters compute sizes with ordinary nodes on short lists of integers. Where all inputs of such a
node are known, onnx's reference implementation computes it and its result replaces it.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from math import prod

import numpy as np
from numpy.typing import NDArray
from onnx import GraphProto, ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = NDArray[np.generic]
Shape = tuple[int, ...]

_MOST_ELEMENTS = 1024
_LARGEST_INTEGER = 2**63 - 1
_FOLDED = frozenset(
    {"Abs", "Add", "And", "Cast", "Ceil", "Concat", "ConstantOfShape", "Div", "Equal", "Expand"}
    | {"Flatten", "Floor", "Gather", "Greater", "GreaterOrEqual", "Identity", "Less", "LessOrEqual"}
    | {"Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Range", "ReduceMax", "ReduceMin"}
    | {"ReduceProd", "ReduceSum", "Reshape", "ScatterND", "Shape", "Size", "Slice", "Split", "Sqrt"}
    | {"Squeeze", "Sub", "Transpose", "Unsqueeze", "Where"}
)  # fmt: skip
# Results are as long as their inputs together, or shorter.
_NO_BROADCAST = frozenset(
    {"Cast", "Concat", "Flatten", "Gather", "Identity", "ReduceMax", "ReduceMin", "ReduceProd"}
    | {"ReduceSum", "Reshape", "ScatterND", "Shape", "Size", "Slice", "Split", "Squeeze"}
    | {"Transpose", "Unsqueeze"}
)  # fmt: skip
# The evaluator raises whatever NumPy raises for operands that do not fit.
_EVALUATION_ERRORS = (
    ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError, ArithmeticError,
    Warning,
)  # fmt: skip


def fold(model: ModelProto, shapes: Mapping[str, Shape]) -> bool:
    """Replace nodes of the main graph by their values where these are known; True if any was.

    Args:
        model: Changed in place.
        shapes: Of the tensors whose shape is known.
    """
    versions = [(entry.domain, entry.version) for entry in model.opset_import if not entry.domain]
    values = _constants(model.graph)
    folded = False
    for node in model.graph.node:
        if node.op_type not in _FOLDED or node.domain or len(node.output) != 1:
            continue
        result = _value(node, values, shapes, versions)
        if result is None:
            continue
        name = node.output[0]
        values[name] = result
        label = node.name
        node.Clear()
        node.CopyFrom(
            helper.make_node(
                "Constant", [], [name], name=label, value=numpy_helper.from_array(result, name)
            )
        )
        folded = True
    return folded


def _constants(graph: GraphProto) -> dict[str, Array]:
    """Return short constants and initializers that still have their data."""
    found = [(tensor.name, tensor) for tensor in graph.initializer]
    for node in graph.node:
        if node.op_type == "Constant" and len(node.attribute) == 1 and len(node.output) == 1:
            attribute = node.attribute[0]
            if attribute.name == "value" and attribute.HasField("t"):
                found.append((node.output[0], attribute.t))
    values: dict[str, Array] = {}
    for name, tensor in found:
        external = tensor.data_location == tensor.EXTERNAL
        if external or tensor.data_type == tensor.STRING or prod(tensor.dims) > _MOST_ELEMENTS:
            continue
        values[name] = numpy_helper.to_array(tensor)
    return values


def _value(
    node: NodeProto,
    values: Mapping[str, Array],
    shapes: Mapping[str, Shape],
    versions: Sequence[tuple[str, int]],
) -> Array | None:
    names = [name for name in node.input if name]
    if node.op_type in ("Shape", "Size"):
        return _measure(node, shapes)
    if any(name not in values for name in names):
        return None
    inputs = {name: values[name] for name in names}
    if _result_elements(node, [inputs[name] for name in names]) > _MOST_ELEMENTS:
        return None
    graph = helper.make_graph(
        [node],
        "folded",
        [helper.make_value_info(name, helper.make_tensor_type_proto(0, None)) for name in inputs],
        [helper.make_value_info(node.output[0], helper.make_tensor_type_proto(0, None))],
    )
    imports = [helper.make_opsetid(domain, version) for domain, version in versions]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            evaluator = ReferenceEvaluator(helper.make_model(graph, opset_imports=imports))
            (made,) = list(evaluator.run(None, inputs))
            result = np.asarray(made)
    except _EVALUATION_ERRORS:
        return None  # stays a node with an unknown shape
    return result if result.size <= _MOST_ELEMENTS and result.dtype.kind in "biuf" else None


def _measure(node: NodeProto, shapes: Mapping[str, Shape]) -> Array | None:
    """Compute Shape and Size, which look at no value."""
    shape = shapes.get(node.input[0]) if node.input else None
    if shape is None:
        return None
    if node.op_type == "Size":
        n_elements = prod(shape)
        return np.array(n_elements, np.int64) if n_elements <= _LARGEST_INTEGER else None
    bounds = {attribute.name: attribute.i for attribute in node.attribute}
    return np.array(shape[bounds.get("start", 0) : bounds.get("end", len(shape))], np.int64)


def _result_elements(node: NodeProto, inputs: Sequence[Array]) -> float:
    """Bound the size of what a node would make, before it makes it."""
    if node.op_type == "ConstantOfShape" and inputs:
        return float(np.prod(np.abs(inputs[0].astype(np.float64)), initial=1.0))
    if node.op_type == "Expand" and len(inputs) == 2:
        return inputs[0].size * float(np.prod(np.abs(inputs[1].astype(np.float64)), initial=1.0))
    if node.op_type == "Range" and len(inputs) == 3 and all(i.size == 1 for i in inputs):
        start, limit, step = (float(value.astype(np.float64).reshape(-1)[0]) for value in inputs)
        return abs((limit - start) / step) if step else _MOST_ELEMENTS + 1
    # Operands are short; broadcasting makes at most the product of their lengths.
    sizes = [value.size for value in inputs]
    return 0 if node.op_type in _NO_BROADCAST else prod(sizes)
