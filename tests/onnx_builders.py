"""Small ONNX models, and ways to write them to files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

OPSET = 17
Dims = Sequence[int | str | None]


def weight(name: str, *shape: int, dtype: type[np.generic] = np.float32) -> TensorProto:
    values: NDArray[np.generic] = np.zeros(shape, dtype)
    return numpy_helper.from_array(values, name)


def integers(name: str, *values: int) -> TensorProto:
    return numpy_helper.from_array(np.array(values, np.int64), name)


def model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, Dims],
    outputs: Sequence[str],
    weights: Sequence[TensorProto] = (),
    domains: dict[str, int] | None = None,
) -> ModelProto:
    """Return a model with float inputs; outputs without shapes."""
    graph = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, dims) for n, dims in inputs.items()],
        [helper.make_value_info(name, helper.make_tensor_type_proto(1, None)) for name in outputs],
        list(weights),
    )
    imports = [helper.make_opsetid(d, v) for d, v in (domains or {"": OPSET}).items()]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


def write(built: ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    path.write_bytes(built.SerializeToString())
    return path


def externalised(built: ModelProto, folder: Path, name: str, **entries: str) -> Path:
    """Move one initializer's data to `weights.bin`, with entries of its reference replaced."""
    for tensor in built.graph.initializer:
        if tensor.name == name:
            data = tensor.raw_data
            (folder / "weights.bin").write_bytes(b"head" + data)
            tensor.ClearField("raw_data")
            stated = {"location": "weights.bin", "offset": "4", "length": str(len(data))}
            for key, value in (stated | entries).items():
                tensor.external_data.append(onnx.StringStringEntryProto(key=key, value=value))
            tensor.data_location = TensorProto.EXTERNAL
    return write(built, folder)


def small_network() -> ModelProto:
    """Convolution, activation, pooling over everything, and a product."""
    nodes = [
        helper.make_node("Conv", ["x", "w", "b"], ["c"], name="conv", kernel_shape=[3, 3]),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        helper.make_node("GlobalAveragePool", ["r"], ["p"], name="pool"),
        helper.make_node("Flatten", ["p"], ["f"], name="flatten"),
        helper.make_node("Gemm", ["f", "m", "n"], ["y"], name="gemm", transB=1),
    ]
    weights = [weight("w", 8, 3, 3, 3), weight("b", 8), weight("m", 10, 8), weight("n", 10)]
    return model(nodes, {"x": ["batch", 3, 12, 12]}, ["y"], weights)
