"""ONNX models as work: cuts, units, assumptions, and files that lie."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import GraphProto, ModelProto, TensorProto, helper

from edgert.errors import ConfigError, EdgertError, FormatError
from onnx_builders import externalised, integers, model, small_network, weight, write
from partition.onnx_units import onnx_units
from partition.onnx_workload import OnnxWorkload, describe_onnx


def described(folder: Path, built: ModelProto, **dimensions: int) -> OnnxWorkload:
    return describe_onnx(write(built, folder), dimensions)


def diamond() -> ModelProto:
    """One node, two beside each other that read it, one that reads both."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"], name="first"),
        helper.make_node("Sigmoid", ["a"], ["b"], name="left"),
        helper.make_node("Tanh", ["a"], ["c"], name="right"),
        helper.make_node("Add", ["b", "c"], ["d"], name="last"),
    ]
    return model(nodes, {"x": [1, 10]}, ["d"])


def test_cuts_name_what_crosses_them_and_its_size(tmp_path: Path) -> None:
    workload = described(tmp_path, diamond())
    assert [cut.tensors for cut in workload.cuts] == [("a",), ("a", "b"), ("b", "c")]
    assert [cut.size_bytes for cut in workload.cuts] == [40, 80, 80]
    # first: x and a; left: a and b; right: a, b and c; last: b, c and d.
    assert workload.live_bytes == (80, 80, 120, 120)
    assert (workload.peak_bytes(0, 2), workload.peak_bytes(0, 4)) == (80, 120)


def test_input_that_is_needed_later_crosses_and_early_output_does_not(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["early"]),
        helper.make_node("Relu", ["early"], ["a"]),
        helper.make_node("Add", ["a", "z"], ["y"]),
    ]
    workload = described(tmp_path, model(nodes, {"x": [4], "z": [4]}, ["early", "y"]))
    assert [set(cut.tensors) for cut in workload.cuts] == [{"early", "z"}, {"a", "z"}]
    assert workload.live_bytes[2] == 4 * 4 * 4  # early waits to be returned


def test_open_dimensions_are_one_unless_given(tmp_path: Path) -> None:
    workload = described(tmp_path, small_network())
    assert [(a.dimension, a.value) for a in workload.assumptions] == [("batch", 1)]
    assert "taken as 1" in workload.assumptions[0].reason
    four = described(tmp_path, small_network(), batch=4)
    assert four.assumptions[0].reason == "given"
    assert four.flops == 4 * workload.flops
    assert four.weight_bytes == workload.weight_bytes == 4 * (8 * 27 + 8 + 80 + 10)


def test_dimension_without_a_name_is_called_by_input_and_axis(tmp_path: Path) -> None:
    built = model([helper.make_node("Relu", ["x"], ["y"])], {"x": [None, 3]}, ["y"])
    workload = describe_onnx(write(built, tmp_path), {"x:0": 5})
    assert workload.tensors["y"].shape == (5, 3)


@pytest.mark.parametrize(
    ("dimensions", "problem"), [({"other": 2}, "no open"), ({"batch": 0}, "0")]
)
def test_dimension_that_is_not_there_or_absurd_is_refused(
    tmp_path: Path, dimensions: dict[str, int], problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        describe_onnx(write(small_network(), tmp_path), dimensions)


def test_shape_arithmetic_is_followed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "zero"], ["n"]),
        helper.make_node("Concat", ["n", "minus"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    weights = [integers("zero", 0), integers("minus", -1)]
    workload = described(tmp_path, model(nodes, {"x": ["n", 3, 4]}, ["y"], weights), n=2)
    assert workload.tensors["y"].shape == (2, 12)


def test_sizes_that_a_graph_computes_are_computed(tmp_path: Path) -> None:
    # Half the width, by way of Shape, Gather, Div, Unsqueeze, Concat, ConstantOfShape and Expand.
    nodes = [
        helper.make_node("Shape", ["x"], ["s"]),
        helper.make_node("Gather", ["s", "one"], ["width"]),
        helper.make_node("Div", ["width", "two"], ["half"]),
        helper.make_node("Concat", ["minus", "two", "half"], ["t"], axis=0),
        helper.make_node("Reshape", ["x", "t"], ["y"]),
    ]
    weights = [integers("one", 1), integers("two", 2), integers("minus", -1)]
    workload = described(tmp_path, model(nodes, {"x": ["n", 12]}, ["y"], weights), n=3)
    assert workload.tensors["y"].shape == (3, 2, 6)
    assert [node.op_type for node in workload.nodes] == ["Reshape"]


def test_sizes_that_would_be_large_are_not_computed(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("ConstantOfShape", ["large"], ["zeros"]),
        helper.make_node("Range", ["from", "to", "step"], ["steps"]),
        helper.make_node("Add", ["zeros", "steps"], ["y"]),
    ]
    scalars = [weight(name, dtype=np.int64) for name in ("from", "to", "step")]
    weights = [integers("large", 1 << 40), *scalars]
    weights[2].raw_data = (1 << 40).to_bytes(8, "little")
    weights[3].raw_data = (1).to_bytes(8, "little")
    workload = described(tmp_path, model(nodes, {}, ["y"], weights))
    assert [node.op_type for node in workload.nodes] == ["ConstantOfShape", "Range", "Add"]


def test_lists_that_double_with_every_node_take_no_memory(tmp_path: Path) -> None:
    nodes = [helper.make_node("Concat", [f"t{i}"] * 2, [f"t{i + 1}"], axis=0) for i in range(45)]
    built = model(nodes, {}, ["t45"], [integers("t0", 1, 2)])
    built.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
    workload = described(tmp_path, built)
    assert workload.tensors["t45"].shape == (1 << 46,)


def test_default_of_an_input_gives_its_shape(tmp_path: Path) -> None:
    built = model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        {"x": [2, 3], "w": [3, "rank"]},
        ["y"],
        [weight("w", 3, 5)],
    )
    workload = described(tmp_path, built)
    assert workload.tensors["y"].shape == (2, 5)
    assert (workload.inputs, workload.assumptions) == (("x",), ())


def test_cut_through_an_unknown_size_is_illegal_and_says_why(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["n"], name="where"),
        helper.make_node("Cast", ["n"], ["c"], to=1),
        helper.make_node("ReduceSum", ["c"], ["y"], keepdims=0),
        helper.make_node("Relu", ["y"], ["z"]),
    ]
    workload = described(tmp_path, model(nodes, {"x": [8]}, ["z"]))
    assert [cut.position for cut in workload.legal_cuts] == [3]
    assert "size of 'n' is unknown: dimension 1 is open" in workload.cuts[0].why_illegal
    assert workload.peak_bytes(0, 3) is None
    assert [unit.name for unit in onnx_units(workload).units] == [
        "where to ReduceSum_2", "Relu_3",
    ]  # fmt: skip


def test_nodes_are_put_in_order(tmp_path: Path) -> None:
    built = diamond()
    shuffled = [built.graph.node[i] for i in (3, 1, 0, 2)]
    reordered = model(shuffled, {"x": [1, 10]}, ["d"])
    names = [node.name for node in described(tmp_path, reordered).nodes]
    assert names == ["first", "left", "right", "last"]


def test_functions_are_inlined(tmp_path: Path) -> None:
    body = [helper.make_node("MatMul", ["a", "b"], ["c"])]
    imports = [helper.make_opsetid("", 17)]
    function = helper.make_function("mine", "Product", ["a", "b"], ["c"], body, imports)
    nodes = [helper.make_node("Product", ["x", "w"], ["y"], domain="mine")]
    built = model(nodes, {"x": [2, 3]}, ["y"], [weight("w", 3, 4)], {"": 17, "mine": 1})
    built.functions.append(function)
    assert described(tmp_path, built).flops == 2 * 2 * 3 * 4


def test_units_hold_every_weight_and_operation_once(tmp_path: Path) -> None:
    shared = [helper.make_node("MatMul", ["x", "w"], ["a"])]
    shared += [helper.make_node("MatMul", ["a", "w"], ["y"])]
    weights = [weight("w", 4, 4), weight("unused", 7)]
    workload = described(tmp_path, model(shared, {"x": [2, 4]}, ["y"], weights))
    chain = onnx_units(workload)
    assert chain.reads == (1.0,)
    assert [unit.weight_bytes for unit in chain.units] == [(64 + 28,), (0,)]
    assert [unit.decode.flops for unit in chain.units] == [{"f32": 64}, {"f32": 64}]
    assert [unit.decode.read_bytes for unit in chain.units] == [{"f32": 64}, {"f32": 64}]
    assert chain.activation_bytes == (32, 32)


@pytest.mark.parametrize("most_units", [1, 2, 7, 40])
def test_long_models_are_merged_where_least_crosses(tmp_path: Path, most_units: int) -> None:
    nodes = []
    for i in range(60):  # widens, then narrows again: cheap cuts are the even ones
        nodes.append(helper.make_node("Concat", [f"t{i}"] * 4, [f"u{i}"], axis=1))
        nodes.append(helper.make_node("Slice", [f"u{i}", "from", "to", "axis"], [f"t{i + 1}"]))
    weights = [integers("from", 0), integers("to", 5), integers("axis", 1)]
    workload = described(tmp_path, model(nodes, {"t0": [1, 5]}, ["t60"], weights))
    chain = onnx_units(workload, most_units)
    assert len(chain.units) <= most_units
    assert len(chain.units) >= most_units // 2
    assert sum(unit.total_weight_bytes for unit in chain.units) == workload.weight_bytes
    if most_units <= 7:
        assert all(size == 20 for size in chain.activation_bytes)
    with pytest.raises(ValueError, match="wanted at least 1"):
        onnx_units(workload, 0)


def test_row_look_up_reads_rows(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["table", "ids"], ["y"])]
    weights = [weight("table", 1000, 8), integers("ids", 3, 4)]
    workload = described(tmp_path, model(nodes, {}, ["y"], weights))
    unit = onnx_units(workload).units[0]
    assert unit.decode.read_bytes == {"f32": 2 * 8 * 4}
    assert unit.total_weight_bytes == 32000 + 16


def test_external_data_is_sized_and_not_read(tmp_path: Path) -> None:
    inside = described(tmp_path, small_network())
    path = externalised(small_network(), tmp_path, "w")
    assert describe_onnx(path).weight_bytes == inside.weight_bytes
    assert describe_onnx(path).flops == inside.flops


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ({"location": "../weights.bin"}, "wanted a file below"),
        ({"location": "a/../../weights.bin"}, "wanted a file below"),
        ({"location": "/etc/passwd"}, "wanted a file below"),
        ({"location": "C:\\weights.bin"}, "wanted a file below"),
        ({"location": "..\\weights.bin"}, "wanted a file below"),
        ({"location": ""}, "wanted a file below"),
        ({"location": "other.bin"}, "is missing"),
        ({"location": "link/weights.bin"}, "leads out of its folder"),
        ({"location": "."}, "is missing"),
        ({"offset": "5"}, "its shape wants 864"),
        ({"offset": "-4"}, "its shape wants 864"),
        ({"offset": "here"}, "is no number"),
        ({"length": "12"}, "its shape wants 864"),
        ({"offset": str(1 << 70)}, "its shape wants 864"),
    ],
)
def test_external_data_stays_in_its_folder_and_is_whole(
    tmp_path: Path, entries: dict[str, str], problem: str
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path)
    (tmp_path / "weights.bin").write_bytes(bytes(2000))
    path = externalised(small_network(), folder, "w", **entries)
    with pytest.raises(FormatError, match=problem) as caught:
        describe_onnx(path)
    assert "tensor w" in str(caught.value)


def cycle(built: ModelProto) -> None:
    built.graph.node[0].input[0] = "d"


def twice(built: ModelProto) -> None:
    built.graph.node[1].output[0] = "a"


def unmade(built: ModelProto) -> None:
    built.graph.node[1].input[0] = "nothing"


def lost_output(built: ModelProto) -> None:
    built.graph.output[0].name = "lost"


def custom(built: ModelProto) -> None:
    built.graph.node[0].domain = "com.example"


def not_imported(built: ModelProto) -> None:
    built.graph.node[0].domain = "com.microsoft"


def no_versions(built: ModelProto) -> None:
    built.ClearField("opset_import")


def newer(built: ModelProto) -> None:
    built.opset_import[0].version = 999


def newer_format(built: ModelProto) -> None:
    built.ir_version = 99


def short_weight(built: ModelProto) -> None:
    built.graph.initializer.append(TensorProto(name="w", data_type=1, dims=[9], raw_data=bytes(8)))


def negative_weight(built: ModelProto) -> None:
    built.graph.initializer.append(TensorProto(name="w", data_type=1, dims=[-9]))


def huge_weight(built: ModelProto) -> None:
    built.graph.initializer.append(TensorProto(name="w", data_type=1, dims=[1 << 40, 1 << 40]))


def typeless_weight(built: ModelProto) -> None:
    built.graph.initializer.append(TensorProto(name="w", data_type=77, dims=[1], raw_data=bytes(4)))


def endless_function(built: ModelProto) -> None:
    body = [helper.make_node("Again", ["a"], ["b"], domain="mine")]
    imports = [helper.make_opsetid("mine", 1)]
    built.functions.append(helper.make_function("mine", "Again", ["a"], ["b"], body, imports))


def exploding_functions(built: ModelProto) -> None:
    imports = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    for level in range(40):
        below = f"F{level + 1}" if level < 39 else "Relu"
        domain = "mine" if level < 39 else ""
        body = [
            helper.make_node(below, ["a"], ["b"], domain=domain),
            helper.make_node(below, ["b"], ["c"], domain=domain),
        ]
        built.functions.append(
            helper.make_function("mine", f"F{level}", ["a"], ["c"], body, imports)
        )
    built.graph.node[0].op_type, built.graph.node[0].domain = "F0", "mine"


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (cycle, "node first waits for its own result: a cycle"),
        (twice, "makes 'a' again"),
        (unmade, "node left reads 'nothing', which nothing makes"),
        (lost_output, "output 'lost' is made by no node"),
        (custom, "node first: operation Relu of domain 'com.example'"),
        (not_imported, "node first: opset_import lacks its domain 'com.microsoft'"),
        (no_versions, "opset_import is empty"),
        (newer, "opset 999 of ''"),
        (newer_format, "IR version 99"),
        (short_weight, "tensor w: holds 8 values or bytes, its shape wants 36"),
        (negative_weight, "tensor w: shape"),
        (huge_weight, "tensor w: shape"),
        (typeless_weight, "tensor w: data type 77 is unknown"),
        (endless_function, "function Again of 'mine' calls itself"),
        (exploding_functions, "nodes, wanted at most"),
    ],
)
def test_malformed_model_names_the_offender(
    tmp_path: Path, damage: Callable[[ModelProto], None], problem: str
) -> None:
    built = diamond()
    damage(built)
    with pytest.raises(FormatError, match=problem) as caught:
        described(tmp_path, built)
    assert "model.onnx" in str(caught.value)


def test_shapes_that_contradict_each_other_are_unknown(tmp_path: Path) -> None:
    built = diamond()
    built.graph.node[3].op_type = "MatMul"  # (1 x 10) by (1 x 10)
    assert described(tmp_path, built).unknown == (("last", "shape of result 'd' is unknown"),)


def test_text_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(
        small_network().SerializeToString().replace(b"GlobalAverage", b"\xfflobalAverage")
    )
    with pytest.raises(FormatError, match=r"NodeProto.op_type is .* wanted UTF-8"):
        describe_onnx(path)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    for content in (b"", b"GGUF" + bytes(100), b"\xff" * 50, bytes(10)):
        path.write_bytes(content)
        with pytest.raises(FormatError, match="not an ONNX model"):
            describe_onnx(path)
    os.mkfifo(tmp_path / "pipe")
    for other in (tmp_path, tmp_path / "pipe", tmp_path / "none", Path("bad\0name")):
        with pytest.raises(ConfigError):
            describe_onnx(other)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=150)
@given(st.data())
def test_mutated_models_raise_only_our_errors(tmp_path: Path, data: st.DataObject) -> None:
    content = bytearray(small_network().SerializeToString())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    path = tmp_path / "model.onnx"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    try:
        onnx_units(describe_onnx(path))
    except EdgertError:
        return


def initializer_bytes(graph: GraphProto) -> int:
    sizes = [
        helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize * math.prod(tensor.dims)
        for tensor in graph.initializer
    ]
    inner = [a.g for node in graph.node for a in node.attribute if a.type == a.GRAPH]
    return sum(sizes) + sum(map(initializer_bytes, inner))


@pytest.mark.data
def test_every_model_that_runs_gets_a_workload(shared_data: Path) -> None:
    onnxruntime.set_default_logger_severity(4)
    paths = sorted((shared_data / "onnx").rglob("*.onnx"))
    assert paths
    for path in paths:
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        workload = describe_onnx(path)
        loaded = onnx.load(str(path), load_external_data=False)
        assert workload.weight_bytes == initializer_bytes(loaded.graph), path
        units = onnx_units(workload).units
        stored = workload.weight_bytes + workload.constant_bytes
        assert sum(unit.total_weight_bytes for unit in units) == stored, path
        assert all(why for _, why in workload.unknown), path
        assert all(cut.why_illegal for cut in workload.cuts if cut.size_bytes is None), path


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "gflops"),
    [
        # GFLOPs in the Open Model Zoo: omz_models_model_ultra_lightweight_face_detection_*_320.
        ("ultraface/version-RFB-320_without_postprocessing.onnx", 0.2106),
        ("ultraface/version-slim-320.onnx", 0.1724),
    ],
)
def test_operations_are_those_that_were_published(
    shared_data: Path, name: str, gflops: float
) -> None:
    assert describe_onnx(shared_data / "onnx" / name).flops == pytest.approx(gflops * 1e9, rel=0.01)
