"""`edgert plan MODEL.onnx`: planned and written, or refused with the reason."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from edgert.cli import main
from edgert.cli.plan_onnx import dimensions
from edgert.errors import ConfigError
from edgert.loading import model_path
from make_model import Request, make_model
from onnx_builders import externalised, small_network, write
from partition.manifest_file import read_manifest

PHONE = "snapdragon-8-elite-phone"


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_plan_is_explained_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = externalised(small_network(), tmp_path, "m")
    out_path, page = tmp_path / "plan.json", tmp_path / "plan.html"
    code, out, _ = outcome(
        capsys, "plan", str(path), "--device", PHONE, "--dimension", "batch=2", "--explain",
        "-o", str(out_path), "--report", str(page), "--trace", str(tmp_path / "trace.json"),
    )  # fmt: skip
    assert code == 0
    assert "an inference" in out
    assert "whole model on" in out
    manifest = read_manifest(out_path)
    assert manifest.model.format == "onnx"
    assert [file.path for file in manifest.model.files] == ["model.onnx", "weights.bin"]
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_this_host_plans_with_assumed_rates_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(small_network(), tmp_path)
    code, out, _ = outcome(capsys, "plan", str(path), "--no-measure")
    assert code == 0
    assert "warning: rates of" in out
    assert "dimension batch is open in the file, taken as 1" in out


def test_runtime_refuses_by_what_the_manifest_requires(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out_path = write(small_network(), tmp_path), tmp_path / "plan.json"
    assert outcome(capsys, "plan", str(path), "--no-measure", "-o", str(out_path))[0] == 0
    code, _, err = outcome(capsys, "run", str(out_path), "-p", "hello")
    assert code == 4
    assert "onnx" in err


@pytest.mark.parametrize(
    ("content", "arguments", "code", "said"),
    [
        (b"\x08\x07 no model", [], 3, "model.onnx"),
        (b"", [], 3, "model.onnx"),
        (None, ["--dimension", "batch"], 2, "NAME=N"),
        (None, ["--dimension", "batch=0"], 2, "1 to"),
        (None, ["--dimension", "depth=2"], 2, "depth"),
        (None, ["--pareto"], 2, "--pareto"),
        (None, ["--stay", "0:1=x"], 2, "--stay"),
        (None, ["--memory", "1M"], 4, "bytes"),
    ],
)
def test_wrong_requests_and_files_are_refused_with_the_reason(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: bytes | None,
    arguments: list[str],
    code: int,
    said: str,
) -> None:  # fmt: skip
    path = write(small_network(), tmp_path)
    if content is not None:
        path.write_bytes(content)
    found, _, err = outcome(capsys, "plan", str(path), "--no-measure", *arguments)
    assert (found, said in err) == (code, True), err


@pytest.mark.parametrize(
    "value", ["0" * 5000, "0" * 5000 + "1" * 11, "000000000019999999999", "2147483648", "9" * 5000],
    ids=range(5),
)  # fmt: skip
def test_dimension_beyond_what_a_shape_holds_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match="wanted 1 to 2147483647") as caught:
        dimensions((f"batch={value}",))
    assert len(caught.value.message) < 150


def test_dimension_may_begin_with_zeros() -> None:
    assert dimensions(("batch=" + "0" * 5000 + "7", "a=b=2147483647")) == {
        "batch": 7, "a=b": 2147483647,
    }  # fmt: skip


def test_model_and_its_data_may_be_links_in_one_folder_and_not_out_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real = externalised(small_network(), tmp_path, "m")
    folder = tmp_path / "links"
    folder.mkdir()
    link, data = folder / "linked.onnx", folder / "weights.bin"
    link.symlink_to(real)
    code, _, err = outcome(capsys, "plan", str(link), "--no-measure")
    assert (code, "'weights.bin' is missing" in err, "beside the model" in err) == (3, True, True)
    data.symlink_to(tmp_path / "weights.bin")
    code, _, err = outcome(capsys, "plan", str(link), "--no-measure")
    assert (code, "leads out of its folder" in err) == (3, True)
    data.unlink()
    data.write_bytes((tmp_path / "weights.bin").read_bytes())
    out_path = tmp_path / "plan.json"
    assert outcome(capsys, "plan", str(link), "--no-measure", "-o", str(out_path))[0] == 0
    files = read_manifest(out_path).model.files
    assert [file.path for file in files] == ["linked.onnx", "weights.bin"]


@pytest.mark.parametrize("flag", ["-o", "--report", "--trace"])
def test_result_never_replaces_the_data_of_a_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    path = externalised(small_network(), tmp_path, "m")
    data = tmp_path / "weights.bin"
    before = data.read_bytes()
    code, _, err = outcome(
        capsys, "plan", str(path), "--no-measure", "--force", flag, str(data)
    )  # fmt: skip
    assert (code, "is what the plan is made from" in err) == (2, True)
    assert data.read_bytes() == before


def test_result_never_replaces_a_later_shard(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = make_model(Request("tiny", tmp_path / "m.gguf", n_shards=2))
    before = second.read_bytes()
    code, _, err = outcome(
        capsys, "plan", str(first), "--no-measure", "-c", "256", "--force", "-o", str(second)
    )
    assert (code, "is what the plan is made from" in err) == (2, True)
    assert second.read_bytes() == before


def test_dimension_is_refused_for_language_models(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(
        capsys, "plan", str(model_path(None)), "--no-measure", "--dimension", "batch=1"
    )
    assert (code, "ONNX" in err) == (2, True)


def test_plan_of_a_language_model_does_not_load_onnx() -> None:
    script = (
        "import sys\nfrom edgert.cli.main import run\n"
        f"code = run(['plan', {str(model_path(None))!r}, '--no-measure', '-c', '256'])\n"
        "sys.exit(code or ('onnx' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
