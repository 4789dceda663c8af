#!/usr/bin/env python3
"""Streaming against llama.cpp: both sides in one run, under hard memory limits, flash held steady.

Needs root (cgroups). Rows: decode, own, ttft, uncapped, packed, speculate. The model is the 7B
shape of `make_model.py 7b`; every figure printed is measured here. "llama.cpp" is the installed one
at the setting that suits the row: memory-mapped without repacking under a cap, and without a cap
also repacked, in the repacking buffer that edgert uses. "load" begins after Python's imports.

The row speculate wants a model made with `--repeat 64`, whose greedy text repeats its prompt.

usage: bench_stream.py MODEL.gguf [--rows decode,limit,...] [--flash-bps 800000000] [-o md|json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgert.units import format_bytes
from memcap import run_capped

HERE = Path(__file__).resolve().parent
MB = 1_000_000
Job = dict[str, Any]
DECODE_CAPS = {1000: None, 2000: 1.5, 3000: 2.5, 3600: 4.5}


@dataclass
class Bench:
    """What is measured, and the rows measured so far."""

    model: Path
    flash_bps: int | None
    threads: int
    tokens: int
    packed_folder: Path
    rows: list[Job] = field(default_factory=list)

    def side(self, name: str, cap_bytes: int | None = None, **job: Any) -> Job:  # noqa: ANN401
        """Run one side in a process of its own; its JSON, with the cgroup's peak."""
        job = {"model": str(self.model), "ctx": 512, "threads": self.threads, "prompt": 16, **job}
        command = [sys.executable, str(HERE / "stream_sides.py"), name, json.dumps(job)]
        flash = self.flash_bps if job.pop("throttle", True) else None
        done = run_capped(command, cap_bytes, flash, self.model.parent)
        if done.returncode:
            raise SystemExit(f"{name} under {cap_bytes} ended with {done.returncode}")
        result: Job = json.loads(done.stdout.splitlines()[-1])
        say(f"  {name} {cap_bytes or 'no cap'}: {summary(result)}")
        return {**result, "peak_bytes": done.peak_bytes, "n_limit_hits": done.n_limit_hits}

    def row(
        self,
        what: str,
        reach: str,
        measured: str,
        good: bool,
        **data: Any,  # noqa: ANN401
    ) -> None:
        """Record a row of the table."""
        self.rows.append({"what": what, "reach": reach, "measured": measured, "good": good, **data})
        say(f"{'ok  ' if good else 'MISS'} {what}: {measured} (reach {reach})")


def say(text: str) -> None:
    """Show progress where results do not go."""
    print(text, file=sys.stderr, flush=True)


def summary(result: Job) -> str:
    """Shorten a side's result for progress output."""
    shown = {k: round(v, 3) for k, v in result.items() if isinstance(v, float)}
    return json.dumps(shown)


def bench_decode(bench: Bench) -> None:
    """Decode against llama.cpp under the same cap; share of the limit; memory."""
    compute = bench.side("llama", tokens=8, throttle=False)
    for cap_mb, reach in DECODE_CAPS.items():
        cap = cap_mb * MB
        ours = bench.side("edgert", cap, memory=cap, tokens=bench.tokens)
        flash = bench.side("flash", cap)["flash_bytes_per_s"]
        streamed = min(ours["bytes_per_token"], bench.model.stat().st_size - ours["pinned_bytes"])
        bound = max(compute["token_s"], streamed / flash)
        share = bound / ours["token_mean_s"]
        same = ours["logits"] == compute_logits(bench, compute, ours)
        bench.row(
            f"share of the limit at {cap_mb} MB", ">= 0.93",
            f"{share:.3f} ({ours['token_mean_s']:.2f} s, {ours['bytes_per_token'] / MB:.0f} MB"
            f" at {flash / MB:.0f} MB/s)", share >= 0.93, ours=ours, flash_bytes_per_s=flash,
        )  # fmt: skip
        if reach is not None:
            theirs = bench.side("llama", cap, tokens=4)
            ratio = theirs["token_s"] / ours["token_s"]
            bench.row(
                f"decode at {cap_mb} MB against llama.cpp", f">= {reach}x",
                f"{ratio:.2f}x ({1 / ours['token_s']:.3f} over {1 / theirs['token_s']:.3f} tok/s)",
                ratio >= reach, ours=ours, theirs=theirs,
            )  # fmt: skip
            bench.row(
                f"logits at {cap_mb} MB against llama.cpp", "bit-identical",
                "identical" if same else "DIFFERENT", same,
            )  # fmt: skip
        bench.row(
            f"peak memory (cgroup) at {cap_mb} MB, limit hits", "< cap, 0",
            f"{ours['peak_bytes'] / MB:.0f} MB, {ours['n_limit_hits']}",
            ours["peak_bytes"] < cap and ours["n_limit_hits"] == 0,
        )  # fmt: skip
        if cap_mb == 2000:
            held = ours["resident_weight_bytes"] / cap
            bench.row("weights resident at 2000 MB", ">= 0.68", f"{held:.3f}", held >= 0.68)
            allowed = 2.0 + ours["pinned_bytes"] / flash
            bench.row(
                "load at 2000 MB", f"<= {allowed:.2f} s", f"{ours['load_s']:.2f} s",
                ours["load_s"] <= allowed,
            )  # fmt: skip


def bench_own(bench: Bench) -> None:
    """Decode with the disk at its own speed; shown beside the rows that hold it steady."""
    for cap_mb in (2000, 3000):
        cap = cap_mb * MB
        ours = bench.side("edgert", cap, memory=cap, tokens=bench.tokens, throttle=False)
        flash = bench.side("flash", cap, throttle=False)["flash_bytes_per_s"]
        theirs = bench.side("llama", cap, tokens=4, throttle=False)
        bench.row(
            f"the disk's own speed, {cap_mb} MB", "shown",
            f"{theirs['token_s'] / ours['token_s']:.2f}x ({1 / ours['token_s']:.2f} over "
            f"{1 / theirs['token_s']:.2f} tok/s; disk {flash / MB:.0f} MB/s)", True,
        )  # fmt: skip


def compute_logits(bench: Bench, compute: Job, ours: Job) -> str:
    """Return llama.cpp's logits for as many tokens as our side ran."""
    if len(ours["times_s"]) == len(compute["times_s"]):
        return str(compute["logits"])
    again = bench.side("llama", tokens=len(ours["times_s"]), throttle=False)
    return str(again["logits"])


def bench_ttft(bench: Bench) -> None:
    """Time to the first token of a 512-token prompt."""
    cap = 2000 * MB
    compute = bench.side("llama", prompt=512, ctx=640, tokens=0, throttle=False)
    ours = bench.side("edgert", cap, memory=cap, prompt=512, ctx=640, tokens=0)
    flash = bench.side("flash", cap)["flash_bytes_per_s"]
    sweep_s = (bench.model.stat().st_size - ours["pinned_bytes"]) / flash
    bound = max(sweep_s, compute["prefill_s"])
    ratio = ours["prefill_s"] / bound
    bench.row(
        "time to first token, 512-token prompt, 2000 MB", "<= 1.15x limit",
        f"{ratio:.2f}x ({ours['prefill_s']:.1f} s; sweep {sweep_s:.1f} s, compute "
        f"{compute['prefill_s']:.1f} s; peak {ours['peak_bytes'] / MB:.0f} MB)", ratio <= 1.15,
    )  # fmt: skip


def bench_uncapped(bench: Bench) -> None:
    """Everything fits: speed, memory and logits against llama.cpp with the same repacking."""
    pairs = [
        (
            bench.side("edgert", tokens=24, throttle=False),
            bench.side("llama", tokens=24, repack=True, throttle=False),
        )
        for _ in range(5)
    ]
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    plain = bench.side("llama", tokens=24, throttle=False)
    ratio = statistics.median(t["token_s"] / o["token_s"] for o, t in pairs)
    token_s = statistics.median(o["token_s"] for o in ours)
    size = bench.model.stat().st_size
    peak = max(o["max_rss_bytes"] for o in ours) / size
    same = ours[0]["logits"] == theirs[0]["logits"]
    bench.row(
        "no cap: decode against llama.cpp, repacked", ">= 0.97x",
        f"{ratio:.2f}x, median of 5 pairs ({1 / token_s:.2f} tok/s; unpacked llama.cpp "
        f"{1 / plain['token_s']:.2f})", ratio >= 0.97,
    )  # fmt: skip
    bench.row("no cap: peak memory against the file", "<= 1.2x", f"{peak:.2f}x", peak <= 1.2)
    bench.row(
        "no cap: logits against llama.cpp, repacked", "bit-identical",
        "identical" if same else "DIFFERENT", same,
    )  # fmt: skip


def bench_packed(bench: Bench) -> None:
    """The packed layout at 2000 MB: prefill, compute part of decode, logits."""
    cap, folder = 2000 * MB, str(bench.packed_folder)
    ours = bench.side(
        "edgert", cap, memory=cap, prompt=512, ctx=640, tokens=6, packed="auto",
        packed_folder=folder,
    )  # fmt: skip
    theirs = bench.side("llama", cap, prompt=512, ctx=640, tokens=2)
    plain = bench.side("llama", prompt=512, ctx=640, tokens=6, throttle=False)
    repacked = bench.side("llama", prompt=512, ctx=640, tokens=6, repack=True, throttle=False)
    prefill = theirs["prefill_s"] / ours["prefill_s"]
    compute = plain["token_s"] / max(1e-9, ours["token_mean_s"] - ours["stall_s"])
    same = ours["logits"] == repacked["logits"]
    bench.row(
        "packed, 2000 MB: prefill of 512 tokens", ">= 2x",
        f"{prefill:.2f}x ({ours['prefill_s']:.1f} against {theirs['prefill_s']:.1f} s)",
        prefill >= 2,
    )  # fmt: skip
    bench.row(
        "packed, 2000 MB: compute part of decode", ">= 1.25x",
        f"{compute:.2f}x (resident: {plain['token_s'] / repacked['token_s']:.2f}x)",
        compute >= 1.25,
    )  # fmt: skip
    bench.row(
        "packed: logits against llama.cpp, repacked", "bit-identical",
        "identical" if same else "DIFFERENT", same,
    )  # fmt: skip


def bench_speculate(bench: Bench) -> None:
    """Lossless speculation on text that repeats its prompt, at 2000 MB."""
    cap, block = 2000 * MB, 64
    job: Job = {"prompt_ids": [6400 + index % block for index in range(3 * block)], "ctx": 512}
    ours = bench.side("edgert-greedy", cap, memory=cap, tokens=64, draft_max=16, **job)
    alone = bench.side("edgert-greedy", tokens=64, throttle=False, **job)
    theirs = bench.side("llama-greedy", cap, tokens=6, **job)
    free = bench.side("llama-greedy", tokens=64, throttle=False, **job)
    ratio = theirs["token_s"] / ours["token_s"]
    n_made = len(theirs["made"])
    same = ours["made"] == alone["made"] == free["made"] and theirs["made"] == ours["made"][:n_made]
    bench.row(
        "speculation on text that repeats its prompt, 2000 MB", ">= 2.5x",
        f"{ratio:.1f}x ({1 / ours['token_s']:.2f} over {1 / theirs['token_s']:.3f} tok/s, "
        f"{ours['tokens_per_pass']:.1f} tokens a pass)", ratio >= 2.5, ours=ours,
    )  # fmt: skip
    bench.row("speculation: greedy output", "identical", "identical" if same else "DIFFERENT", same)


ROWS: dict[str, Callable[[Bench], None]] = {
    "decode": bench_decode,
    "own": bench_own,
    "ttft": bench_ttft,
    "uncapped": bench_uncapped,
    "packed": bench_packed,
    "speculate": bench_speculate,
}


def machine() -> str:
    """Name this machine and the commit."""
    commit = subprocess.run(
        ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"],
        capture_output=True, text=True, check=False,
    ).stdout.strip()  # fmt: skip
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), "?")
    return f"{os.cpu_count()} x {cpu}, {platform.system()} {platform.release()}, commit {commit}"


def show(rows: list[Job], arguments: argparse.Namespace) -> None:
    """Print a table unless `arguments.output` is json, then everything as one JSON line."""
    if arguments.output == "md":
        flash = format_bytes(arguments.flash_bps) + "/s" if arguments.flash_bps else "its own speed"
        print(f"{machine()}; flash held at {flash}\n\n| what | reach | measured |\n|---|---|---|")
        for row in rows:
            print(f"| {row['what']} | {row['reach']} | {row['measured']} |")
    print(json.dumps({"machine": machine(), "rows": rows}))


def main() -> None:
    """Run the rows asked for and print the table."""
    parser = argparse.ArgumentParser(description="streaming against llama.cpp")
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", default="decode,own,ttft,uncapped,packed")
    parser.add_argument("--flash-bps", type=int, default=800 * MB, help="0: the disk's own speed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=8)
    parser.add_argument("--packed-folder", type=Path)
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    arguments = parser.parse_args()
    model = arguments.model.resolve()
    folder = arguments.packed_folder or model.parent
    bench = Bench(model, arguments.flash_bps or None, arguments.threads, arguments.tokens, folder)
    names = arguments.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"no row {unknown[0]}, there are {', '.join(ROWS)}")
    for name in names:
        ROWS[name](bench)
    show(bench.rows, arguments)


if __name__ == "__main__":
    main()
