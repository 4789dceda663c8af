"""Running what `edgert plan` wrote: executed exactly, or refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import edgert
from edgert import deployment
from edgert.config import directories
from partition.manifest import Prediction, Signature
from partition.manifest_file import canonical_json, read_manifest
from planned_models import altered, caching, outcome, remember_figures, streaming
from quant.tensor_file import open_tensor_file

MEASURED = (
    "load_ms", "ttft_ms", "tpot_ms", "decode_tok_s", "peak_memory_bytes", "bytes_read_per_token",
    "bytes_sent_per_token",
)  # fmt: skip


def greedy(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    code, out, err = outcome(
        capsys, "run", *arguments, "-p", "Tell me a story.", "-n", "12", "--temp", "0"
    )
    assert code == 0, err
    return out


@pytest.mark.model
def test_manifest_runs_like_the_model_without_one(
    planned: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = greedy(capsys, str(model), "-c", "256")
    assert greedy(capsys, "--manifest", str(planned)) == plain
    assert greedy(capsys, str(planned)) == plain


@pytest.mark.model
def test_streaming_manifest_streams_exactly_what_it_names(
    planned: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = streaming(planned, model)
    code, out, err = outcome(capsys, "bench", "--manifest", str(path), "--json", "-n", "3")
    assert code == 0, err
    sizes = {entry.name: entry.size_bytes for entry in open_tensor_file(model).tensors}
    wanted = sum(sizes[name] for name in read_manifest(path).stages[0].tiers.streamed)
    read = json.loads(out)["bytes_read_per_token"]
    rows_bytes = 4 * 4096  # pages around looked-up rows and around weights
    assert wanted <= read <= wanted + 6 * rows_bytes


@pytest.mark.model
def test_caching_manifest_runs_like_the_model_in_memory(
    planned_experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = caching(planned_experts)
    bench = ("--json", "-n", "3")
    for manifest, is_cached in ((planned_experts, False), (path, True)):
        code, out, err = outcome(capsys, "bench", "--manifest", str(manifest), *bench)
        assert code == 0, err
        assert (json.loads(out)["expert_hit_rate"] is not None) == is_cached
    assert greedy(capsys, "--manifest", str(path)) == greedy(
        capsys, "--manifest", str(planned_experts)
    )


@pytest.mark.model
def test_bench_puts_predictions_beside_measurements_under_the_same_keys(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = outcome(capsys, "bench", "--manifest", str(planned), "--json", "-n", "4")
    record = json.loads(out)
    assert code == 0
    assert [key for key in MEASURED if key not in record] == []
    assert set(record["predicted"]) == set(MEASURED)
    assert all(key in err for key in record["outside"])


@pytest.mark.model
def test_python_api_runs_a_manifest_and_refuses_options_it_decides(planned: Path) -> None:
    with edgert.load(str(planned)) as engine:
        assert engine.n_ctx == 256
    with pytest.raises(edgert.ConfigError, match="context is 512"):
        edgert.load(str(planned), context=512)


def test_model_of_another_hash_is_refused_with_both_hashes(
    planned: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = read_manifest(planned).model.files[0].sha256
    content = bytearray(model.read_bytes())
    content[-1] ^= 1
    model.write_bytes(content)
    code, _, err = outcome(capsys, "run", "--manifest", str(planned), "-p", "x")
    assert code == 3
    assert wanted in err


def test_missing_model_is_refused_with_the_flag_that_names_it(
    planned: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = model.rename(model.parent / "moved.gguf")
    code, _, err = outcome(capsys, "run", "--manifest", str(planned), "-p", "x")
    assert (code, "-m FILE" in err) == (2, True)
    code, _, err = outcome(
        capsys, "run", "--manifest", str(planned), "-m", str(moved), "-p", "x", "-n", "1"
    )
    assert code == 0, err


def test_manifest_of_another_machine_is_refused_with_both_fingerprints(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = read_manifest(planned).hosts[0].fingerprint
    path = altered(planned, fingerprint="0123456789abcdef")
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x")
    assert code == 4
    assert "0123456789abcdef" in err
    assert str(here) in err
    assert "--replan" in err


@pytest.mark.model
def test_replan_makes_a_new_manifest_and_runs_it(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = altered(planned, fingerprint="0123456789abcdef")
    remember_figures()
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "--replan", "-p", "x", "-n", "1")
    assert code == 0, err
    assert "planning anew" in err
    assert read_manifest(path).hosts[0].fingerprint != "0123456789abcdef"
    assert read_manifest(path).run.n_ctx == 256


def test_plan_for_hardware_that_is_not_here_is_not_run(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model.parent / "phone.json"
    code, out, _ = outcome(
        capsys, "plan", str(model), "--device", "pixel-8-pro", "-c", "256", "-o", str(path)
    )
    assert (code, "declared, not measured" in out) == (0, True)
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x")
    assert code == 4
    assert "Pixel 8 Pro" in err


def test_flag_that_contradicts_the_manifest_is_refused(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in (["--memory", "1G"], ["-c", "64"], ["-t", "1"]):
        code, _, err = outcome(capsys, "run", "--manifest", str(planned), *flags, "-p", "x")
        assert (code, "the manifest decides it" in err) == (2, True)


@pytest.mark.parametrize(
    ("where", "changes"),
    [
        ("$.model.architecture", {"architecture": "qwen2"}),
        ("$.model.weight_bytes", {"weight_bytes": 1}),
        ("$.stages[0].tiers.pinned[0]", {"tensor": "nope.weight"}),
        ("$.stages[0].precision", {"precision": {"q8_0": 1 << 40}}),
        ("$.stages[0].kv_bytes", {"kv_bytes": 1}),
    ],
)
def test_manifest_that_is_not_of_its_model_is_refused_by_path(
    planned: Path, capsys: pytest.CaptureFixture[str], where: str, changes: dict[str, object]
) -> None:
    manifest = read_manifest(planned)
    (stage,) = manifest.stages
    if "tensor" in changes:
        pinned = (changes["tensor"], *stage.tiers.pinned[1:])
        stage = stage.model_copy(
            update={"tiers": stage.tiers.model_copy(update={"pinned": pinned})}
        )
    stage_changes = {k: v for k, v in changes.items() if k in ("precision", "kv_bytes")}
    model_changes = {k: v for k, v in changes.items() if k in ("architecture", "weight_bytes")}
    path = altered(
        planned,
        stages=(stage.model_copy(update=stage_changes),),
        model=manifest.model.model_copy(update=model_changes),
    )
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, where in err) == (3, True), err


@pytest.mark.model
def test_replan_finds_the_model_inside_edgert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remember_figures()
    path = tmp_path / "embedded.json"
    assert outcome(capsys, "plan", "-c", "256", "--memory", "2000M", "-o", str(path))[0] == 0
    changed = altered(path, fingerprint="0123456789abcdef")
    code, _, err = outcome(
        capsys, "run", "--manifest", str(changed), "--replan", "-p", "x", "-n", "1"
    )
    assert code == 0, err
    assert read_manifest(changed).model == read_manifest(path).model


@pytest.mark.model
def test_replan_leaves_the_model_in_the_folder_that_the_manifest_names(
    planned: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remember_figures()
    folder = model.parent / "models"
    folder.mkdir()
    model.rename(folder / model.name)
    identity = read_manifest(planned).model
    (file,) = identity.files
    moved = file.model_copy(update={"path": f"models/{file.path}"})
    identity = identity.model_copy(update={"files": (moved,)})
    changed = altered(planned, fingerprint="0123456789abcdef", model=identity)
    code, _, err = outcome(
        capsys, "run", "--manifest", str(changed), "--replan", "-p", "x", "-n", "1"
    )
    assert code == 0, err
    assert read_manifest(changed).model.files == (moved,)


def test_signature_of_something_else_is_refused_also_without_trusted_keys(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    signature = Signature(public_key="a" * 64, value="b" * 128)
    path = altered(planned, signature=signature)
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, "$.signature.value: not a signature" in err) == (3, True), err


def test_shard_that_was_not_hashed_is_refused(
    planned: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The files that a manifest names are those that are read, all of them and no others."""
    identity = read_manifest(planned).model
    (file,) = identity.files
    other = file.model_copy(update={"path": "other.gguf"})
    shutil.copy(model, model.parent / "other.gguf")
    path = altered(planned, model=identity.model_copy(update={"files": (file, other)}))
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, "other.gguf" in err) == (3, True), err


def test_stage_of_another_host_is_refused_although_home_comes_first(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What another host runs is asked of that host, whose address nobody said."""
    manifest = read_manifest(planned)
    (host,), (stage,) = manifest.hosts, manifest.stages
    board = host.model_copy(update={"host_id": "board"})
    stages = (stage.model_copy(update={"host_id": "board"}),)
    changed = manifest.model_copy(
        update={
            "hosts": (host, board), "stages": stages, "requires": ("pipeline", "resident"),
            "policies": manifest.policies.model_copy(
                update={"may_leave": ("input", "hidden_states", "logits")}
            ),
        }
    )  # fmt: skip
    path = planned.parent / "board.json"
    path.write_bytes(canonical_json(changed))
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, "no address of host board" in err) == (2, True), err


@pytest.mark.model
def test_pinned_weights_beyond_the_memory_that_is_left_are_refused(
    planned: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where some weights stream, the others count all the same."""
    path = streaming(planned, model)
    (stage,) = read_manifest(path).stages
    others = stage.kv_bytes + stage.buffer_bytes + stage.tiers.window_bytes
    nothing = Prediction(value=0, low=0, high=0)
    predicted = read_manifest(path).predicted.model_copy(update={"peak_memory_bytes": nothing})
    path = altered(path, predicted=predicted)
    process = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=0))
    monkeypatch.setattr(deployment.psutil, "Process", lambda: process)
    monkeypatch.setattr(deployment, "available_bytes", lambda: (others + (1 << 20), "a test"))
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "-p", "x", "-n", "1")
    assert (code, "are left (a test)" in err) == (4, True), err


@pytest.mark.parametrize("flags", [["--draft-max", "4"], ["--load-anyway"]])
def test_flags_that_a_manifest_decides_are_refused(
    planned: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    code, _, err = outcome(capsys, "chat", str(planned), *flags, "-p", "x")
    assert (code, "manifest decides it" in err) == (2, True), err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["-p", "16"], "--n-prompt"), (["-r", "2"], "--repetitions"),
        (["--parallel", "2"], "--parallel"), (["-s", "2"], "--seed"),
    ],
)  # fmt: skip
def test_flags_of_benchmarks_that_a_manifest_decides_are_refused_as_a_person_writes_them(
    planned: Path, capsys: pytest.CaptureFixture[str], flags: list[str], named: str
) -> None:
    code, _, err = outcome(capsys, "bench", str(planned), *flags)
    assert (code, f"{named} is given, and the manifest decides it" in err) == (2, True), err


@pytest.mark.model
def test_configured_draft_does_not_stand_against_a_manifest(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = directories(os.environ).config_file
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('draft = "ngram"\n')
    code, _, err = outcome(capsys, "run", str(planned), "-p", "x", "-n", "1")
    assert code == 0, err


@pytest.mark.model
def test_replan_keeps_the_bound_and_the_speculation(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model.parent / "draft.json"
    arguments = ("plan", str(model), "--no-measure", "-c", "256", "--memory", "2000M")
    assert outcome(capsys, *arguments, "--tokens-per-pass", "2", "-o", str(path))[0] == 0
    changed = altered(path, fingerprint="0123456789abcdef")
    remember_figures()
    code, _, err = outcome(
        capsys, "run", "--manifest", str(changed), "--replan", "-p", "x", "-n", "1"
    )
    assert code == 0, err
    again = read_manifest(changed)
    assert again.hosts[0].pools[0].limit_bytes == 2_000_000_000
    assert (again.run.draft, again.run.tokens_per_pass) == ("ngram", 2.0)
    key = "ab" * 32
    code, _, err = outcome(
        capsys, "run", "--manifest", str(changed), "--replan", "--trusted-key", key, "-p", "x"
    )
    assert code == 3, err
