"""`edgert bench`: what is run, what the numbers mean, the forms of the report."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from edgert.cli import opening
from edgert.cli.bench import measure
from edgert.cli.bench_options import BenchFlags
from edgert.cli.bench_report import Run, Sample, Setup, Trial, report
from edgert.errors import Cancelled
from fakes import FakeBackend
from planned_models import outcome

SETUP = Setup(
    model_filename="m.gguf", model_type="llama m", model_size=4_000_000_000, model_n_params=7,
    cpu_info="cpu", n_batch=512, n_ubatch=512, n_threads=2, n_threads_batch=2, type_k="f16",
    type_v="f16", layout="file", streaming=True, budget_bytes=2_000_000_000,
    resident_weight_bytes=1_500_000_000, pinned_bytes=1_000_000_000, load_ms=1500.0,
    peak_memory_bytes=1_900_000_000, peak_group_bytes=None, flash_bytes_per_s=800e6,
)  # fmt: skip
# 10 tokens in 40 s, 2.4 GB each: 24 GB at 0.8 GB/s are 30 s; computing took 40 - 25 = 15 s.
SLOW = Sample(10, 40.0, 10, 40.0, 25.0, 24_000_000_000)
DECODE = Run(SETUP, Trial(0, 10), (SLOW, SLOW), test_time="now")


def test_limit_is_the_slower_of_flash_and_compute() -> None:
    assert DECODE.roofline() == pytest.approx(10 / 30)
    fast = replace(DECODE, setup=replace(SETUP, flash_bytes_per_s=3e9))
    assert fast.roofline() == pytest.approx(10 / 15)


def test_limit_is_unknown_without_the_rate_of_flash() -> None:
    unknown = replace(DECODE, setup=replace(SETUP, flash_bytes_per_s=None))
    assert unknown.roofline() is None
    assert unknown.row()["roofline_fraction"] is None


def test_row_has_the_fields_of_llama_bench_and_of_streaming() -> None:
    row = DECODE.row()
    assert row["avg_ts"] == pytest.approx(0.25)
    assert (row["stddev_ts"], row["samples_ts"]) == (0.0, [0.25, 0.25])
    assert (row["avg_ns"], row["n_gen"], row["n_prompt"]) == (40_000_000_000, 10, 0)
    assert row["tpot_ms"] == pytest.approx(4000)
    assert row["ttft_ms"] is None
    assert row["bytes_read_per_token"] == pytest.approx(2.4e9)
    assert row["stall_ms_per_token"] == pytest.approx(2500)
    assert row["roofline_fraction"] == pytest.approx(0.75)
    assert row["tokens_per_pass"] == 1.0
    wanted = (
        "model_filename model_size n_threads test_time samples_ns load_ms peak_memory_bytes "
        "flash_bytes_per_s roofline_tok_s"
    )
    assert set(wanted.split()) <= set(row)


def test_prefill_reports_the_time_to_the_first_token() -> None:
    run = Run(SETUP, Trial(512, 0), (replace(SLOW, n_tokens=512, n_passes=1),))
    row = run.row()
    assert (row["test"], row["ttft_ms"], row["tpot_ms"]) == ("pp512", 40_000.0, None)
    assert row["tokens_per_pass"] == 512


@pytest.mark.parametrize("form", ["json", "jsonl", "csv", "md"])
def test_every_form_holds_every_run(form: str) -> None:
    text = report([DECODE, DECODE], form)
    match form:
        case "json":
            assert [row["test"] for row in json.loads(text)] == ["tg10", "tg10"]
        case "jsonl":
            assert [json.loads(line)["test"] for line in text.splitlines()] == ["tg10", "tg10"]
        case "csv":
            rows = list(csv.DictReader(io.StringIO(text)))
            assert [row["avg_ts"] for row in rows] == ["0.25", "0.25"]
        case _:
            assert text.count("| tg10 |") == 2
            assert "| 0.25 ± 0.00 | 2.00 GB | 1.50 GB | 2400.0 | 2500.0 | 0.75 |" in text


def test_resident_table_has_no_columns_of_streaming() -> None:
    text = report([replace(DECODE, setup=replace(SETUP, streaming=False))], "md")
    assert "MB/token" not in text


def test_decode_test_feeds_one_token_a_pass_from_an_empty_context() -> None:
    backend = FakeBackend(n_batch=8)
    clock = itertools.count(0.0, 2.0)
    flags = BenchFlags(repetitions=3)
    samples = measure(backend, Trial(0, 5), flags, lambda: next(clock))
    assert [len(tokens) for tokens in backend.passes] == [1] * (1 + 3 * 5)
    assert [(s.n_tokens, s.n_passes, s.duration_s) for s in samples] == [(5, 5, 2.0)] * 3


def test_texts_decoded_together_are_different_and_in_step() -> None:
    backend = FakeBackend(n_batch=8)
    clock = itertools.count(0.0, 2.0)
    (sample,) = measure(backend, Trial(0, 5, 3), BenchFlags(repetitions=1), lambda: next(clock))
    assert [len(tokens) for tokens in backend.passes] == [3] * (1 + 5)
    assert backend.passes[1] == [backend.vocab.bos] * 3
    assert len({tuple(text) for text in zip(*backend.passes[1:], strict=True)}) == 3
    assert (sample.n_tokens, sample.n_passes, sample.duration_s) == (15, 5, 2.0)


def test_rate_of_texts_decoded_together_is_told_in_all_and_of_each() -> None:
    run = Run(SETUP, Trial(0, 10, 4), (replace(SLOW, n_tokens=40),), test_time="now")
    row = run.row()
    assert (row["test"], row["n_parallel"]) == ("tg10 x 4", 4)
    assert (row["avg_ts"], row["avg_ts_per_sequence"]) == (1.0, 0.25)
    assert row["tpot_ms"] == pytest.approx(4000)  # of each text: they are in step
    assert row["bytes_read_per_token"] == pytest.approx(0.6e9)
    text = report([run], "md")
    assert "| t/s | t/s each |" in text
    assert "| tg10 x 4 | 1.00 ± 0.00 | 0.25 |" in text
    assert "t/s each" not in report([DECODE], "md")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--parallel", "0"), "0 is out of range, wanted 1 to 64"),
        (("--parallel", "65"), "65 is out of range, wanted 1 to 64"),
        (("--parallel", "two"), "not a whole number"),
        (("--parallel", "4", "-n", "0"), "for the decode test"),
        (("--parallel", "4", "-n", "10", "-p", "0", "-c", "39"), "a test of 40 tokens"),
        (("--parallel", "4", "-b", "3"), "--batch-size allows 3"),
    ],
)
def test_texts_that_cannot_be_decoded_together_are_refused(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], says: str
) -> None:
    code, out, err = outcome(capsys, "bench", *arguments)
    assert (code, out) == (2, "")
    assert says in err


@pytest.mark.model
def test_experts_of_texts_decoded_together_are_read_once_for_all(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    nested = str(tmp_path / "nested.gguf")
    assert outcome(capsys, "quantize", "tiny-moe", "--nested", "2..8", "-o", nested)[0] == 0
    for model in ("tiny-chat", "tiny-moe", nested):
        rows = []
        for n_texts in (1, 4):
            code, out, err = outcome(
                capsys, "bench", model, "-p", "0", "-n", "6", "-r", "1", "-t", "1",
                "--parallel", str(n_texts), "--json",
            )  # fmt: skip
            assert code == 0, err
            rows += json.loads(out)
        assert [row["tokens_per_pass"] for row in rows] == [1.0, 4.0]
        assert [len(row["samples_experts_by_pass"]) for row in rows] == [6 * (model == nested)] * 2
        if model == nested:
            passes = [row["samples_experts_by_pass"][-1] for row in rows]
            assert passes[0]["wanted"] < passes[1]["wanted"] < 4 * passes[0]["wanted"]


def test_prefill_test_feeds_whole_batches_of_seeded_tokens() -> None:
    backends = [FakeBackend(n_batch=8) for _ in range(2)]
    for backend in backends:
        measure(backend, Trial(20, 0), BenchFlags(repetitions=1), lambda: 0.0)
    assert [len(tokens) for tokens in backends[0].passes] == [8, 8, 4] * 2
    assert backends[0].passes == backends[1].passes
    assert backends[0].passes[0][0] == backends[0].vocab.bos


def test_ctrl_c_that_comes_between_two_decodes_still_ends_the_work() -> None:
    class HardOfHearing(FakeBackend):
        n_cancels = 0

        def cancel(self) -> None:
            self.n_cancels += 1
            if self.n_cancels > 1:  # the first one comes between two decodes and is cleared
                super().cancel()

    backend = HardOfHearing()
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while True:
            backend.decode([1], 0, 1)
            backend.truncate(0)

    with pytest.raises(Cancelled):
        opening.run_interruptible(backend, work)
    assert backend.closed
    assert signal.getsignal(signal.SIGINT) is before
