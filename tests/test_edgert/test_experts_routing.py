"""Routing traces: the same choices however weights are kept, whole or not at all, read by plans."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from edgert.errors import CapacityError, ConfigError
from edgert.experts.routed import Turn
from edgert.experts.routing_trace import RoutingTrace
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from partition.manifest_file import read_manifest
from partition.popularity import read_routing_trace
from planned_models import altered, outcome, remember_figures

TURN = Turn(1, b"ffn_moe_topk-3", 3, ())
CHOICE = np.array([[4, 1], [0, 2]], np.int32)


def record(model: Path, trace: Path, weight_bytes: int | None) -> list[bytes]:
    """Decode a prompt and two tokens; returns the logits."""
    listener = RoutingTrace(trace)
    options = LoadOptions(model, weight_memory_bytes=weight_bytes, n_ctx=64, n_threads=1)
    backend = open_backend(options, routing=listener)
    try:
        assert backend.counters().layout == "repacked"
        logits = [backend.decode([300, 301, 302], 0, 1).tobytes()]
        logits += [backend.decode([310 + i], 3 + i, 1).tobytes() for i in range(2)]
    finally:
        backend.close()
        listener.close()
    return logits


@pytest.mark.model
def test_choices_are_the_same_resident_and_streamed(
    random_models: dict[str, Path], tmp_path: Path
) -> None:
    model = random_models["experts"]
    traces = [tmp_path / name for name in ("resident", "streamed")]
    resident = record(model, traces[0], None)
    assert record(model, traces[1], 15 << 20) == resident
    assert traces[0].read_bytes() == traces[1].read_bytes()
    backend = open_backend(LoadOptions(model, n_ctx=64, n_threads=1))
    try:  # and listening changes nothing
        assert backend.decode([300, 301, 302], 0, 1).tobytes() == resident[0]
    finally:
        backend.close()
    lines = [json.loads(line) for line in traces[0].read_text().splitlines()]
    # Only the last token of the prompt is computed in the last layer.
    assert Counter(line["layer"] for line in lines) == {0: 5, 1: 5, 2: 5, 3: 3}
    assert {len(set(line["experts"])) for line in lines} == {2}
    popularity = read_routing_trace(traces[0], 4, 8, 2)
    assert [sum(layer) for layer in popularity.layers] == pytest.approx([2.0] * 4)


@pytest.mark.model
def test_model_without_experts_has_nothing_to_trace(random_models: dict[str, Path]) -> None:
    class Nobody:
        def routed(self, turn: Turn, experts: np.ndarray) -> None:
            raise AssertionError(turn, experts)

    with pytest.raises(ConfigError, match="no experts"):
        open_backend(LoadOptions(random_models["plain"], n_ctx=64), routing=Nobody())


@pytest.mark.model
def test_bench_writes_what_plan_reads(
    random_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, trace = str(random_models["experts"]), tmp_path / "routing.jsonl"
    bench = ["bench", model, "-p", "8", "-n", "4", "-r", "1", "-t", "1"]
    code, _, err = outcome(capsys, *bench, "--routing-trace", str(trace))
    assert code == 0, err
    assert read_routing_trace(trace, 4, 8, 2).kind == "trace"
    plan = tmp_path / "plan.json"
    code, out, _ = outcome(
        capsys, "plan", model, "--no-measure", "-c", "256", "--memory", "2000M",
        "--prompt-tokens", "32", "--routing-trace", str(trace), "-o", str(plan),
    )  # fmt: skip
    assert code == 0, out
    again = tmp_path / "again.jsonl"
    code, _, err = outcome(
        capsys,
        "bench",
        "-m",
        model,
        "--manifest",
        str(plan),
        "-n",
        "2",
        "--routing-trace",
        str(again),
    )
    assert code == 0, err
    assert read_routing_trace(again, 4, 8, 2).kind == "trace"
    code, out, _ = outcome(capsys, "experts", model, str(trace), "--json")
    assert code == 0
    assert json.loads(out)["replays"][0]["n_experts"] == 8


@pytest.mark.parametrize("name", ["", ".", "missing/routing.jsonl", "model.gguf"])
def test_wrong_place_is_refused_before_the_model_is_read(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"no model")  # reading it would be exit code 3
    monkeypatch.chdir(tmp_path)
    code, _, err = outcome(capsys, "bench", str(model), "--routing-trace", name)
    assert (code, "hint: " in err) == (2, True)
    assert list(tmp_path.iterdir()) == [model]


def test_model_that_does_not_load_leaves_no_trace(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"no model")
    code, _, _ = outcome(capsys, "bench", str(model), "--routing-trace", str(tmp_path / "r.jsonl"))
    assert code == 3
    assert list(tmp_path.iterdir()) == [model]


def test_trace_takes_the_place_of_a_trace_in_the_end(tmp_path: Path) -> None:
    path = tmp_path / "routing.jsonl"
    path.write_text('{"layer": 0, "experts": [1]}\n')
    trace = RoutingTrace(path)
    trace.routed(TURN, CHOICE)
    assert path.read_text() == '{"layer": 0, "experts": [1]}\n'
    trace.close()
    assert path.read_text() == '{"layer": 3, "experts": [4, 1]}\n{"layer": 3, "experts": [0, 2]}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_full_trace_counts_what_is_missing(tmp_path: Path) -> None:
    trace = RoutingTrace(tmp_path / "routing.jsonl", most_bytes=100)
    for _ in range(3):
        trace.routed(TURN, CHOICE)
    trace.close()
    assert (trace.n_choices, trace.n_cut) == (2, 4)
    assert trace.path.read_bytes().count(b"\n") == 2


def test_full_disk_is_a_typed_error() -> None:
    with pytest.raises((CapacityError, ConfigError)):
        RoutingTrace(Path("/dev/full"))


@pytest.mark.model
def test_replan_keeps_the_trace_that_the_plan_was_made_with(
    random_models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Path(shutil.copy(random_models["experts"], tmp_path / "experts.gguf"))
    trace = tmp_path / "routing.jsonl"
    rows = [
        f'{{"layer": {layer}, "experts": [{token % 3}, 7]}}'
        for token in range(40)
        for layer in range(4)
    ]
    trace.write_text("\n".join(rows))
    path = tmp_path / "plan.json"
    code, _, err = outcome(
        capsys, "plan", str(model), "--no-measure", "-c", "256", "--memory", "2000M",
        "--prompt-tokens", "32", "--routing-trace", str(trace), "-o", str(path),
    )  # fmt: skip
    assert code == 0, err
    trace.unlink()
    path = altered(path, fingerprint="0123456789abcdef")
    wanted = read_manifest(path).routing
    assert wanted is not None
    remember_figures(model)
    code, _, err = outcome(capsys, "run", "--manifest", str(path), "--replan", "-p", "x", "-n", "1")
    assert code == 0, err
    assert "planning anew" in err
    assert read_manifest(path).hosts[0].fingerprint != "0123456789abcdef"
    assert read_manifest(path).routing == wanted
