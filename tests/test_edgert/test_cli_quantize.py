"""`edgert quantize` and its file: byte-exact where it copies, checked where it is read."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import struct
from pathlib import Path

import numpy as np
import pytest
from gguf.quants import dequantize
from numpy.typing import NDArray

from edgert.errors import CapacityError, FormatError
from edgert.events import ignore
from edgert.llama.expert_inputs import run_experts
from edgert.llama.lib import load_library
from edgert.llama.options import LoadOptions
from make_model import Request, make_model
from native import tapped
from planned_models import outcome
from quant.formats import NestedType, format_of
from quant.model_spec import read_model_spec
from quant.nested.code import decode, encode
from quant.nested.encoder import ModelEncoder
from quant.nested.file import NestedModel, read_nested
from quant.nested.gains import UNIT, no_gains
from quant.nested.moments import Moments
from quant.nested.source import TensorReader, expert_stacks
from quant.tensor_file import open_tensor_file

GATE = "blk.1.ffn_gate_exps.weight"
FORMS = {"F16": "2..8", "Q4_0": "2..4", "Q8_0": "4..8"}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        kind: make_model(Request("tiny-moe", folder / f"{kind}.gguf", weight_type=kind))[0]
        for kind in FORMS
    }


def nest(
    capsys: pytest.CaptureFixture[str], source: Path, folder: Path, widths: str
) -> tuple[Path, NestedModel]:
    out = folder / "nested.gguf"
    code, text, _ = outcome(
        capsys, "quantize", str(source), "--nested", widths, "-o", str(out), "--json"
    )
    assert code == 0
    assert json.loads(text)["nested"] == str(out)
    model = read_nested(open_tensor_file(out))
    assert model is not None
    return out, model


def content(path: Path, name: str) -> bytes:
    entry = open_tensor_file(path).tensor(name)
    return path.read_bytes()[entry.offset_bytes : entry.end_bytes]


def source_weights(path: Path, name: str, expert: int) -> NDArray[np.float32]:
    entry = open_tensor_file(path).tensor(name)
    data = np.frombuffer(content(path, name), np.uint8).reshape(*entry.shape[:0:-1], -1)
    weights: NDArray[np.float32] = dequantize(data[expert], entry.ggml_type)
    return weights


@pytest.mark.parametrize("kind", FORMS)
def test_nested_file_keeps_everything_else(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    out, model = nest(capsys, sources[kind], tmp_path, FORMS[kind])
    before, after = open_tensor_file(sources[kind]), open_tensor_file(out)
    assert [t.name for t in before.tensors] == [t.name for t in after.tensors]
    assert [t.shape for t in before.tensors] == [t.shape for t in after.tensors]
    for tensor in before.tensors:
        assert ("_exps" in tensor.name) is (tensor.name in model.tensors)
        if tensor.name not in model.tensors:
            assert content(sources[kind], tensor.name) == content(out, tensor.name)
    assert read_model_spec(after).n_expert == read_model_spec(before).n_expert
    assert model.source_sha256 == hashlib.sha256(sources[kind].read_bytes()).hexdigest()
    assert set(before.metadata) <= set(after.metadata) | {"general.alignment"}
    for name, tensor in model.tensors.items():
        model.verify(name)
        assert tensor.offset_bytes(1) % 4096 == 0
        assert tensor.layout.is_aligned is (tensor.layout.scales_bytes % 4096 == 0)


def test_experts_are_read_at_any_width(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    _, model = nest(capsys, sources["F16"], tmp_path, "2..8")
    for expert in (0, 7):
        matrix = encode(source_weights(sources["F16"], GATE, expert), 2, 8)
        for width in (2, 4, 8):
            saw = decode(model.read(GATE, expert, width), model.tensor(GATE).layout, width)
            assert (saw == matrix.values(width)).all()


@pytest.mark.parametrize(("kind", "widths"), [("Q4_0", "2..4"), ("Q8_0", "2..8")])
def test_codes_of_a_source_of_the_top_width_are_kept(
    capsys: pytest.CaptureFixture[str],
    sources: dict[str, Path],
    tmp_path: Path,
    kind: str,
    widths: str,
) -> None:
    _, model = nest(capsys, sources[kind], tmp_path, widths)
    layout = model.tensor(GATE).layout
    saw = decode(model.read(GATE, 3, layout.top), layout, layout.top)
    assert (saw == source_weights(sources[kind], GATE, 3)).all()


def test_stock_llama_cpp_refuses_the_file(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    out, _ = nest(capsys, sources["Q4_0"], tmp_path, "2..4")
    library = load_library()
    lines: list[str] = []
    with library.log.heard_by(lines.append):
        params = library.api.llama_model_default_params()
        assert not library.api.llama_model_load_from_file(str(out).encode(), params)
    assert "has invalid ggml type" in "".join(lines)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--nested", "2..8"], "not named"),
        (["--nested", "8..2", "-o", "x"], "widths 8..2"),
        (["--nested", "2..6", "-o", "x"], "widths 2..6"),
        (["--nested", "two", "-o", "x"], "'two'"),
        (["-o", "x"], "None"),
    ],
)
def test_wrong_requests_are_refused_with_the_form(
    capsys: pytest.CaptureFixture[str],
    sources: dict[str, Path],
    arguments: list[str],
    problem: str,
) -> None:
    code, _, err = outcome(capsys, "quantize", str(sources["F16"]), *arguments)
    assert code == 2
    assert problem in err
    assert "hint: " in err


def test_model_without_experts_is_refused(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    arguments = ("quantize", str(model), "--nested", "2..8", "-o", str(tmp_path / "x.gguf"))
    code, _, err = outcome(capsys, *arguments)
    assert (code, "no stacked experts" in err) == (2, True)
    assert not (tmp_path / "x.gguf").exists()


def test_nested_file_is_not_nested_again_nor_replaced(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    out, _ = nest(capsys, sources["Q4_0"], tmp_path, "2..4")
    again = ("quantize", str(out), "--nested", "2..4", "-o", str(tmp_path / "x.gguf"))
    assert outcome(capsys, *again)[0] == 2
    code, _, err = outcome(
        capsys, "quantize", str(sources["F16"]), "--nested", "2..8", "-o", str(out)
    )
    assert (code, "such a file already" in err) == (2, True)


def test_weight_that_is_no_number_is_named(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    damaged = tmp_path / "nan.gguf"
    damaged.write_bytes(sources["F16"].read_bytes())
    entry = open_tensor_file(damaged).tensor(GATE)
    row_length, n_rows, _ = entry.shape
    with damaged.open("r+b") as stream:
        stream.seek(entry.offset_bytes + 2 * (row_length * (n_rows * 5 + 17) + 3))
        stream.write(np.float16(np.nan).tobytes())
    arguments = ("quantize", str(damaged), "--nested", "2..8", "-o", str(tmp_path / "x.gguf"))
    code, _, err = outcome(capsys, *arguments)
    assert code == 3
    assert f"tensor {GATE}: expert 5, row 17 holds nan" in err
    assert not (tmp_path / "x.gguf").exists()


def test_damaged_and_exchanged_planes_are_found(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    out, model = nest(capsys, sources["Q4_0"], tmp_path, "2..4")
    tensor = model.tensor(GATE)
    whole = bytearray(out.read_bytes())
    plane, n_bytes = tensor.offset_bytes(2) + tensor.layout.scales_bytes, tensor.layout.plane_bytes
    first, second = whole[plane : plane + n_bytes], whole[plane + n_bytes : plane + 2 * n_bytes]
    whole[plane : plane + 2 * n_bytes] = second + first
    out.write_bytes(whole)
    with pytest.raises(FormatError, match="changed after it was checked"):
        model.verify(GATE)
    changed = read_nested(open_tensor_file(out))
    assert changed is not None
    with pytest.raises(FormatError, match=f"{GATE}.*damaged, reordered"):
        changed.verify(GATE)
    changed.verify("blk.1.ffn_up_exps.weight")


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        (b"edgert.nested.version", b"edgert.nested.vers1on", "version is missing"),
        (b"edgert.nested.sha256", b"edgert.nested.sha251", "sha256 is missing"),
        (b"blk.0.ffn_up_exps", b"blk.0.ffn_up_exPs", "names 12 tensors"),
    ],
)
def test_keys_that_do_not_fit_the_tensors_are_refused(
    capsys: pytest.CaptureFixture[str],
    sources: dict[str, Path],
    tmp_path: Path,
    before: bytes,
    after: bytes,
    problem: str,
) -> None:
    out, _ = nest(capsys, sources["Q4_0"], tmp_path, "2..4")
    out.write_bytes(out.read_bytes().replace(before, after, 1))
    with pytest.raises(FormatError, match=problem):
        read_nested(open_tensor_file(out))


def test_damaged_headers_raise_format_errors_only(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    out, _ = nest(capsys, sources["Q4_0"], tmp_path, "2..4")
    start = out.read_bytes().index(b"edgert.nested.version")
    end = open_tensor_file(out).shards[0].data_offset_bytes
    random = np.random.default_rng(7)
    n_refused = 0
    for _ in range(150):
        place = int(random.integers(start, end))
        with out.open("r+b") as stream:
            stream.seek(place)
            before = stream.read(1)
            stream.seek(place)
            stream.write(bytes([before[0] ^ 1 << int(random.integers(8))]))
        try:
            read_nested(open_tensor_file(out))
        except FormatError:
            n_refused += 1
        with out.open("r+b") as stream:
            stream.seek(place)
            stream.write(before)
    assert n_refused > 50
    assert read_nested(open_tensor_file(out)) is not None


def test_truncated_file_is_refused(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path
) -> None:
    out, _ = nest(capsys, sources["Q4_0"], tmp_path, "2..4")
    out.write_bytes(out.read_bytes()[:-100_000])
    with pytest.raises(FormatError, match=r"truncated|missing"):
        open_tensor_file(out)


def test_nested_types_are_as_large_as_their_segments() -> None:
    for kind in NestedType:
        assert format_of(kind).block_bytes == 2 + 4 * kind.top
        assert kind.name == f"NESTED_{kind.base}_{kind.top}"
        assert kind == 0x4E000000 | kind.base << 8 | kind.top


def test_ordinary_model_is_not_nested(sources: dict[str, Path]) -> None:
    assert read_nested(open_tensor_file(sources["F16"])) is None


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    letters = np.random.default_rng(5).choice(list("abcdefgh ijklmnop"), 9000)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(letters), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.model
def test_calibrated_and_evaluated_file_says_what_each_width_costs(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path, text: Path
) -> None:
    out = tmp_path / "nested.gguf"
    code, printed, _ = outcome(
        capsys, "quantize", str(sources["F16"]), "--nested", "2..4", "--calib", str(text),
        "--eval", str(text), "--chunks", "1", "-o", str(out), "--json",
    )  # fmt: skip
    facts = json.loads(printed)
    assert code == 0
    assert facts["calibrated"] is True
    assert [line["width"] for line in facts["widths"]] == [2, 3, 4]
    divergences = [line["score"]["kl"] for line in facts["widths"]]
    assert divergences == sorted(divergences, reverse=True)
    for kind in ("gate", "up", "down"):
        noise = [line["noise"][kind] for line in facts["widths"]]
        assert noise == sorted(noise, reverse=True)
    model = read_nested(open_tensor_file(out))
    assert model is not None
    assert model.calibrated
    model.verify(GATE)
    gains = [[t.gain(width) / UNIT for t in model.tensors.values()] for width in (2, 3, 4)]
    assert [line["gain"] for line in facts["widths"]] == pytest.approx(np.mean(gains, axis=1))
    assert np.mean(gains[0]) > np.mean(gains[1]) > 1
    assert set(gains[2]) == {1}


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        ([0], "gain of 0 at 2 bits"),
        ([511], "wanted 512 to 2048"),
        ([2**32 - 1], "gain of 4294967295"),
        ([0x7FC00000], "gain of 2143289344"),  # a NaN, had it been a float32
        ([1024, 1024, 1025], "gain of 1025 at 4 bits, wanted 1024 to 1024"),
    ],
)
def test_gains_that_cannot_be_are_refused(
    capsys: pytest.CaptureFixture[str],
    sources: dict[str, Path],
    tmp_path: Path,
    numbers: list[int],
    problem: str,
) -> None:
    out, model = nest(capsys, sources["Q4_0"], tmp_path, "2..4")
    assert {tensor.gains for tensor in model.tensors.values()} == {no_gains(2, 4)}
    whole = bytearray(out.read_bytes())
    start = whole.index(b"edgert.nested.gains") + len("edgert.nested.gains") + 4 + 4 + 8
    struct.pack_into(f"<{len(numbers)}I", whole, start, *numbers)
    out.write_bytes(whole)
    with pytest.raises(FormatError, match=problem) as caught:
        read_nested(open_tensor_file(out))
    assert "blk.0.ffn_" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        (b"edgert.nested.gains", {0: 6}, "no array of uint32"),  # of float32
        (b"edgert.nested.version", {0: 1}, "version is 1, wanted 2"),
    ],
)
def test_keys_of_another_form_are_refused(
    capsys: pytest.CaptureFixture[str],
    sources: dict[str, Path],
    tmp_path: Path,
    key: bytes,
    change: dict[int, int],
    problem: str,
) -> None:
    out, _ = nest(capsys, sources["Q4_0"], tmp_path, "2..4")
    whole = bytearray(out.read_bytes())
    start = whole.index(key) + len(key) + 4
    for offset, value in change.items():
        whole[start + offset] = value
    out.write_bytes(whole)
    with pytest.raises(FormatError, match=problem) as caught:
        read_nested(open_tensor_file(out))
    assert "edgert quantize --nested" in str(caught.value.hint)


@pytest.mark.model
def test_calibration_text_that_is_too_short_is_refused(
    capsys: pytest.CaptureFixture[str], sources: dict[str, Path], tmp_path: Path, text: Path
) -> None:
    for content in ("", "a few words"):
        text = tmp_path / "short.txt"
        text.write_text(content)
        code, _, err = outcome(
            capsys, "quantize", str(sources["F16"]), "--nested", "2..4",
            "--calib", str(text), "-o", str(tmp_path / "x.gguf"),
        )  # fmt: skip
        assert (code, "wanted at least 2,048" in err) == (2, True)
    assert not (tmp_path / "x.gguf").exists()


@pytest.mark.model
def test_inputs_of_experts_are_those_that_the_graph_computes(sources: dict[str, Path]) -> None:
    tokens = [300, 301, 305, 310, 299, 300]
    with tapped(sources["F16"]) as (context, tap):
        norm, chosen = tap.capture("ffn_norm-1"), tap.capture("ffn_moe_logits-1")
        context.decode(tokens, 0, 1)
        assert norm.value is not None
        assert chosen.value is not None
        best = np.argsort(-chosen.value, axis=1)[:, :2]
        rows = norm.value
    seen: list[tuple[NDArray[np.float32], NDArray[np.int32]]] = []
    run_experts(
        open_tensor_file(sources["F16"]),
        LoadOptions(sources["F16"], n_ctx=64, n_threads=1),
        lambda _: [tokens],
        {GATE: lambda _, x, ids: seen.append((x.copy(), ids.copy()))},
        ignore,
    )
    ((saw, ids),) = seen
    assert (np.sort(ids.reshape(-1, 2)) == np.sort(best)).all()
    assert np.allclose(saw, np.repeat(rows, 2, axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.model
def test_inputs_are_the_same_when_weights_stream(sources: dict[str, Path]) -> None:
    def powers(weight_bytes: int | None) -> list[float]:
        seen: list[float] = []
        run_experts(
            open_tensor_file(sources["F16"]),
            LoadOptions(sources["F16"], n_ctx=64, n_threads=1, weight_memory_bytes=weight_bytes),
            lambda _: [[300, 301, 305], [310, 299]],
            {GATE: lambda *seen_by: seen.append(float((seen_by[1] ** 2).sum()))},
            ignore,
        )
        return seen

    assert powers(None) == powers(36 << 20)
    with pytest.raises(CapacityError):
        powers(1 << 20)


@pytest.mark.model
def test_ctrl_c_ends_a_calibration(sources: dict[str, Path]) -> None:
    seen: list[str] = []

    def take(name: str, _rows: NDArray[np.float32], _ids: NDArray[np.int32]) -> None:
        os.kill(os.getpid(), signal.SIGINT)  # inside a callback of llama.cpp
        seen.append(name)

    with pytest.raises(KeyboardInterrupt):
        run_experts(
            open_tensor_file(sources["F16"]),
            LoadOptions(sources["F16"], n_ctx=64, n_threads=1),
            lambda _: [[300, 301, 305]] * 4,
            {GATE: take},
            ignore,
        )
    assert seen == [GATE]


def test_experts_that_no_row_entered_are_coded_without_calibration(
    sources: dict[str, Path],
) -> None:
    with TensorReader(open_tensor_file(sources["F16"])) as reader:
        stack = expert_stacks(reader.file)[GATE]
        known = Moments.empty(stack.n_expert, stack.matrix_shape[1])
        rows = np.random.default_rng(6).standard_normal((200, 256)).astype(np.float32)
        known.add(rows, np.full(200, 3, np.int32))
        encoder = ModelEncoder(reader, (2, 4), {GATE: known})
        plain = encode(reader.weights(stack, 5), 2, 4, has_gains=True)
        assert encoder.encode(stack, 5).to_bytes() == plain.to_bytes()
        encoder.encode(stack, 3)
        assert encoder.uncalibrated == {GATE: [5]}
        gains = encoder.gains(GATE)
        assert gains[0] > gains[1] > gains[2] == UNIT
