"""What experts did is told by layer and over time: in a reply's line, a benchmark and a trace."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.cli.bench_experts import MOST_PASSES, PassLog, in_words, summary
from edgert.cli.reply import experts_line, statistics_line
from edgert.engine import Engine, EngineSettings
from edgert.experts.tally import Tally
from edgert.llama.backend import Counters, ExpertCounters, ExpertCounts
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.recorder import Recorder, Tape
from edgert.timeline import chrome_trace
from fakes import FakeBackend

BUDGET = 6 << 20


class Counting(FakeBackend):
    """Every pass wants 8 experts, misses 2 and reads 300 bytes, 100 of them guessed."""

    tally = Tally(2)

    def decode(
        self, tokens: Sequence[int], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        tally = self.tally
        for turn in range(2):
            tally.wanted(turn, 4)
            tally.used(turn, 1000, 4500.0)
        for _ in range(2):
            tally.missed(1, 100)
            tally.read(1, 100)
        tally.read(1, 100)
        tally.begun_early(1, 100)
        tally.saved(1, 50)
        tally.stalled(1, 0.25)
        return super().decode(tokens, first_position, n_logits)

    def counters(self) -> Counters:
        one = super().counters()
        values = {name: getattr(one, name) for name in Counters.__slots__}
        return Counters(**values | {"experts": self.tally.counters([3, 5])})


@pytest.fixture
def counting() -> Counting:
    backend = Counting()
    backend.tally = Tally(2)
    return backend


def test_counters_add_up_by_layer_and_subtract(counting: Counting) -> None:
    counting.decode([1], 0, 1)
    before = counting.counters().experts
    counting.decode([1], 1, 1)
    after = counting.counters().experts
    assert before is not None
    assert after is not None
    since = after.since(before)
    assert since.layers == (3, 5)
    assert since.by_layer[0] == ExpertCounts(wanted=4, used_weights=1000, used_bits=4500.0)
    assert since.total == ExpertCounts(8, 2, 300, 100, 50, 0.25, 2000, 9000.0)
    assert (since.total.hit_rate, since.total.bits_per_weight) == (0.75, 4.5)
    assert after.since(None) == after
    nothing = ExpertCounts()
    assert (nothing.hit_rate, nothing.bits_per_weight) == (None, None)


def test_line_of_a_reply_tells_hits_bytes_bits_and_waits() -> None:
    counts = ExpertCounts(1000, 27, 8_200_000, 0, 0, 0.12, 100, 450.0)
    wanted = "experts 97.3 % hits, 4.1 MB/token, 4.5 bits, stalled 6 %"
    assert experts_line(counts, 2, 2.0) == wanted


def test_record_has_totals_layers_and_passes(counting: Counting) -> None:
    log = PassLog(counting, lambda: 0.0)
    for position in range(3):
        counting.decode([1], position, 1)
        log.note()
    counters = log.counters()
    assert counters is not None
    row = summary([counters], log.passes, 3, 3.0)
    assert row["expert_hit_rate"] == 0.75
    assert row["expert_bytes_read_per_token"] == 300
    assert row["expert_stall_share"] == 0.25
    layers, passes = row["samples_experts_by_layer"], row["samples_experts_by_pass"]
    assert isinstance(layers, list)
    assert isinstance(passes, list)
    assert [(one["layer"], one["hit_rate"]) for one in layers] == [(3, 1.0), (5, 0.5)]
    assert [one["bytes_read"] for one in passes] == [300, 300, 300]
    words = in_words(row)
    assert words is not None
    assert words.startswith("experts: 75.0 % hits, 0.0 MB/token, 4.5 bits, stalled 25 %")


def test_log_of_passes_is_bounded(counting: Counting) -> None:
    log = PassLog(counting, lambda: 0.0)
    for _ in range(MOST_PASSES + 5):
        log.note()
    assert len(log.passes) == MOST_PASSES


def test_models_without_streamed_experts_have_no_figures() -> None:
    log = PassLog(FakeBackend(), lambda: 0.0)
    log.note()
    assert (log.passes, log.counters()) == ([], None)
    row = summary([], [], 4, 1.0)
    assert in_words(row) is None
    assert row["expert_bytes_read_per_token"] is None


def test_trace_has_a_track_for_hits_bytes_bits_and_waits_of_each_pass(counting: Counting) -> None:
    tape = Tape()
    backend = Recorder(tape).opened(counting)
    for position in range(2):
        backend.decode([1], position, 1)
    events = json.loads(chrome_trace([tape.timeline()]))["traceEvents"]
    tracks = [(event["name"], event["args"]) for event in events
              if event["ph"] == "C" and event["name"].startswith("expert")]  # fmt: skip
    assert tracks == 2 * [
        ("experts", {"hit": 6, "missed": 2}),
        ("expert bytes", {"needed": 200, "guessed": 50, "guessed in vain": 50}),
        ("expert stall", {"ms": 250.0}),
        ("expert bits", {"per weight": 4.5}),
    ]


@pytest.mark.model
def test_reply_of_a_model_counts_its_experts(random_models: dict[str, Path]) -> None:
    path = random_models["experts"]
    options = LoadOptions(path, weight_memory_bytes=BUDGET, n_ctx=64, n_threads=1)
    backend = open_backend(options)
    engine = Engine(backend, EngineSettings("m", chat_template=None))
    try:
        stats = engine.complete("hello", max_tokens=6).stats
        found = backend.counters()
    finally:
        engine.close()
    experts = stats.experts
    assert isinstance(experts, ExpertCounters)
    assert len(experts.by_layer) == 4
    assert experts.layers == (0, 1, 2, 3)
    # Two of 8 experts, three matrices each, in four layers; the first token is of the prompt.
    assert experts.total.wanted == stats.n_passes * 2 * 3 * 4
    assert experts.total.bits_per_weight == 4.5  # Q4_0: 18 bytes for 32 weights
    assert "experts " in statistics_line(stats)
    assert found.experts is not None
    total = found.experts.total
    assert total.early_bytes >= total.saved_bytes >= 0
    assert total.bytes_read >= total.early_bytes
    sums = [sum(one.bytes_read for one in found.experts.by_layer), total.bytes_read]
    assert sums[0] == sums[1]


@pytest.mark.model
def test_resident_model_has_no_counters(random_models: dict[str, Path]) -> None:
    backend = open_backend(LoadOptions(random_models["experts"], n_ctx=64, n_threads=1))
    try:
        assert backend.counters().experts is None
    finally:
        backend.close()
