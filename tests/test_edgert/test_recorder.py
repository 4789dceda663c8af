"""The recording of a real run agrees with its counters, is bounded, and changes no result."""

from __future__ import annotations

import itertools
import json
import os
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from edgert.errors import BackendError, ConfigError
from edgert.llama.backend import Backend, Counters
from edgert.llama.lib import NativeLog
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.observer import UNOBSERVED, RunObserver
from edgert.recorded_backend import RecordedBackend
from edgert.recorder import Recorder, Tape
from edgert.timeline import Span, Timeline, chrome_trace
from edgert.trace_file import check_writable, record_to
from fakes import FakeBackend

PROMPT = [300, 301, 302]
N_SINGLES = 4


def run(path: Path, observer: RunObserver, weight_bytes: int | None) -> tuple[bytes, Counters]:
    backend = open_backend(
        LoadOptions(path, weight_memory_bytes=weight_bytes, n_ctx=64, n_threads=1),
        observer=observer,
    )
    try:
        logits = [np.asarray(backend.decode(PROMPT, 0, 1)).tobytes()]
        positions = range(len(PROMPT), len(PROMPT) + N_SINGLES)
        logits += [np.asarray(backend.decode([280], at, 1)).tobytes() for at in positions]
        return b"".join(logits), backend.counters()
    finally:
        backend.close()


@pytest.fixture(scope="module")
def streamed(random_models: dict[str, Path]) -> tuple[Timeline, Counters, bytes, bytes]:
    """A recorded run that streams, its counters and logits, and the logits without recording."""
    path = random_models["plain"]
    recorder = Recorder(Tape())
    logits, counters = run(path, recorder, 5_500_000)
    plain, _ = run(path, UNOBSERVED, 5_500_000)
    return recorder.tape.timeline(), counters, logits, plain


def spans(timeline: Timeline, lane: str) -> list[Span]:
    return [span for span in timeline.spans if span.lane == lane]


def load_of(timeline: Timeline) -> Span:
    (load,) = (span for span in timeline.spans if span.name == "load")
    return load


@pytest.mark.model
def test_reads_after_loading_are_the_bytes_that_were_counted(
    streamed: tuple[Timeline, Counters, bytes, bytes],
) -> None:
    timeline, counters, _, _ = streamed
    load = load_of(timeline)
    reads = [s for s in spans(timeline, "flash") if s.start_s >= load.end_s]
    assert sum(span.n_bytes or 0 for span in reads) == counters.bytes_read > 0
    names = {span.name for span in reads}
    assert {"output.weight", "blk.0.ffn_up.weight", "token_embd.weight"} <= names


@pytest.mark.model
def test_waits_are_the_stalls_that_were_counted(
    streamed: tuple[Timeline, Counters, bytes, bytes],
) -> None:
    timeline, counters, _, _ = streamed
    waited_s = sum(span.end_s - span.start_s for span in spans(timeline, "wait"))
    assert waited_s == pytest.approx(counters.stall_s, abs=1e-6)


@pytest.mark.model
def test_every_pass_is_a_span_and_no_span_runs_backwards(
    streamed: tuple[Timeline, Counters, bytes, bytes],
) -> None:
    timeline, counters, _, _ = streamed
    assert all(0 <= span.start_s <= span.end_s for span in timeline.spans)
    passes = [s for s in spans(timeline, "compute") if s.name != "load"]
    assert [s.name for s in passes] == ["tokens 0 to 2", *(f"token {i}" for i in range(3, 7))]
    for first, second in itertools.pairwise([load_of(timeline), *passes]):
        assert first.end_s <= second.start_s
    for wait in spans(timeline, "wait"):
        assert any(p.start_s <= wait.start_s and wait.end_s <= p.end_s for p in passes)
    measured_s = sum(s.end_s - s.start_s for s in passes)
    assert counters.decode_s <= measured_s
    assert counters.n_passes == len(passes)


@pytest.mark.model
def test_memory_is_known_after_loading_and_after_every_pass(
    streamed: tuple[Timeline, Counters, bytes, bytes],
) -> None:
    timeline, counters, _, _ = streamed
    assert len(timeline.memory) == 1 + 1 + N_SINGLES
    held = timeline.memory[-1].held_bytes
    assert list(held) == ["pinned", "window", "kv cache", "compute buffers", "process"]
    assert held["pinned"] + held["window"] == counters.resident_weight_bytes
    assert held["kv cache"] == 256 * 4 * 2 * 128 * 2  # positions x layers x (K, V) x length x f16
    assert sum(held.values()) - held["process"] < held["process"]


@pytest.mark.model
def test_recording_changes_no_logit(streamed: tuple[Timeline, Counters, bytes, bytes]) -> None:
    _, _, logits, plain = streamed
    assert logits == plain


@pytest.mark.model
def test_trace_of_a_run_follows_the_event_format(
    streamed: tuple[Timeline, Counters, bytes, bytes],
) -> None:
    events = json.loads(chrome_trace([streamed[0]]))["traceEvents"]
    assert {event["ph"] for event in events} == {"X", "C", "M"}
    for event in events:
        assert isinstance(event["name"], str)
        assert isinstance(event["pid"], int)
        if event["ph"] == "X":
            assert event["ts"] >= 0
            assert event["dur"] >= 0
            assert isinstance(event["tid"], int)
        if event["ph"] == "C":
            assert all(isinstance(value, int) for value in event["args"].values())
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] == "X"} <= named


@pytest.mark.model
def test_a_model_in_memory_reads_every_weight_once_while_loading(
    random_models: dict[str, Path],
) -> None:
    recorder = Recorder(Tape())
    _, counters = run(random_models["plain"], recorder, None)
    timeline = recorder.tape.timeline()
    load = load_of(timeline)
    reads = spans(timeline, "flash")
    assert sum(span.n_bytes or 0 for span in reads) == counters.weight_bytes
    assert all(load.start_s <= span.start_s <= span.end_s <= load.end_s for span in reads)
    assert spans(timeline, "wait") == []


def test_recording_is_bounded_and_counts_what_it_drops() -> None:
    ticks = itertools.count()
    tape = Tape(lambda: float(next(ticks)), most_spans=2)
    for index in range(5):
        tape.add(Span("model", "compute", f"token {index}", index + 1.0, index + 2.0))
    timeline = tape.timeline()
    assert [span.name for span in timeline.spans] == ["token 0", "token 1"]
    assert [span.start_s for span in timeline.spans] == [1.0, 2.0]
    assert timeline.n_cut == 3


def test_threads_may_record_at_once() -> None:
    tape = Tape()
    recorder = Recorder(tape)

    def read() -> None:
        for index in range(500):
            watch = recorder.reading(f"w{index}", 1)
            watch.began()
            watch.ended()

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(span.n_bytes or 0 for span in tape.timeline().spans) == 2000


def test_a_pass_that_fails_is_recorded_too() -> None:
    recorder = Recorder(Tape())
    inner = FakeBackend(n_ctx=5)
    with pytest.raises(BackendError):
        RecordedBackend(inner, recorder).decode([1], 5, 1)
    assert [span.name for span in recorder.tape.timeline().spans] == ["token 5"]


def test_recorded_backend_passes_everything_on(tmp_path: Path) -> None:
    inner = FakeBackend()
    backend: Backend = RecordedBackend(inner, Recorder(Tape()))
    backend.decode([1, 2, 3], 0, 1)
    backend.truncate(2)
    assert inner.tokens == [1, 2]
    assert (backend.n_ctx, backend.n_batch, backend.n_logits_max) == (
        inner.n_ctx, inner.n_batch, inner.n_logits_max,
    )  # fmt: skip
    assert backend.vocab is inner.vocab
    assert backend.can_shift() == inner.can_shift()
    assert backend.applied() == inner.applied()
    assert backend.counters() == inner.counters()
    backend.save_state_file(tmp_path / "state", [1, 2])
    assert backend.load_state_file(tmp_path / "state") == [1, 2]


def test_trace_is_written_once_when_the_backend_closes(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    backend = record_to(path).opened(FakeBackend())
    backend.decode([1], 0, 1)
    assert not path.exists()
    backend.close()
    names = [event["name"] for event in json.loads(path.read_text())["traceEvents"]]
    assert "token 0" in names
    path.unlink()
    backend.close()
    assert list(tmp_path.iterdir()) == []


def test_an_older_trace_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    path.write_text(chrome_trace([]))
    check_writable(path)
    path.write_text("{}")
    with pytest.raises(ConfigError, match="not a trace"):
        check_writable(path)


@pytest.mark.parametrize("name", ["", "missing/run.json", "folder", "pipe", "file/run.json"])
def test_places_where_no_trace_can_be_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError) as caught:
        record_to(tmp_path / name)
    assert caught.value.hint is not None


def test_llama_log_gives_the_buffers_of_the_last_context() -> None:
    recorder = Recorder(Tape())
    for line in (
        "llama_context: constructing llama_context",
        "llama_kv_cache:        CPU KV buffer size =     4.00 MiB",
        "llama_context: constructing llama_context",
        "llama_kv_cache:        CPU KV buffer size =     8.00 MiB",
        "llama_kv_cache:        CPU KV buffer size =     2.00 MiB",  # of sliding windows
        "llama_context:        CPU  output buffer size =     1.00 MiB",
        "sched_reserve:        CPU compute buffer size =     0.50 MiB",
        "~llama_context:        CPU compute buffer size is   0.4696 MiB, matches expectation",
    ):
        recorder.heard(line)
    recorder.remember(FakeBackend())
    (point,) = recorder.tape.timeline().memory
    assert point.held_bytes["kv cache"] == 10 << 20
    assert point.held_bytes["compute buffers"] == 3 << 19


def test_lines_that_another_thread_causes_are_not_heard() -> None:
    log, mine, others = NativeLog(), list[str](), list[str]()

    def speak() -> None:
        with log.heard_by(others.append):
            log.receive(1, b"of the other", None)

    with log.heard_by(mine.append):
        thread = threading.Thread(target=speak)
        thread.start()
        thread.join()
        log.receive(1, b"of this one", None)
    log.receive(1, b"of nobody", None)
    assert (mine, others) == (["of this one"], ["of the other"])


def test_trace_is_written_in_little_more_memory_than_it_was_recorded_in(tmp_path: Path) -> None:
    recorder = record_to(tmp_path / "trace.json")
    for index in range(20_000):
        recorder.add("flash", f"blk.{index % 99}.ffn_up.weight", index, index + 0.5, 4096)
    tracemalloc.start()
    recorder.finish()
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) > 20_000
    assert peak_bytes < 20_000 * 200
