#!/usr/bin/env python3
"""Expert streaming against llama.cpp: both sides in one run, under hard memory limits.

Needs root (cgroups). The model is the `moe` shape of `make_model.py` (qwen3moe, 24 layers, 64
experts of which a token uses 8, Q4_0, 4.3 GB; its router rows have a log-normal factor of sigma
0.5); NESTED is the same, `edgert quantize MODEL --nested 2..8 -o NESTED`. Every side is fed the
same random tokens, the second half of other ones than the first, as when the topic changes.

Rows: decode, exact, nested, dual, order. Quality is `bench_nested.py`'s.

usage: bench_moe.py MODEL.gguf [--nested NESTED.gguf] [--rows decode,...] [-o md|json]
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench_stream import HERE, MB, Job, say, show
from edgert.experts.replay import belady_misses
from memcap import run_capped

CAPS = {1100: 20.0, 1700: 50.0, 2200: 130.0}
SHARE_OF_LIMIT, OVER_BELADY = 0.85, 1.35
RESIDENT_SHARE, FIRST_TOKEN_S = 0.75, 4.0
STACKS_OF_A_LAYER = 3
EXPERT_BYTES = STACKS_OF_A_LAYER * 2048 * 768 // 32 * 18  # Q4_0: 18 bytes of 32 weights


@dataclass
class Bench:
    """What is measured, and the rows measured so far."""

    model: Path
    nested: Path | None
    flash_bps: int | None
    threads: int
    tokens: int
    skip: int
    rows: list[Job] = field(default_factory=list)
    known: dict[str, Job] = field(default_factory=dict)

    def side(self, script: str, name: str, cap_bytes: int | None = None, **job: Any) -> Job:  # noqa: ANN401
        """Run one side in a process of its own; its JSON, with the cgroup's peak."""
        job = {"model": str(self.model), "ctx": 512, "threads": self.threads, "prompt": 16, **job}
        command = [sys.executable, str(HERE / script), name, json.dumps(job)]
        flash = self.flash_bps if cap_bytes else None
        done = run_capped(command, cap_bytes, flash, self.model.parent)
        if done.returncode:
            raise SystemExit(f"{name} under {cap_bytes} ended with {done.returncode}")
        result: Job = json.loads(done.stdout.splitlines()[-1])
        shown = {k: round(v, 4) for k, v in result.items() if isinstance(v, float)}
        say(f"  {name} {cap_bytes or 'no cap'}: {json.dumps(shown)}")
        return {**result, "peak_bytes": done.peak_bytes, "n_limit_hits": done.n_limit_hits}

    def experts(self, cap_mb: int | None, **job: Any) -> Job:  # noqa: ANN401
        """Run edgert's side; without a cap everything is in memory."""
        cap = None if cap_mb is None else cap_mb * MB
        job = {"tokens": self.tokens, "skip": self.skip, **job}
        if cap is not None:
            job["memory"] = cap
        return self.side("moe_sides.py", "experts", cap, **job)

    def once(self, name: str, run: Callable[[], Job]) -> Job:
        """Return what a side measured earlier in this run, or run it."""
        if name not in self.known:
            self.known[name] = run()
        return self.known[name]

    def row(self, what: str, reach: str, measured: str, *, good: bool) -> None:
        """Record a row of the table."""
        self.rows.append({"what": what, "reach": reach, "measured": measured, "good": good})
        say(f"{'ok  ' if good else 'MISS'} {what}: {measured} (reach {reach})")


def bench_decode(bench: Bench) -> None:
    """Decode under caps, against llama.cpp, against everything in memory, against the limit."""
    resident = bench.once("resident", lambda: bench.experts(None))
    for cap_mb, reach in CAPS.items():
        cap = cap_mb * MB
        ours = bench.experts(cap_mb)
        flash = bench.side("stream_sides.py", "flash", cap, bytes=1 << 30)["flash_bytes_per_s"]
        theirs = bench.side("stream_sides.py", "llama", cap, tokens=4)
        ratio = theirs["token_s"] / ours["token_mean_s"]
        bench.row(
            f"decode at {cap_mb} MB against llama.cpp, memory-mapped", f">= {reach:g}x",
            f"{ratio:.0f}x ({1 / ours['token_mean_s']:.1f} over {1 / theirs['token_s']:.3f} tok/s)",
            good=ratio >= reach,
        )  # fmt: skip
        missed_s = ours["needed_bytes"] / flash
        share = max(resident["token_mean_s"], missed_s) / ours["token_mean_s"]
        bench.row(
            f"share of the limit at {cap_mb} MB", f">= {SHARE_OF_LIMIT}",
            f"{share:.3f} ({1e3 * ours['token_mean_s']:.1f} ms; in memory "
            f"{1e3 * resident['token_mean_s']:.1f} ms, {ours['needed_bytes'] / MB:.1f} MB missed "
            f"at {flash / MB:.0f} MB/s {1e3 * missed_s:.1f} ms)", good=share >= SHARE_OF_LIMIT,
        )  # fmt: skip
        over = _over_belady(bench, ours)
        bench.row(
            f"bytes read against the clairvoyant cache at {cap_mb} MB", f"<= {OVER_BELADY}x",
            f"{over:.2f}x ({ours['bytes_per_token'] / MB:.1f} MB a token, of which "
            f"{ours['wasted_bytes'] / MB:.1f} MB guessed wrongly)", good=over <= OVER_BELADY,
        )  # fmt: skip
        bench.row(
            f"peak memory (cgroup) at {cap_mb} MB over a change of topic, limit hits", "< cap, 0",
            f"{ours['peak_bytes'] / MB:.0f} MB, {ours['n_limit_hits']}",
            good=ours["peak_bytes"] < cap and ours["n_limit_hits"] == 0,
        )  # fmt: skip
        same = ours["logits"] == resident["logits"]
        bench.row(
            f"logits at {cap_mb} MB against all in memory", "bit-identical",
            "identical" if same else "DIFFERENT", good=same,
        )  # fmt: skip
        if cap_mb == max(CAPS):
            _top_cap(bench, ours, resident)


def _top_cap(bench: Bench, ours: Job, resident: Job) -> None:
    share = resident["token_mean_s"] / ours["token_mean_s"]
    bench.row(
        f"decode at {max(CAPS)} MB against everything in memory", f">= {RESIDENT_SHARE}x",
        f"{share:.2f}x ({1 / ours['token_mean_s']:.1f} over "
        f"{1 / resident['token_mean_s']:.1f} tok/s)", good=share >= RESIDENT_SHARE,
    )  # fmt: skip
    first_s = ours["load_s"] + ours["prefill_s"]
    bench.row(
        f"load and first token of 16 at {max(CAPS)} MB", f"<= {FIRST_TOKEN_S:g} s",
        f"{first_s:.2f} s ({ours['load_s']:.2f} + {ours['prefill_s']:.2f})",
        good=first_s <= FIRST_TOKEN_S,
    )  # fmt: skip


def _over_belady(bench: Bench, ours: Job) -> float:
    """Compare bytes read with what a cache of this size that knows the future would read."""
    # The choices are the same however much memory there is; listening to them takes time.
    run = bench.once("routing", lambda: bench.experts(None, record=True))
    routing = run["routing"]
    n_prompt = len(routing) - bench.tokens
    n_experts = ours["n_matrices"] // STACKS_OF_A_LAYER
    misses = belady_misses(routing, n_experts, n_prompt + bench.skip)
    best = misses * EXPERT_BYTES / (bench.tokens - bench.skip)
    return float(ours["expert_bytes_read"] / max(best, 1.0))


def bench_exact(bench: Bench) -> None:
    """Logits of everything in memory against llama.cpp with the same kernels."""
    theirs = bench.side("moe_sides.py", "llama", tokens=16, repack=True)
    plain = bench.experts(None, tokens=16, skip=0)
    same = theirs["logits"] == plain["logits"]
    bench.row(
        "logits in memory against llama.cpp with the same kernels", "bit-identical",
        "identical" if same else "DIFFERENT", good=same,
    )  # fmt: skip


def bench_nested(bench: Bench) -> None:
    """Nested experts in memory against llama.cpp's product of the nearest type."""
    nested = str(_nested(bench))
    ours = bench.experts(None, model=nested, bits=[4], tokens=60, skip=20)
    theirs = bench.side("moe_sides.py", "llama", tokens=60, skip=20)
    ratio = theirs["token_s"] / ours["token_s"]
    bench.row(
        "nested executor at 4 bits against llama.cpp's mul_mat_id of Q4_0, all in memory",
        ">= 0.7x", f"{ratio:.2f}x ({1 / ours['token_s']:.1f} over {1 / theirs['token_s']:.1f} "
        "tok/s)", good=ratio >= 0.7,
    )  # fmt: skip


def bench_dual(bench: Bench) -> None:
    """Bits by routing weight against the widest width for all, at the smallest cap."""
    nested, cap_mb = str(_nested(bench)), min(CAPS)
    wide = bench.experts(cap_mb, model=nested, bits=[8])
    dual = bench.experts(cap_mb, model=nested, bits=[4, 8], cuts=[0.25])
    ratio = wide["token_mean_s"] / dual["token_mean_s"]
    bench.row(
        f"bits by routing weight at {cap_mb} MB against 8 bits for all", ">= 1.4x",
        f"{ratio:.2f}x ({1 / dual['token_mean_s']:.2f} over {1 / wide['token_mean_s']:.2f} tok/s, "
        f"{dual['bits_per_weight']:.2f} bits a weight; {dual['applied']['weights']})",
        good=ratio >= 1.4,
    )  # fmt: skip
    for name, side in (("dual", dual), ("8 bits", wide)):
        bench.row(
            f"peak memory (cgroup) at {cap_mb} MB, nested, {name}; limit hits", "< cap, 0",
            f"{side['peak_bytes'] / MB:.0f} MB, {side['n_limit_hits']}",
            good=side["peak_bytes"] < cap_mb * MB and side["n_limit_hits"] == 0,
        )  # fmt: skip


def bench_order(bench: Bench) -> None:
    """Loading the hottest experts first against the order of their ids, eight texts at once."""
    cap = min(CAPS) * MB
    sides = {}
    for order in ("hottest", "id"):
        sides[order] = bench.side(
            "moe_sides.py", "sequences", cap, memory=cap, sequences=8, order=order,
            tokens=24, skip=8,
        )  # fmt: skip
    ratio = sides["id"]["token_mean_s"] / sides["hottest"]["token_mean_s"]
    bench.row(
        "hottest experts first against the order of ids, batch of 8", ">= 1.15x",
        f"{ratio:.3f}x ({1e3 * sides['hottest']['token_mean_s']:.0f} and "
        f"{1e3 * sides['id']['token_mean_s']:.0f} ms a step)", good=ratio >= 1.15,
    )  # fmt: skip


def _nested(bench: Bench) -> Path:
    if bench.nested is None:
        raise SystemExit("--nested NESTED.gguf: edgert quantize MODEL --nested 2..8 -o NESTED.gguf")
    return bench.nested


ROWS: dict[str, Callable[[Bench], None]] = {
    "decode": bench_decode,
    "exact": bench_exact,
    "nested": bench_nested,
    "dual": bench_dual,
    "order": bench_order,
}


def main() -> None:
    """Run the rows asked for and print the table."""
    parser = argparse.ArgumentParser(description="expert streaming against llama.cpp")
    parser.add_argument("model", type=Path)
    parser.add_argument("--nested", type=Path)
    parser.add_argument("--rows", default="decode,exact")
    parser.add_argument("--flash-bps", type=int, default=800 * MB, help="0: the disk's own speed")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--skip", type=int, default=40, help="tokens before the cache is warm")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    arguments = parser.parse_args()
    nested = arguments.nested.resolve() if arguments.nested else None
    bench = Bench(
        arguments.model.resolve(), nested, arguments.flash_bps or None, arguments.threads,
        arguments.tokens, arguments.skip,
    )  # fmt: skip
    names = arguments.rows.split(",")
    unknown = [name for name in names if name not in ROWS]
    if unknown:
        parser.error(f"no row {unknown[0]}, there are {', '.join(ROWS)}")
    for name in names:
        ROWS[name](bench)
    show(bench.rows, arguments)


if __name__ == "__main__":
    main()
