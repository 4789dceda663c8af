#!/usr/bin/env python3
"""Soak of several hosts: many homes, few workers; processes are killed, frozen and started again.

Every reply must be what one host says, or an error with a type; none may take longer than a
deadline; the memory of a worker that lived through it must not grow. The last line is JSON.

usage: python scripts/soak_hosts.py [--requests 1000] [--minutes 20] [--homes 16] [--workers 3]
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
from pathlib import Path
from types import FrameType

from hosts_bench.programs import say
from hosts_bench.soak import Soak, Tally, is_flat

_PEACEFUL_EACH = 4  # requests of every home before and after, without trouble
_ROUNDS = 3


def main() -> int:
    """Run the soak; 0 if it is clean."""
    parser = argparse.ArgumentParser(description="many homes, few workers, and trouble")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=20.0, help="at most, without the ends")
    parser.add_argument("--homes", type=int, choices=range(1, 17), default=16)
    parser.add_argument("--workers", type=int, choices=(2, 3), default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, help="keep logs here")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupted)
    with tempfile.TemporaryDirectory(prefix="soak-hosts-") as temporary:
        work = Path(temporary) if arguments.work is None else arguments.work.resolve()
        work.mkdir(parents=True, exist_ok=True)
        record = soak(work, arguments)
    print(json.dumps(record))
    return 0 if record["ok"] else 1


def soak(work: Path, arguments: argparse.Namespace) -> dict[str, object]:
    """Run requests in peace, in trouble and in peace again."""
    started_s = time.monotonic()
    tally, peace = Tally(), Tally()
    n_peaceful = _PEACEFUL_EACH * arguments.homes
    running = Soak(work, arguments.workers, arguments.homes, arguments.seed)
    try:
        say(f"{len(running.wishes)} texts; in peace")
        for _ in range(_ROUNDS):  # each opens sessions anew: memory grows with the first of them
            running.run(n_peaceful, time.monotonic() + 300, peace, trouble=False)
        before = running.rss()
        say("in trouble")
        until_s = time.monotonic() + 60 * arguments.minutes
        running.run(arguments.requests, until_s, tally, trouble=True)
        say("in peace again")
        # Sessions of homes that were killed are given up after a while.
        running.run(n_peaceful, time.monotonic() + 300, peace, trouble=False)
        after = running.rss()
    finally:
        running.close()
    flat = is_flat(before, after)
    return {
        "ok": tally.is_clean and flat and peace.is_clean and not peace.errors,
        "requests": tally.n_answered, "correct": tally.correct, "typed_errors": dict(tally.errors),
        "wrong": tally.wrong, "bugs": tally.bugs, "hangs": tally.hangs,
        "homes_killed_in_requests": tally.killed, "events": dict(tally.events),
        "slowest_s": round(tally.slowest_s, 1),
        "in_peace": {"correct": peace.correct, "errors": dict(peace.errors), "wrong": peace.wrong,
                     "bugs": peace.bugs, "hangs": peace.hangs},
        "worker_rss_before": before, "worker_rss_after": after, "flat": flat,
        "took_s": round(time.monotonic() - started_s, 1),
    }  # fmt: skip


def _interrupted(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    raise SystemExit(main())
