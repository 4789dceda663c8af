"""Nested models that are damaged or exchanged, and wrong requests, as a person meets them."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgert.cli.nested_eval import write_values
from edgert.engine import Engine, EngineSettings
from edgert.errors import CapacityError, FormatError
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.sampling import SamplingParams
from make_model import Request, make_model
from planned_models import outcome
from quant.nested.code import Floats
from quant.nested.file import NestedModel, read_nested
from quant.nested.source import TensorReader, expert_stacks
from quant.tensor_file import open_tensor_file

pytestmark = pytest.mark.model
GATE, UP = "blk.1.ffn_gate_exps.weight", "blk.1.ffn_up_exps.weight"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sources")
    return {
        kind: make_model(Request("tiny-moe", folder / f"{kind}.gguf", weight_type=kind))[0]
        for kind in ("F16", "Q4_0", "Q8_0")
    }


@pytest.fixture
def pair(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> tuple[Path, Path]:
    """Two nested models of one shape and other weights."""
    found = []
    for kind in ("Q4_0", "F16"):
        path = tmp_path / f"{kind}.gguf"
        arguments = ("quantize", str(sources[kind]), "--nested", "2..4", "-o", str(path))
        assert outcome(capsys, *arguments)[0] == 0
        found.append(path)
    return found[0], found[1]


def nested(path: Path) -> NestedModel:
    model = read_nested(open_tensor_file(path))
    assert model is not None
    return model


def bytes_of(path: Path, name: str) -> slice:
    entry = nested(path).tensor(name).entry
    return slice(entry.offset_bytes, entry.end_bytes)


def bench(capsys: pytest.CaptureFixture[str], path: Path, *arguments: str) -> tuple[int, str, str]:
    few = ("-p", "0", "-n", "2", "-r", "1", "-t", "1")
    return outcome(capsys, "bench", str(path), *few, *arguments)


def planes_of_another(path: Path, other: Path) -> bytes:
    content = bytearray(path.read_bytes())
    content[bytes_of(path, GATE)] = other.read_bytes()[bytes_of(other, GATE)]
    return bytes(content)


def hash_of_another(path: Path, other: Path) -> bytes:
    own, theirs = nested(path).tensor(GATE).sha256, nested(other).tensor(GATE).sha256
    assert own != theirs
    return path.read_bytes().replace(own.encode(), theirs.encode(), 1)


def planes_of_another_stack(path: Path, other: Path) -> bytes:
    del other
    content = bytearray(path.read_bytes())
    gate, up = bytes_of(path, GATE), bytes_of(path, UP)
    content[gate], content[up] = content[up], content[gate]
    return bytes(content)


def experts_reordered(path: Path, other: Path) -> bytes:
    del other
    tensor = nested(path).tensor(GATE)
    content, size = bytearray(path.read_bytes()), tensor.layout.expert_bytes
    first, last = tensor.offset_bytes(0), tensor.offset_bytes(7)
    content[first : first + size], content[last : last + size] = (
        content[last : last + size],
        content[first : first + size],
    )
    return bytes(content)


@pytest.mark.parametrize(
    "damage", [planes_of_another, hash_of_another, planes_of_another_stack, experts_reordered]
)
def test_planes_that_are_not_those_of_the_hash_are_refused_by_name(
    pair: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path, Path], bytes],
) -> None:
    path = pair[0]
    assert bench(capsys, path)[0] == 0
    path.write_bytes(damage(*pair))
    code, out, err = bench(capsys, path)
    assert (code, out) == (3, "")
    assert f"tensor {GATE}" in err
    assert "damaged, reordered or another model's" in err


@pytest.mark.parametrize("end", [False, True], ids=["in the middle", "at the end"])
def test_planes_that_are_missing_are_refused(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], end: bool
) -> None:
    path = pair[0]
    content, tensor = path.read_bytes(), nested(path).tensor(GATE)
    size = tensor.layout.plane_bytes
    first = len(content) - size if end else tensor.offset_bytes(3) + tensor.layout.prefix_bytes(2)
    path.write_bytes(content[:first] + content[first + size :])
    code, out, err = bench(capsys, path)
    assert (code, out) == (3, "")
    assert "missing" in err or "truncated" in err


@pytest.mark.parametrize(
    "case",
    [
        ("F16", "2..8", 2 * (256 * (256 * 5 + 17) + 3), np.inf, "expert 5, row 17 holds inf"),
        ("F16", "2..8", 2 * (256 * (256 * 5 + 17) + 3), -np.inf, "expert 5, row 17 holds -inf"),
        ("Q8_0", "2..8", 34 * 8 * (256 * 2 + 9), np.nan, "expert 2, row 9 holds nan"),
        ("Q8_0", "2..4", 34 * 8 * (256 * 2 + 9), np.inf, "expert 2, row 9 holds "),
        ("Q4_0", "2..4", 18 * 8 * (256 * 2 + 9), 6e4, "expert 2, row 9 holds "),
    ],
)
def test_source_weight_that_is_no_number_or_too_large_is_named(
    sources: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    case: tuple[str, str, int, float, str],
) -> None:
    kind, widths, place, value, says = case
    damaged, out = tmp_path / "damaged.gguf", tmp_path / "x.gguf"
    write_into(sources[kind], damaged, GATE, place, np.float16(value).tobytes())
    arguments = ("quantize", str(damaged), "--nested", widths, "-o", str(out))
    code, _, err = outcome(capsys, *arguments)
    assert code == 3
    assert f"tensor {GATE}: {says}" in err
    assert not out.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e30])
def test_inputs_of_experts_that_are_no_numbers_end_the_calibration(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], value: float
) -> None:
    damaged, out, text = (tmp_path / name for name in ("damaged.gguf", "x.gguf", "text.txt"))
    write_into(sources["F16"], damaged, "blk.1.ffn_norm.weight", 0, np.float32(value).tobytes())
    text.write_text("a few words " * 900)
    arguments = ("--nested", "2..4", "--calib", str(text), "-o", str(out))
    code, _, err = outcome(capsys, "quantize", str(damaged), *arguments)
    assert code == 3
    assert f"tensor {GATE}: " in err
    assert "weights before it are damaged" in err
    assert not out.exists()


def write_into(source: Path, out: Path, name: str, place: int, data: bytes) -> None:
    out.write_bytes(source.read_bytes())
    with out.open("r+b") as stream:
        stream.seek(open_tensor_file(out).tensor(name).offset_bytes + place)
        stream.write(data)


def test_empty_text_to_evaluate_is_refused_before_anything_is_written(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, out = tmp_path / "empty.txt", tmp_path / "x.gguf"
    text.write_text("")
    arguments = ("--nested", "2..4", "--eval", str(text), "-o", str(out))
    code, _, err = outcome(capsys, "quantize", str(sources["Q4_0"]), *arguments)
    assert (code, "empty.txt: the text is empty" in err) == (2, True)
    assert not out.exists()


def test_disk_that_is_too_full_to_evaluate_widths_is_named(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "2-bits.gguf"
    path.symlink_to("/dev/full")
    with TensorReader(open_tensor_file(sources["F16"])) as reader:
        stacks = expert_stacks(reader.file)
        shapes = {name: stack.entry.shape for name, stack in stacks.items()}

        def values(name: str, expert: int) -> Floats:
            return reader.weights(stacks[name], expert)

        with pytest.raises(CapacityError, match="No space left"):
            write_values(path, reader, shapes, values)


@pytest.mark.slow
def test_experts_that_a_calibration_text_never_chose_are_told(
    sources: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("a" * 9000)
    for form in ((), ("--json",)):
        out = tmp_path / f"x{len(form)}.gguf"
        arguments = ("--nested", "2..4", "--calib", str(text), "-o", str(out), *form)
        code, printed, err = outcome(capsys, "quantize", str(sources["F16"]), *arguments)
        assert code == 0, err
        if form:
            never = json.loads(printed)["uncalibrated"]
            assert set(never) <= set(nested(out).tensors)
            assert 0 < sum(map(len, never.values())) < 12 * 8
        else:
            assert re.search(r"\d+ of 96 matrices are of experts that the text never chose", err)


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        ("1", "1 bits, the file has 2 to 4"),
        ("5", "5 bits, the file has 2 to 4"),
        ("2,8", "8 bits, the file has 2 to 4"),
        ("-1", "-1 bits, the file has 2 to 4"),
        ("9" * 30, "the file has 2 to 4"),
        ("4,2", "ascending widths"),
        ("3,3", "ascending widths"),
        ("3@0.5", "ascending widths"),
        ("2,4@nan", "ascending shares"),
        ("2,4@1.5", "ascending shares"),
        ("2,3,4@0.5,0.2", "ascending shares"),
        ("", "widths from narrow to wide"),
        ("four", "widths from narrow to wide"),
    ],
)
def test_widths_outside_the_file_are_refused(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str], bits: str, says: str
) -> None:
    code, out, err = bench(capsys, pair[0], "--expert-bits", bits)
    assert (code, out) == (2, "")
    assert says in err
    assert "--expert-bits" in err


def alone(path: Path, bits: str, memory: str) -> tuple[int, str]:
    """Run a benchmark in a process of its own, whose memory is nobody else's; code and stderr."""
    code = "import sys; from edgert.cli import main; sys.exit(main.run(sys.argv[1:]))"
    arguments = ["-c", "64", "-b", "16", "-p", "0", "-n", "2", "-r", "1", "-t", "1"]
    done = subprocess.run(
        [sys.executable, "-c", code, "bench", str(path), "--expert-bits", bits,
         "--memory", memory, *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, done.stderr


@pytest.mark.parametrize("bits", ["4", "2,4@0.25"])
def test_memory_for_less_than_one_tokens_experts_says_what_is_enough(
    pair: tuple[Path, Path], bits: str
) -> None:
    # The process itself comes before its weights, and its messages say what it takes.
    memory, err = "1M", ""
    for _ in range(6):
        code, err = alone(pair[0], bits, memory)
        assert (code, re.search(r" -\d", err)) == (4, None)
        process = re.search(r"([\d,]{6,}) (?:are needed|bytes before any weight)", err)
        if process is None:
            break
        memory = str(int(process[1].replace(",", "")) + 300_000)
    assert "for one token's experts" in err
    enough = re.search(r"--memory (\d+M) is enough", err)
    assert enough is not None
    assert alone(pair[0], bits, enough[1])[0] == 0


class Device:
    """Stands for `os.preadv`, and fails on one file from the nth read on."""

    def __init__(self) -> None:
        self._preadv = os.preadv
        self.n_left: int | None = None
        self.n_failed = 0

    def preadv(self, number: int, buffers: Sequence[memoryview], offset: int, *flags: int) -> int:
        if self.n_left is not None:
            self.n_left -= 1
            if self.n_left < 0:
                self.n_failed += 1
                raise OSError(errno.EIO, "Input/output error")
        return self._preadv(number, buffers, offset, *flags)


@pytest.mark.parametrize("bits", [(4,), (2, 4)])
@pytest.mark.parametrize("n_good", [0, 5, 14])
def test_reply_whose_reads_fail_ends_with_an_error_and_the_next_one_is_whole(
    pair: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    bits: tuple[int, ...],
    n_good: int,
) -> None:
    options = {"n_ctx": 128, "n_threads": 1, "expert_bits": bits, "exact_bits": True}
    with pytest.raises(CapacityError) as caught:
        open_backend(LoadOptions(pair[0], weight_memory_bytes=1 << 16, **options))
    backend = open_backend(
        LoadOptions(pair[0], weight_memory_bytes=caught.value.needed_bytes, **options)
    )
    try:
        device = Device()
        monkeypatch.setattr(os, "preadv", device.preadv)
        engine = Engine(backend, EngineSettings("m", chat_template=None))
        greedy = SamplingParams(temperature=0.0)
        wanted = engine.complete("once upon", max_tokens=8, sampling=greedy).token_ids
        device.n_left = n_good
        with pytest.raises(FormatError, match="Input/output error"):
            engine.complete("another thing entirely", max_tokens=30, sampling=greedy)
        assert device.n_failed
        device.n_left = None
        found = engine.complete("once upon", max_tokens=8, sampling=greedy).token_ids
        assert found == wanted
    finally:
        backend.close()
