"""`edgert plan`, and running what it wrote: executed exactly, or refused with the reason."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import builders_devices as build
import edgert
from devices.discover import fingerprint
from devices.host import n_usable_cpus
from devices.store import ProfileStore
from edgert import deployment
from edgert.cli import main
from edgert.cli.this_host import types_of
from edgert.config import directories
from edgert.llama.build import kernel_build
from edgert.loading import model_path
from partition.manifest import Prediction, Signature
from partition.manifest_file import canonical_json, read_manifest, write_manifest
from quant.tensor_file import open_tensor_file

MEASURED = (
    "load_ms", "ttft_ms", "tpot_ms", "decode_tok_s", "peak_memory_bytes", "bytes_read_per_token",
    "bytes_sent_per_token",
)  # fmt: skip


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A copy of the embedded model, so that a test may damage it."""
    return Path(shutil.copy(model_path(None), tmp_path / "chat.gguf"))


@pytest.fixture
def planned(model: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A manifest for this host; rates are assumed, which the plan says."""
    path = model.parent / "plan.json"
    code, out, _ = outcome(
        capsys, "plan", str(model), "--no-measure", "-c", "256", "--memory", "2000M",
        "--prompt-tokens", "32", "-o", str(path),
    )  # fmt: skip
    assert (code, "warning: rates" in out) == (0, True)
    return path


def streaming(path: Path, model: Path) -> Path:
    """Rewrite a manifest so that some weights stream; everything else stays as it was."""
    manifest = read_manifest(path)
    (stage,) = manifest.stages
    layers = [name for name in stage.tiers.pinned if name.startswith(("blk.1.ffn", "blk.2.ffn"))]
    matrices = tuple(name for name in layers if "norm" not in name)
    tiers = stage.tiers.model_copy(
        update={
            "layout": "file",
            "streamed": matrices,
            "pinned": tuple(name for name in stage.tiers.pinned if name not in matrices),
            "window_bytes": 8 << 20,
        }
    )
    changed = manifest.model_copy(
        update={
            "stages": (stage.model_copy(update={"tiers": tiers}),),
            "requires": ("streaming",),
        }
    )
    out = model.parent / "streaming.json"
    write_manifest(changed, out, replace=False)
    return out


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


def altered(path: Path, **changes: object) -> Path:
    """Write a copy of a manifest in which the host or something at the top is different."""
    manifest = read_manifest(path)
    host_changes = {k: v for k, v in changes.items() if k == "fingerprint"}
    top = {k: v for k, v in changes.items() if k != "fingerprint"}
    host = manifest.hosts[0].model_copy(update=host_changes)
    changed = manifest.model_copy(update={"hosts": (host,), **top})
    out = path.parent / "altered.json"
    out.write_bytes(canonical_json(changed))
    return out


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


def remember_figures() -> None:
    """Store figures of this host as if measured before: measuring wants a quiet machine."""
    kernels = [build.kernel(name) for name in types_of(open_tensor_file(model_path(None)))]
    mark = fingerprint(kernel_build(), n_usable_cpus())
    host = build.host(fingerprint=mark).model_copy(update={"devices": (build.device(*kernels),)})
    ProfileStore(directories(os.environ).cache / "devices", mark).save(host)


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


def test_plan_is_not_written_over_a_file_unless_forced(
    planned: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = planned.read_bytes()
    arguments = ("plan", str(model), "--no-measure", "-c", "128", "-o", str(planned))
    code, _, err = outcome(capsys, *arguments)
    assert (code, "--force" in err, planned.read_bytes() == before) == (2, True, True)
    assert outcome(capsys, *arguments, "--force")[0] == 0
    assert planned.read_bytes() != before


def test_plan_writes_report_and_trace_beside_the_manifest(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report, trace = model.parent / "plan.html", model.parent / "plan.trace.json"
    code, out, _ = outcome(
        capsys, "plan", str(model), "--no-measure", "-c", "128", "--explain",
        "--report", str(report), "--trace", str(trace),
    )  # fmt: skip
    assert code == 0
    assert "baselines:" in out
    assert report.read_text().startswith("<!DOCTYPE html>") or "<html" in report.read_text()
    assert json.loads(trace.read_text())["traceEvents"]


@pytest.mark.parametrize("flag", ["--report", "--trace", "-o"])
def test_result_replaces_no_file_that_the_plan_is_made_from(
    model: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    link, other = model.parent / "link", model.parent / "other.json"
    link.symlink_to(model)
    other.write_text("{}")
    before = model.read_bytes()
    for read, target in (
        ([], model),
        ([], link),
        (["--topology", str(other)], other),
        (["--no-measure", "--routing-trace", str(other)], other),
    ):
        code, out, err = outcome(
            capsys, "plan", str(model), *read, flag, str(target), "--force", "-c", "128"
        )
        assert (code, out, "is what the plan is made from" in err) == (2, "", True), err
    assert (model.read_bytes(), other.read_text()) == (before, "{}")


@pytest.mark.parametrize("flag", ["--report", "--trace"])
def test_existing_result_is_replaced_by_force_only(
    model: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    path = model.parent / "result"
    path.write_text("mine")
    arguments = ("plan", str(model), "--no-measure", "-c", "128", flag, str(path))
    code, out, err = outcome(capsys, *arguments)
    assert (code, out, "--force" in err, path.read_text()) == (2, "", True, "mine")
    assert outcome(capsys, *arguments, "--force")[0] == 0
    assert path.read_text() != "mine"


def test_two_results_in_one_file_are_refused(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, same = model.parent / "a", model.parent / "." / "b" / ".." / "a"
    (model.parent / "b").mkdir()
    pairs = (("--report", "--trace"), ("-o", "--report"), ("-o", "--trace"))
    for first, second in pairs:
        code, out, err = outcome(
            capsys, "plan", str(model), "--no-measure", "-c", "128", first, str(path), second,
            str(same), "--force",
        )  # fmt: skip
        assert (code, out, "goes too" in err) == (2, "", True)
    assert not path.exists()


@pytest.mark.parametrize("flag", ["--report", "--trace", "-o"])
def test_result_goes_into_no_fifo_device_or_folder_even_by_force(
    model: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    fifo = model.parent / "fifo"
    os.mkfifo(fifo)
    for target in (fifo, Path("/dev/null"), model.parent):
        code, out, err = outcome(
            capsys, "plan", str(model), "--no-measure", "-c", "128", flag, str(target), "--force"
        )
        assert (code, out, "cannot be written there" in err) == (2, "", True)
    assert fifo.is_fifo()


@pytest.mark.parametrize(
    ("flags", "code", "word"),
    [
        (["--max-tpot", "0.0000001"], 2, "--max-tpot"),
        (["--max-tpot", "0.00001"], 4, "tpot_s"),
        (["--memory", "10M"], 4, "bytes"),
        (["--cache-types", "q9"], 2, "q9"),
        (["--stay", "nonsense"], 2, "FIRST:END=HOST"),
        (["--stay", "0:1=nowhere"], 2, "no host nowhere"),
        (["--device", "no-such-device"], 2, "no-such-device"),
        (["--topology", "missing.json"], 2, "missing.json"),
        (["--topology", "x.json", "--device", "pixel-8-pro"], 2, "exclude"),
        (["--routing-trace", "missing.jsonl"], 2, "missing.jsonl"),
        (["-o", "/nonexistent/plan.json"], 2, "/nonexistent"),
        (["--may-leave", "everything"], 2, "everything"),
    ],
)
def test_impossible_request_is_an_error_that_names_it(
    model: Path, capsys: pytest.CaptureFixture[str], flags: list[str], code: int, word: str
) -> None:
    devices = ["--device", "raspberry-pi-5-8gb", "--device", "pixel-8-pro"]
    several = devices if "--may-leave" in flags else ["--no-measure"]
    got, out, err = outcome(capsys, "plan", str(model), "-c", "128", *several, *flags)
    assert (got, out) == (code, "")
    assert word in err
    assert sorted(path.name for path in model.parent.iterdir()) == ["chat.gguf"]


def test_pareto_lists_candidates_as_json(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(
        capsys, "plan", str(model), "--no-measure", "-c", "128", "--pareto", "--json"
    )
    rows = json.loads(out)
    assert code == 0
    assert all({"name", "tpot_s", "ttft_s", "memory_bytes"} <= set(row) for row in rows)


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
    """Home's fingerprint must not stand for that of the host with the stage."""
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
    assert (code, "pipeline" in err) == (4, True), err


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


@pytest.mark.model
def test_configured_draft_does_not_stand_against_a_manifest(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = directories(os.environ).config_file
    settings.parent.mkdir(parents=True, exist_ok=True)
    settings.write_text('draft = "ngram"\n')
    code, _, err = outcome(capsys, "run", str(planned), "-p", "x", "-n", "1")
    assert code == 0, err


@pytest.mark.parametrize(("asked", "made"), [("16", 256), ("300", 512)])
def test_context_is_planned_as_llama_cpp_makes_it(
    model: Path, capsys: pytest.CaptureFixture[str], asked: str, made: int
) -> None:
    path = model.parent / "rounded.json"
    code, _, err = outcome(capsys, "plan", str(model), "--no-measure", "-c", asked, "-o", str(path))
    assert code == 0, err
    assert read_manifest(path).run.n_ctx == made
    assert f"context of {made} positions" in err


def test_nothing_sent_is_a_ceiling(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = model.parent / "alone.json"
    code, _, err = outcome(
        capsys, "plan", str(model), "--no-measure", "--max-bytes-sent", "0", "-o", str(path)
    )
    assert code == 0, err
    assert read_manifest(path).goal.ceilings == {"bytes_sent": 0.0}


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
