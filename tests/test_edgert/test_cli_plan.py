"""`edgert plan`: what it writes and where, and what it refuses."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from partition.manifest_file import read_manifest
from planned_models import outcome


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
