"""`edgert plan MODEL --back FILE`: which files it takes, what it writes, what it refuses."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest

from builders import array, spm_tokens
from builders_plan import BOARD, PI
from edgert.codec_bounds import CodecBound, keep_bound
from edgert.config import directories
from edgert.errors import FormatError
from edgert.model_variants import check_same_model
from edgert.weights.packed import model_key
from part_models import SHAPES, random_model
from partition.manifest import Manifest
from partition.manifest_file import read_manifest, violations
from planned_models import outcome
from quant.metadata import ValueType
from quant.tensor_file import open_tensor_file

HOSTS = ("--device", PI, "--device", BOARD, "-c", "512", "--prompt-tokens", "32")


@pytest.fixture
def files(random_models: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """One model in three precisions."""
    names = {"q4": "plain", "q8": "q8_0", "f16": "f16"}
    return {
        name: Path(shutil.copy(random_models[made], tmp_path / f"{name}.gguf"))
        for name, made in names.items()
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_manifest_has_the_model_of_home_and_the_variant_of_the_other_host(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "plan.json"
    code, text, err = outcome(
        capsys, "plan", str(files["q4"]), "--back", str(files["f16"]), *HOSTS,
        "--codecs", "f16", "--explain", "-o", str(out),
    )  # fmt: skip
    assert code == 0, err
    manifest = read_manifest(out)
    assert [file.sha256 for file in manifest.model.files] == [sha256(files["q4"])]
    assert [[f.path for f in item.files] for item in manifest.variants] == [["f16.gguf"]]
    assert manifest.variants[0].files[0].sha256 == sha256(files["f16"])
    assert [(stage.host_id, stage.variant) for stage in manifest.stages] == [(PI, None), (BOARD, 0)]
    assert {(t.kind, t.codec) for t in manifest.transport} == {("service", "f16")}
    assert "edge_cloud" in manifest.requires
    assert "precision at home: q4.gguf, 4.5 bits a weight" in text
    assert "where the model is cut: after 3 of 4 layers" in text


def test_plan_chooses_among_files_for_both_sides(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    both = [str(files[name]) for name in ("q8", "f16")]
    code, out, _ = outcome(
        capsys, "plan", str(files["f16"]), "--front", str(files["q4"]), "--back", both[1],
        "--back", both[0], *HOSTS, "--json",
    )  # fmt: skip
    assert code == 0
    made = json.loads(out)
    assert made["model"]["files"][0]["path"] == "q4.gguf"
    assert made["variants"][0]["files"][0]["path"] == "q8.gguf"
    code, out, _ = outcome(
        capsys, "plan", str(files["q4"]), "--back", str(files["q4"]), *HOSTS, "--json"
    )
    assert (code, "variants" in json.loads(out)) == (0, False)


def test_bound_that_was_calibrated_for_the_cut_is_taken(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(files["q4"]), "--back", str(files["q8"]), *HOSTS, "--json"]
    command += ["--codecs", "adaptive"]
    assert json.loads(outcome(capsys, *command)[1])["transport"][0]["bound"] == 0.1
    key = model_key(open_tensor_file(files["q4"]))
    found = CodecBound(
        model=key, cut=1, bound=0.25, quality=0.99, basis=None, text_bytes=1, bytes_per_token=1,
        reference_perplexity=10, perplexity=10.1, bytes_per_batched_token=1, f16_bytes=512,
    )  # fmt: skip
    keep_bound(directories(os.environ).cache / "codecs", found, None)
    assert json.loads(outcome(capsys, *command)[1])["transport"][0]["bound"] == 0.25


def test_context_is_halved_where_the_longest_does_not_fit(
    files: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["plan", str(files["q4"]), "--back", str(files["q4"]), "--device", PI]
    command += ["--device", BOARD, "-c", str(1 << 20), "--memory", "170M", "--json"]
    code, _, err = outcome(capsys, *command)
    assert (code, "context 1048576" in err) == (4, True), err
    code, out, err = outcome(capsys, *command, "--least-context", "256")
    assert code == 0, err
    assert 256 <= json.loads(out)["run"]["n_ctx"] < 1 << 20
    assert violations(Manifest.model_validate_json(out)) == ()


def test_fallback_of_a_cut_is_the_file_of_home_alone(
    files: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, alone = tmp_path / "plan.json", tmp_path / "alone.json"
    code, _, err = outcome(
        capsys, "plan", str(files["q4"]), "--back", str(files["q8"]), *HOSTS, "-o", str(out),
        "--fallback", str(alone),
    )  # fmt: skip
    assert code == 0, err
    fallback = read_manifest(out).policies.fallback
    assert fallback is not None
    assert fallback.path == "alone.json"
    assert read_manifest(alone).model == read_manifest(out).model
    assert read_manifest(alone).variants == ()


def test_flags_and_files_that_make_no_cut_are_refused(
    files: dict[str, Path], random_models: dict[str, Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "other").mkdir()
    twin = shutil.copy(files["q8"], tmp_path / "other" / "q4.gguf")
    deep = random_model(SHAPES["llama"]).write(tmp_path / "deep.gguf")
    other = random_model(SHAPES["qwen2"]).write(tmp_path / "qwen2.gguf")
    back = ["--back", str(files["f16"])]
    cases: list[tuple[list[str], int, str]] = [
        (back, 2, "--back wants another host"),
        ([*back, "--device", PI], 2, f"{PI} is the only one"),
        (["--front", str(files["f16"]), *HOSTS], 2, "--front is for plans with one cut"),
        (["--least-context", "256", *HOSTS], 2, "--least-context is for plans with one cut"),
        ([*back, *HOSTS, "--codecs", "f8"], 2, "'f8' is no codec"),
        ([*back, *HOSTS, "--codecs", ","], 2, "'nothing' is no codec"),
        ([*back, *HOSTS, "--least-context", "32"], 2, "leaves no room for a reply"),
        ([*back, *HOSTS, "--pareto"], 2, "--pareto does not compare cuts"),
        ([*back, *HOSTS, "-o", str(files["f16"]), "--force"], 2, "is what the plan is made from"),
        ([*back, *HOSTS, "--may-leave", "logits"], 4, "hidden states may not leave home"),
        (["--back", str(tmp_path / "none.gguf"), *HOSTS], 2, "no such file"),
        (["--back", str(twin), *HOSTS], 2, "has the name of"),
        (["--back", str(deep), *HOSTS], 3, "width of hidden states: 64, wanted 256 as q4.gguf"),
        (["--back", str(other), *HOSTS], 3, "architecture: qwen2, wanted llama as q4.gguf has"),
        (["--back", str(random_models["experts"]), *HOSTS], 3, "architecture: qwen3moe, wanted"),
    ]
    before = files["f16"].read_bytes()
    for flags, wanted, message in cases:
        code, out, err = outcome(capsys, "plan", str(files["q4"]), *flags)
        assert (code, out, message in err) == (wanted, "", True), (flags, err)
    assert files["f16"].read_bytes() == before


def test_another_tokenizer_is_another_model(tmp_path: Path) -> None:
    model = random_model(SHAPES["llama"])
    one = open_tensor_file(model.write(tmp_path / "one.gguf"))
    check_same_model(one, open_tensor_file(model.write(tmp_path / "two.gguf")))
    texts = spm_tokens()[0]
    swapped = [*texts[:-2], texts[-1], texts[-2]]
    other = model.with_pair(array("tokenizer.ggml.tokens", ValueType.STRING, swapped))
    with pytest.raises(FormatError, match="sha256 of the tokenizer"):
        check_same_model(one, open_tensor_file(other.write(tmp_path / "three.gguf")))
