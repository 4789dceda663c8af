#!/usr/bin/env python3
"""Several hosts against one: real processes, each pinned to a core; namespaces for slower links.

Needs root (control groups, network namespaces). Models are those of `make_model.py`. The cases are
in `hosts_bench`: tensor2, capped2, star4, tokens, tpot, ring. The last line of the output is JSON.

usage: python scripts/bench_hosts.py FOLDER --case tensor2 [--models 1b,7b] [-o md|json]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from types import FrameType

from bench_stream import machine
from hosts_bench.bench import Bench
from hosts_bench.cases import CASES
from hosts_bench.prediction import tpot
from hosts_bench.programs import say

_ALL_CASES = {**CASES, "tpot": tpot}
_MOST_LOAD = 0.5  # of other programs


def main() -> int:
    """Run one case and print what it found."""
    parser = argparse.ArgumentParser(description="several hosts against one")
    parser.add_argument("folder", type=Path, help="where 1b.gguf and the others are")
    parser.add_argument("--case", choices=_ALL_CASES, required=True)
    parser.add_argument("--models", help="in place of the usual ones of the case")
    parser.add_argument("--turns", type=int, default=5, help="of each side")
    parser.add_argument("--work", type=Path, help="keep parts, logs and figures here")
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    arguments = parser.parse_args()
    if os.geteuid() != 0:
        parser.error("needs root: it makes control groups and network namespaces")
    signal.signal(signal.SIGTERM, _interrupted)
    load = os.getloadavg()[0]
    if load > _MOST_LOAD:
        say(f"warning: the load average is {load:.1f}: other programs make figures worse")
    with ExitStack() as stack:
        work = arguments.work
        if work is None:
            temporary = tempfile.TemporaryDirectory(prefix="bench-hosts-")
            work = Path(stack.enter_context(temporary))
        work.mkdir(parents=True, exist_ok=True)
        models = tuple(arguments.models.split(",")) if arguments.models else None
        bench = Bench(arguments.folder.resolve(), work.resolve(), models, max(1, arguments.turns))
        started_s = time.monotonic()
        found = _ALL_CASES[arguments.case](bench)
    record = {
        "case": arguments.case, "machine": machine(), "load_before": load,
        "load_after": os.getloadavg()[0], "took_s": round(time.monotonic() - started_s, 1), **found,
    }  # fmt: skip
    if arguments.output == "md":
        print(f"{record['machine']}; load {load:.1f}\n\n| | |\n|---|---|")
        for key, value in found.items():
            print(f"| {key} | {value} |")
    print(json.dumps(record))
    return 0


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
