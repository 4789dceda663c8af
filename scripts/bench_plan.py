#!/usr/bin/env python3
"""Plans against what they become: predicted and measured speed and memory, and the baselines.

Needs root (cgroups). Makes no model: name those of `make_model.py`. For every point (a cap as a
share of the file, a context) it plans with rates measured in this run, executes the manifest under
a hard memory limit with flash held steady, and executes the baselines under the same limit:
llama.cpp memory-mapped, and edgert with a bound and no plan. Then the search alone is timed, and
every known device gets a plan for a dense and an expert model.

usage: python scripts/bench_plan.py FOLDER [--models 1b,3b,7b,moe] [--flash-bps N] [-o md|json]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_stream import machine, say
from edgert.units import format_bytes
from memcap import CapResult, run_capped

HERE = Path(__file__).resolve().parent
MB = 1_000_000
Job = dict[str, Any]
_PROMPT = 128
_NOTHING_FITS = 4  # exit code
_LOSS = 1.03  # a plan this much slower than a baseline has lost to it
# (share of the file, context) by model; what cannot fit is reported as such.
POINTS: dict[str, tuple[tuple[float, int], ...]] = {
    "1b": ((0.3, 512), (0.5, 512), (0.75, 512), (1.0, 512), (1.0, 4096)),
    "3b": ((0.3, 512), (0.5, 512), (0.75, 512), (1.0, 512), (0.75, 4096)),
    "7b": ((0.3, 512), (0.5, 512), (0.75, 512), (1.0, 512), (1.0, 4096)),
    "moe": ((0.256, 512), (0.396, 512), (0.513, 512)),  # 1.1, 1.7 and 2.2 GB
}
_ROUTED = ("moe",)  # planned with a trace of what their routers choose


@dataclass
class Bench:
    """Where things are and what was measured."""

    folder: Path
    home: Path
    flash_bps: int | None
    tokens: int
    rows: list[Job] = field(default_factory=list)

    def edgert(
        self, *arguments: str, cap_bytes: int | None = None, throttle: bool = True
    ) -> CapResult:
        """Run the program in a cgroup of its own, with a home of its own."""
        os.environ["EDGERT_HOME"] = str(self.home)
        command = [sys.executable, "-m", "edgert.cli.main", *arguments]
        flash = self.flash_bps if throttle else None
        return run_capped(command, cap_bytes, flash, self.folder)

    def side(self, name: str, cap_bytes: int, **job: Any) -> Job:  # noqa: ANN401
        """Run a baseline in a process of its own under the same limits."""
        threads = len(os.sched_getaffinity(0))
        command = [sys.executable, str(HERE / "stream_sides.py"), name]
        command.append(json.dumps({"threads": threads, "prompt": _PROMPT, **job}))
        done = run_capped(command, cap_bytes, self.flash_bps, self.folder)
        if done.returncode:
            say(f"{name} ended with {done.returncode}")
            return {"failed": done.returncode}
        result: Job = json.loads(done.stdout.splitlines()[-1])
        return result


def bench_points(bench: Bench, name: str) -> None:
    """Measure the host with this model's types, then every point of it."""
    model = bench.folder / f"{name}.gguf"
    size = model.stat().st_size
    measured = bench.edgert("devices", "--measure", "--json", model.name)
    if measured.returncode:
        raise SystemExit(f"measuring ended with {measured.returncode}")
    traced = record_routing(bench, model) if name in _ROUTED else ()
    for share, n_ctx in POINTS[name]:
        cap = int(share * size)
        row: Job = {"model": name, "share": share, "cap_bytes": cap, "n_ctx": n_ctx}
        bench.rows.append(row)
        plan = bench.home / f"{name}-{share}-{n_ctx}.json"
        made = bench.edgert(
            "plan", model.name, "--memory", str(cap), "-c", str(n_ctx), "--prompt-tokens",
            str(_PROMPT), "-o", str(plan), "--force", *traced, throttle=False,
        )  # fmt: skip
        if made.returncode:
            row["no_plan" if made.returncode == _NOTHING_FITS else "failed"] = made.returncode
            say(f"{name} at {share:.0%}, context {n_ctx}: no plan (exit {made.returncode})")
            continue
        run = bench.edgert(
            "bench", "--manifest", str(plan), "-m", model.name, "--json", "-n", str(bench.tokens),
            cap_bytes=cap,
        )  # fmt: skip
        if run.returncode:
            row["failed"] = run.returncode
            say(f"{name} at {share:.0%}, context {n_ctx}: failed with {run.returncode}")
            continue
        row.update(compare(json.loads(run.stdout.splitlines()[-1]), run))
        row["llama"] = bench.side("llama", cap, model=str(model), ctx=n_ctx, tokens=3)
        row["plain"] = bench.side("edgert", cap, model=str(model), ctx=n_ctx, tokens=6, memory=cap)
        say(json.dumps({k: v for k, v in row.items() if k not in ("llama", "plain")}))


def record_routing(bench: Bench, model: Path) -> tuple[str, ...]:
    """Record what the routers of a model choose; return the flags that plan with it."""
    flags = ("--routing-trace", str(bench.home / f"{model.stem}.jsonl"))
    run = bench.edgert(
        "bench", model.name, "-c", "512", "-p", str(_PROMPT), "-n", "64", "-r", "1", *flags,
        throttle=False,
    )  # fmt: skip
    if run.returncode:
        raise SystemExit(f"recording routing ended with {run.returncode}")
    return flags


def compare(record: Job, run: CapResult) -> Job:
    """Return predicted and measured figures of one run."""
    predicted = {key: value["value"] for key, value in record["predicted"].items()}
    return {
        "predicted_tok_s": predicted["decode_tok_s"],
        "measured_tok_s": record["decode_tok_s"],
        "predicted_ttft_ms": predicted["ttft_ms"],
        "measured_ttft_ms": record["ttft_ms"],
        "predicted_load_ms": predicted["load_ms"],
        "measured_load_ms": record["load_ms"],
        "predicted_peak": predicted["peak_memory_bytes"],
        "measured_peak": run.peak_bytes,
        "limit_hits": run.n_limit_hits,
        "n_ubatch": record["n_ubatch"],
    }


def baseline_tok_s(row: Job) -> dict[str, float]:
    """Return the speed of each baseline that ran."""
    sides = {"llama.cpp": row.get("llama", {}), "edgert, no plan": row.get("plain", {})}
    return {name: 1 / side["token_s"] for name, side in sides.items() if side.get("token_s")}


def bench_search(bench: Bench) -> Job:
    """Time the search alone."""
    del bench
    done = subprocess.run(
        [sys.executable, str(HERE / "bench_search.py")], capture_output=True, text=True, check=True
    )
    found: Job = json.loads(done.stdout.splitlines()[-1])
    return found


def bench_catalog(bench: Bench) -> Job:
    """Plan a 7B and a 30B-A3B shape for every known device."""
    done = subprocess.run(
        [sys.executable, str(HERE / "plan_catalog.py"), str(bench.home)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found: Job = json.loads(done.stdout.splitlines()[-1])
    return found


def failures(row: Job) -> dict[str, int]:
    """Return what ended with an error, and its exit code; llama.cpp may be killed for memory."""
    sides = {"the plan": row, "edgert without a plan": row.get("plain", {})}
    return {name: side["failed"] for name, side in sides.items() if "failed" in side}


def summary(rows: list[Job]) -> Job:
    """Return the figures that the goals are about."""
    done = [row for row in rows if "measured_tok_s" in row]
    failed = [
        f"{row['model']} {row['share']} {row['n_ctx']}: {what} ended with {code}"
        for row in rows
        for what, code in failures(row).items()
    ]
    errors = [abs(row["predicted_tok_s"] / row["measured_tok_s"] - 1) for row in done]
    peaks = [row["predicted_peak"] / row["measured_peak"] - 1 for row in done]
    lost = [
        f"{row['model']} {row['share']} {row['n_ctx']}: {name}"
        for row in done
        for name, speed in baseline_tok_s(row).items()
        if speed > _LOSS * row["measured_tok_s"]
    ]
    return {
        "n_points": len(done),
        "speed_error_median": statistics.median(errors) if errors else None,
        "speed_error_worst": max(errors, default=None),
        "peak_error_worst": max(peaks, default=None),
        "peak_error_least": min(peaks, default=None),
        "failed": failed,
        "lost_to_baseline": lost,
        "limit_hits": sum(row["limit_hits"] for row in done),
    }


def table(rows: list[Job]) -> list[str]:
    """Return the points as a Markdown table."""
    lines = [
        "| model | cap | context | predicted | measured | | peak predicted | measured | |"
        " llama.cpp | no plan |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        head = f"| {row['model']} | {row['share']:.0%} | {row['n_ctx']} |"
        if "measured_tok_s" not in row:
            what = f"failed with {row['failed']}" if "failed" in row else "no plan"
            lines.append(f"{head} {what} |" + " |" * 7)
            continue
        speeds = baseline_tok_s(row)
        error = row["predicted_tok_s"] / row["measured_tok_s"] - 1
        peak = row["predicted_peak"] / row["measured_peak"] - 1
        others = [
            f"{speeds[n]:.3f}" if n in speeds else "-" for n in ("llama.cpp", "edgert, no plan")
        ]
        lines.append(
            f"{head} {row['predicted_tok_s']:.3f} tok/s | {row['measured_tok_s']:.3f} | "
            f"{error:+.1%} | {format_bytes(row['predicted_peak'])} | "
            f"{format_bytes(row['measured_peak'])} | {peak:+.1%} | {' | '.join(others)} |"
        )
    return lines


def main() -> int:
    """Measure what was asked for and print the table, then a JSON line."""
    parser = argparse.ArgumentParser(description="plans against what they become")
    parser.add_argument("folder", type=Path, help="where 1b.gguf and the others are")
    parser.add_argument("--models", default="1b,3b,7b")
    parser.add_argument("--flash-bps", type=int, default=800 * MB, help="0: the disk's own speed")
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--no-search", action="store_true", help="only the points")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    arguments = parser.parse_args()
    names = arguments.models.split(",")
    unknown = [name for name in names if name not in POINTS]
    if unknown:
        parser.error(f"no model {unknown[0]}, there are {', '.join(POINTS)}")
    for name in names:
        if not (arguments.folder / f"{name}.gguf").is_file():
            parser.error(f"no {name}.gguf in {arguments.folder}: make_model.py makes it")
    with tempfile.TemporaryDirectory(prefix="bench-plan-") as home:
        bench = Bench(
            arguments.folder.resolve(), Path(home), arguments.flash_bps or None, arguments.tokens
        )
        for name in names:
            bench_points(bench, name)
        extra = {} if arguments.no_search else {"search": bench_search(bench)}
        extra |= {} if arguments.no_search else {"catalog": bench_catalog(bench)}
    result = {"machine": machine(), "summary": summary(bench.rows), **extra, "rows": bench.rows}
    if arguments.output == "md":
        print(f"{machine()}\n")
        print("\n".join(table(bench.rows)))
        print(f"\n{json.dumps(result['summary'], indent=1)}")
    print(json.dumps(result))
    return 1 if summary(bench.rows)["failed"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
