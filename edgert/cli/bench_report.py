"""Numbers of `edgert bench` and their forms: llama-bench's fields, then what streaming adds."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from statistics import fmean, stdev

import edgert
from edgert.cli.bench_experts import in_words, summary
from edgert.llama.backend import ExpertCounters, ExpertCounts
from edgert.units import format_bytes

Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Trial:
    """One test: prefill of `n_prompt` tokens, or decode of `n_gen`; `n_parallel` texts at once."""

    n_prompt: int
    n_gen: int
    n_parallel: int = 1

    @property
    def name(self) -> str:
        """The name llama-bench gives it; it knows one text only."""
        texts = f" x {self.n_parallel}" if self.n_parallel > 1 else ""
        return f"pp{self.n_prompt}" if self.n_prompt else f"tg{self.n_gen}{texts}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One run of a test."""

    n_tokens: int
    duration_s: float
    n_passes: int
    decode_s: float
    stall_s: float
    bytes_read: int
    experts: ExpertCounters | None = None
    expert_passes: tuple[ExpertCounts, ...] = ()


@dataclass(frozen=True, slots=True)
class Setup:
    """What all tests share: the model, how it was loaded, the machine."""

    model_filename: str
    model_type: str
    model_size: int
    model_n_params: int
    cpu_info: str
    n_batch: int
    n_ubatch: int
    n_threads: int
    n_threads_batch: int
    type_k: str
    type_v: str
    layout: str
    streaming: bool
    budget_bytes: int | None
    resident_weight_bytes: int
    pinned_bytes: int
    load_ms: float
    peak_memory_bytes: int
    peak_group_bytes: int | None
    flash_bytes_per_s: float | None


@dataclass(frozen=True, slots=True)
class Run:
    """A test and its samples."""

    setup: Setup
    kind: Trial
    samples: tuple[Sample, ...]
    test_time: str = field(default_factory=lambda: datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))

    def row(self) -> Row:
        """Return all fields, in order."""
        seconds = [sample.duration_s for sample in self.samples]
        rates = [sample.n_tokens / sample.duration_s for sample in self.samples]
        n_tokens = sum(sample.n_tokens for sample in self.samples)
        limit = self.roofline()
        return {
            "edgert_version": edgert.__version__,
            "backends": "CPU",
            **asdict(self.setup),
            "n_prompt": self.kind.n_prompt,
            "n_gen": self.kind.n_gen,
            "n_depth": 0,
            "n_parallel": self.kind.n_parallel,
            "test": self.kind.name,
            "test_time": self.test_time,
            "avg_ns": round(1e9 * fmean(seconds)),
            "stddev_ns": round(1e9 * _spread(seconds)),
            "avg_ts": fmean(rates),
            "stddev_ts": _spread(rates),
            "avg_ts_per_sequence": fmean(rates) / self.kind.n_parallel,
            "samples_ns": [round(1e9 * value) for value in seconds],
            "samples_ts": rates,
            "ttft_ms": 1e3 * fmean(seconds) if self.kind.n_prompt else None,
            "tpot_ms": 1e3 * fmean(seconds) / self.kind.n_gen if self.kind.n_gen else None,
            "bytes_read_per_token": sum(s.bytes_read for s in self.samples) / n_tokens,
            "stall_ms_per_token": 1e3 * sum(s.stall_s for s in self.samples) / n_tokens,
            "tokens_per_pass": n_tokens / max(1, sum(s.n_passes for s in self.samples)),
            "roofline_tok_s": limit,
            "roofline_fraction": n_tokens / sum(seconds) / limit if limit else None,
            **summary(
                [sample.experts for sample in self.samples if sample.experts is not None],
                [one for sample in self.samples for one in sample.expert_passes],
                n_tokens,
                sum(seconds),
            ),
        }

    def roofline(self) -> float | None:
        """Tokens per second that computing alone, or reading alone at full flash speed, allows.

        None when bytes were read at a rate that could not be measured.
        """
        compute_s = sum(sample.decode_s - sample.stall_s for sample in self.samples)
        bytes_read = sum(sample.bytes_read for sample in self.samples)
        rate = self.setup.flash_bytes_per_s
        if bytes_read and not rate:
            return None
        limit_s = max(compute_s, bytes_read / rate if rate else 0.0)
        n_tokens = sum(sample.n_tokens for sample in self.samples)
        return n_tokens / limit_s if limit_s > 0 else None


def report(runs: Sequence[Run], form: str) -> str:
    """Write the runs as `json`, `jsonl`, `csv` or `md`."""
    rows = [run.row() for run in runs]
    match form:
        case "json":
            return json.dumps(rows)
        case "jsonl":
            return "\n".join(json.dumps(row) for row in rows)
        case "csv":
            return _as_csv(rows)
        case _:
            return _as_markdown(rows)


def _as_csv(rows: Sequence[Row]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    names = [name for name in rows[0] if not name.startswith("samples_")]
    writer.writerow(names)
    writer.writerows([row[name] for name in names] for row in rows)
    return out.getvalue().rstrip("\n")


def _as_markdown(rows: Sequence[Row]) -> str:
    streaming = any(row["streaming"] for row in rows)
    together = any(row["n_parallel"] != 1 for row in rows)
    names = ["model", "size", "threads", "test", "t/s"]
    names += ["t/s each"] if together else []
    names += ["budget", "resident", "MB/token", "stall ms/token", "of limit"] if streaming else []
    names += ["load s", "peak"]
    lines = [
        f"| {' | '.join(names)} |",
        f"| {' | '.join('---' if n in ('model', 'test') else '--:' for n in names)} |",
    ]
    for row in rows:
        cells = [
            str(row["model_type"]),
            _size(row["model_size"]),
            str(
                row["n_threads_batch" if row["n_prompt"] or row["n_parallel"] != 1 else "n_threads"]
            ),
            str(row["test"]),
            f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
        ]
        if together:
            cells.append(f"{row['avg_ts_per_sequence']:.2f}")
        if streaming:
            share = row["roofline_fraction"]
            cells += [
                _size(row["budget_bytes"]),
                _size(row["resident_weight_bytes"]),
                f"{_number(row['bytes_read_per_token']) / 1e6:.1f}",
                f"{row['stall_ms_per_token']:.1f}",
                "" if share is None else f"{_number(share):.2f}",
            ]
        cells += [f"{_number(row['load_ms']) / 1e3:.2f}", _size(row["peak_memory_bytes"])]
        lines.append(f"| {' | '.join(cells)} |")
    notes = [f"{row['test']} {words}" for row in rows if (words := in_words(row)) is not None]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _size(value: object) -> str:
    return "" if value is None else format_bytes(_number(value))


def _number(value: object) -> float:
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _spread(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
