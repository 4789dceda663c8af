"""Operations of ONNX nodes, counted by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from onnx import NodeProto, TensorProto, helper

from onnx_builders import Dims, model, weight, write
from partition.onnx_workload import OnnxWorkload, describe_onnx


def described(
    folder: Path,
    node: NodeProto,
    inputs: dict[str, Dims],
    weights: Sequence[TensorProto] = (),
    domains: dict[str, int] | None = None,
) -> OnnxWorkload:
    built = model([node], inputs, [node.output[0]], weights, domains)
    return describe_onnx(write(built, folder))


def test_convolution(tmp_path: Path) -> None:
    # 16 x 10 x 10 results, each over 8 channels and 3 x 3: 2 x 1600 x 72, and 1600 bias additions.
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"])
    workload = described(
        tmp_path, node, {"x": [1, 8, 12, 12]}, [weight("w", 16, 8, 3, 3), weight("b", 16)]
    )
    assert workload.flops == 2 * 1600 * 72 + 1600
    assert workload.weight_bytes == 4 * (16 * 8 * 9 + 16)


def test_grouped_convolution_with_stride_and_padding(tmp_path: Path) -> None:
    # Depthwise: one channel a group. Side (12 + 2 - 3) // 2 + 1 = 6: 2 x 8 x 36 x 9, two images.
    node = helper.make_node("Conv", ["x", "w"], ["y"], group=8, strides=[2, 2], pads=[1, 1, 1, 1])
    workload = described(tmp_path, node, {"x": [2, 8, 12, 12]}, [weight("w", 8, 1, 3, 3)])
    assert workload.flops == 2 * 2 * 8 * 36 * 9


def test_transposed_convolution(tmp_path: Path) -> None:
    # Each of 8 x 5 x 5 inputs is spread over 4 channels and 2 x 2.
    node = helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2])
    workload = described(tmp_path, node, {"x": [1, 8, 5, 5]}, [weight("w", 8, 4, 2, 2)])
    assert workload.flops == 2 * 8 * 25 * 16


@pytest.mark.parametrize(("trans_a", "trans_b"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_gemm_in_every_orientation(tmp_path: Path, trans_a: int, trans_b: int) -> None:
    # (5 x 7) by (7 x 11), 55 additions of the bias.
    node = helper.make_node("Gemm", ["x", "w", "b"], ["y"], transA=trans_a, transB=trans_b)
    inputs: dict[str, Dims] = {"x": [7, 5] if trans_a else [5, 7]}
    weights = [weight("w", *((11, 7) if trans_b else (7, 11))), weight("b", 11)]
    assert described(tmp_path, node, inputs, weights).flops == 2 * 5 * 7 * 11 + 55


def test_batched_product_with_broadcast(tmp_path: Path) -> None:
    # 2 x 3 products of (4 x 5) by (5 x 6).
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    workload = described(tmp_path, node, {"x": [2, 1, 4, 5]}, [weight("w", 3, 5, 6)])
    assert workload.flops == 2 * 6 * 4 * 5 * 6


@pytest.mark.parametrize(
    ("operation", "gates", "elementwise"), [("LSTM", 4, 9), ("GRU", 3, 8), ("RNN", 1, 1)]
)
def test_recurrent_layer_in_both_directions(
    tmp_path: Path, operation: str, gates: int, elementwise: int
) -> None:
    # 6 steps of 2 sequences: inputs of 5 and a state of 7, for each gate and direction.
    node = helper.make_node(
        operation, ["x", "w", "r"], ["y"], hidden_size=7, direction="bidirectional"
    )
    weights = [weight("w", 2, gates * 7, 5), weight("r", 2, gates * 7, 7)]
    workload = described(tmp_path, node, {"x": [6, 2, 5]}, weights)
    products = 2 * 2 * gates * 7 * (5 + 7)
    assert workload.flops == 6 * 2 * (products + elementwise * 2 * 7)


def test_quantized_convolution_counts_as_the_plain_one(tmp_path: Path) -> None:
    scales = [weight("s", dtype=np.float32), weight("z", dtype=np.uint8)]
    weights = [*scales, weight("w", 16, 8, 3, 3, dtype=np.uint8), weight("q", 1, 8, 12, 12)]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("QLinearConv", ["xq", "s", "z", "w", "s", "z", "s", "z"], ["y"]),
    ]
    built = model(nodes, {"x": [1, 8, 12, 12]}, ["y"], weights)
    built.graph.output[0].type.tensor_type.elem_type = TensorProto.UINT8
    workload = describe_onnx(write(built, tmp_path))
    assert [node.flops for node in workload.nodes] == [8 * 144, 2 * 1600 * 72]
    assert workload.nodes[1].product_type == "u8"


def test_einsum_runs_over_every_letter(tmp_path: Path) -> None:
    node = helper.make_node("Einsum", ["x", "z"], ["y"], equation="bij,bjk->bik")
    assert described(tmp_path, node, {"x": [2, 3, 4], "z": [2, 4, 5]}).flops == 2 * 2 * 3 * 4 * 5


def test_elementwise_counts_results_reductions_inputs_and_moves_nothing(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Add", ["x", "z"], ["a"]),  # broadcast to 6 x 4
        helper.make_node("Transpose", ["a"], ["t"], perm=[1, 0]),
        helper.make_node("Softmax", ["t"], ["s"]),
        helper.make_node("ReduceMean", ["s"], ["y"], axes=[1], keepdims=0),
    ]
    built = model(nodes, {"x": [6, 4], "z": [1, 4]}, ["y"])
    workload = describe_onnx(write(built, tmp_path))
    assert [node.flops for node in workload.nodes] == [24, 0, 72, 24]


def test_pooling_counts_its_window(tmp_path: Path) -> None:
    node = helper.make_node("MaxPool", ["x"], ["y"], kernel_shape=[2, 2], strides=[2, 2])
    assert described(tmp_path, node, {"x": [1, 3, 8, 8]}).flops == 3 * 16 * 4


def test_contrib_attention_counts_projection_and_scores(tmp_path: Path) -> None:
    # 5 tokens of 8: one weight 8 x 24, then every token sees 5 of width 8, twice.
    node = helper.make_node(
        "Attention", ["x", "w", "b"], ["y"], domain="com.microsoft", num_heads=2
    )
    domains = {"": 17, "com.microsoft": 1}
    weights = [weight("w", 8, 24), weight("b", 24)]
    workload = described(tmp_path, node, {"x": [1, 5, 8]}, weights, domains)
    assert workload.flops == 2 * 5 * 8 * 24 + 4 * 5 * 5 * 8
    assert workload.tensors["y"].shape == (1, 5, 8)


def test_operation_without_a_rule_is_reported_and_not_guessed(tmp_path: Path) -> None:
    node = helper.make_node("NonZero", ["x"], ["y"])
    built = model([node, helper.make_node("Sigmoid", ["y"], ["z"], name="s")], {"x": [4]}, ["z"])
    workload = describe_onnx(write(built, tmp_path))
    assert workload.flops == 0
    assert workload.unknown == (("s", "shape of result 'z' is unknown"),)


def test_dearer_branch_of_an_if_counts(tmp_path: Path) -> None:
    def branch(name: str, *nodes: NodeProto, weights: Sequence[TensorProto] = ()) -> object:
        output = helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4])
        return helper.make_graph(list(nodes), name, [], [output], list(weights))

    cheap = branch("a", helper.make_node("Relu", ["x"], ["a"]))
    dear = branch("b", helper.make_node("MatMul", ["x", "w"], ["b"]), weights=[weight("w", 4, 4)])
    node = helper.make_node("If", ["go"], ["y"], then_branch=cheap, else_branch=dear, name="if")
    built = model([node], {"x": [4, 4]}, ["y"])
    built.graph.input.append(helper.make_tensor_value_info("go", TensorProto.BOOL, []))
    workload = describe_onnx(write(built, tmp_path))
    assert workload.flops == 2 * 4 * 4 * 4
    assert workload.weight_bytes == 64
    assert workload.nodes[0].weights == ("if/else_branch/w",)
