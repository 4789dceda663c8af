"""Shapes of an ONNX graph: free dimensions get values, onnx infers the rest, reasons say what not.

onnx knows the standard operations; rules for contrib operations of ONNX Runtime that transformer
exports use, and for operations that were removed from the standard, are here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import GraphProto, ModelProto, NodeProto, TypeProto, ValueInfoProto, helper
from onnx.inliner import inline_local_functions

from edgert.errors import ConfigError, FormatError
from partition.onnx_folding import fold

Shape = tuple[int, ...]

_LARGEST_DIMENSION = 1 << 40
# Each round lets at least one more Reshape see its result; deep models have several a layer.
_FEWEST_ROUNDS, _MOST_ROUNDS = 8, 512
_MOST_VISITS = 2_000_000
# Results have the shape and type of the first input.
_SAME_SHAPE = frozenset(
    {("", "Affine"), ("", "ImageScaler"), ("", "ParametricSoftplus"), ("", "ScaledTanh")}
    | {("", "ThresholdedRelu"), ("com.microsoft", "Gelu"), ("com.microsoft", "FastGelu")}
    | {("com.microsoft", "BiasGelu"), ("com.microsoft", "QuickGelu")}
    | {("com.microsoft", "SkipLayerNormalization"), ("com.microsoft", "RotaryEmbedding")}
    | {("com.microsoft", "SkipSimplifiedLayerNormalization"), ("com.microsoft", "BiasSplitGelu")}
    | {("com.microsoft", "SimplifiedLayerNormalization"), ("com.microsoft", "QLinearAdd")}
    | {("com.microsoft", "QLinearSigmoid"), ("com.microsoft", "QLinearLeakyRelu")}
    | {("com.microsoft", "QuantizeLinear"), ("com.microsoft", "MultiHeadAttention")}
    | {("com.microsoft", "GroupQueryAttention")}
)
# The place of a further result with the shape of the first: the sum before it was normalised.
_ALIKE = {
    "EmbedLayerNormalization": 2,
    "SkipLayerNormalization": 3,
    "SkipSimplifiedLayerNormalization": 3,
}


GIVEN = "given"


@dataclass(frozen=True, slots=True)
class Assumption:
    """A dimension that the file leaves open, and what it was taken to be."""

    dimension: str
    value: int
    reason: str


def with_shapes(
    path: Path, model: ModelProto, dimensions: Mapping[str, int]
) -> tuple[ModelProto, tuple[Assumption, ...]]:
    """Inline functions, give free dimensions values, and infer every shape that can be.

    Args:
        path: For messages.
        model: Checked by `partition.onnx_file`.
        dimensions: Values by the name of a symbolic dimension, or `input:axis` for one without.

    Raises:
        ConfigError: a dimension that the model does not have, or one below 1.
        FormatError: shapes that contradict each other.
    """
    try:
        if model.functions:
            model = inline_local_functions(model)
        assumptions = _assume(model, dimensions)
        n_nodes = max(1, len(model.graph.node))
        for _ in range(max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, _MOST_VISITS // n_nodes))):
            # Not with `data_prop`: it would hold every list of integers that a graph describes,
            # and a few nodes describe more than any memory has.
            model = onnx.shape_inference.infer_shapes(model)
            known = _apply_rules(model.graph)
            if not fold(model, _known_shapes(model.graph)) and not known:
                break
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        raise FormatError(f"shapes cannot be inferred: {_first_line(error)}", path=path) from error
    except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as error:
        raise FormatError(f"malformed graph: {_first_line(error)}", path=path) from error
    return model, assumptions


def shape_of(value: TypeProto) -> tuple[Shape | None, str]:
    """Return a shape, or None and why it is not known."""
    if not value.HasField("tensor_type"):
        return None, f"a {value.WhichOneof('value') or 'value without type'}, no tensor"
    if not value.tensor_type.HasField("shape"):
        return None, "its shape depends on data, or on an operation without a rule"
    dims = []
    for axis, dim in enumerate(value.tensor_type.shape.dim):
        if dim.WhichOneof("value") != "dim_value" or dim.dim_value < 0:
            return None, f"dimension {axis} is open" + (f" ({dim.dim_param})" * bool(dim.dim_param))
        dims.append(dim.dim_value)
    return tuple(dims), ""


def _assume(model: ModelProto, dimensions: Mapping[str, int]) -> tuple[Assumption, ...]:
    for name, length in dimensions.items():
        if not 1 <= length <= _LARGEST_DIMENSION:
            raise ConfigError(f"dimension {name} is {length}, wanted 1 to {_LARGEST_DIMENSION:,}")
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    for value in model.graph.input:
        if (default := weights.get(value.name)) is not None:
            described = helper.make_tensor_value_info("", default.data_type, default.dims)
            value.type.CopyFrom(described.type)
    inputs = [value for value in model.graph.input if value.name not in weights]
    taken: dict[str, Assumption] = {}
    for value in inputs:
        if not value.type.HasField("tensor_type") or not value.type.tensor_type.HasField("shape"):
            continue
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_value > 0:
                continue
            name = dim.dim_param or f"{value.name}:{axis}"
            stated = dimensions.get(name)
            reason = GIVEN if stated is not None else "open in the file, taken as 1"
            taken[name] = Assumption(name, 1 if stated is None else stated, reason)
            dim.dim_value = taken[name].value
    unknown = [name for name in dimensions if name not in taken]
    if unknown:
        raise ConfigError(
            f"the model has no open dimension {unknown[0]!r}",
            hint=f"open are: {', '.join(taken) or 'none'}",
        )
    _resolve((*model.graph.value_info, *model.graph.output), taken)
    return tuple(taken.values())


def _resolve(values: Iterable[ValueInfoProto], taken: Mapping[str, Assumption]) -> None:
    """Write values in place of names; open dimensions without one stay open."""
    for value in values:
        if value.type.HasField("tensor_type") and value.type.tensor_type.HasField("shape"):
            for dim in value.type.tensor_type.shape.dim:
                if dim.dim_param in taken:
                    dim.dim_value = taken[dim.dim_param].value


def _known(graph: GraphProto) -> dict[str, tuple[int, Shape]]:
    """Return type and shape of what has both."""
    known: dict[str, tuple[int, Shape]] = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        shape, _ = shape_of(value.type)
        if shape is not None:
            known[value.name] = (value.type.tensor_type.elem_type, shape)
    return known | {t.name: (t.data_type, tuple(t.dims)) for t in graph.initializer}


def _known_shapes(graph: GraphProto) -> dict[str, Shape]:
    return {name: shape for name, (_, shape) in _known(graph).items()}


def _apply_rules(graph: GraphProto) -> bool:
    """Add shapes of operations that onnx has no rule for; True when there were new ones."""
    known = _known(graph)
    added = False
    for node in graph.node:
        first = known.get(node.input[0]) if node.input else None
        if first is None or not node.output or node.output[0] in known:
            continue
        shape = _shape_by_rule(node, [known.get(name, (0, None))[1] for name in node.input])
        if shape is None:
            continue
        element = 1 if node.op_type == "EmbedLayerNormalization" else first[0]
        alike = [node.output[0], *node.output[_ALIKE.get(node.op_type, len(node.output)) :][:1]]
        for name in filter(None, alike):
            _describe(graph, name, element, shape)
            known[name] = (element, shape)
        added = True
    return added


def _describe(graph: GraphProto, name: str, element: int, shape: Shape) -> None:
    """State type and shape of a result."""
    stale = [i for i, value in enumerate(graph.value_info) if value.name == name]
    for index in reversed(stale):
        del graph.value_info[index]
    described = helper.make_tensor_value_info(name, element, shape)
    outputs = [value for value in graph.output if value.name == name]
    if outputs:
        outputs[0].CopyFrom(described)
    else:
        graph.value_info.append(described)


def _shape_by_rule(node: NodeProto, shapes: list[Shape | None]) -> Shape | None:
    operation, first = (node.domain, node.op_type), shapes[0]
    if first is None:
        return None
    if operation in _SAME_SHAPE:
        return first
    if operation == ("com.microsoft", "Attention") and len(shapes) > 2 and shapes[2]:
        return (*first[:-1], shapes[2][0] // 3)  # the bias is that of queries, keys and values
    if operation == ("com.microsoft", "EmbedLayerNormalization") and len(shapes) > 2 and shapes[2]:
        return (*first, shapes[2][-1])
    if operation in {("com.microsoft", "FusedMatMul"), ("com.microsoft", "MatMulNBits")}:
        return _product_shape(node, shapes)
    if operation == ("", "Crop") and len(first) == 4:
        border = next((list(a.ints) for a in node.attribute if a.name == "border"), [])
        if len(border) == 4:
            left, top, right, bottom = border
            cropped = (*first[:2], first[2] - top - bottom, first[3] - left - right)
            return cropped if min(cropped) >= 0 else None
    return None


def _product_shape(node: NodeProto, shapes: list[Shape | None]) -> Shape | None:
    first, second = shapes[0], shapes[1] if len(shapes) > 1 else None
    numbers = {attribute.name: attribute.i for attribute in node.attribute}
    if first and node.op_type == "MatMulNBits" and numbers.get("N", 0) > 0:
        return (*first[:-1], numbers["N"])
    plain = not any(numbers.get(key) for key in ("transA", "transBatchA", "transBatchB"))
    if first and second and len(second) == 2 and plain:
        return (*first[:-1], second[0] if numbers.get("transB") else second[1])
    return None


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__
