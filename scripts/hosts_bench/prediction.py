"""The planner's seconds per token over several hosts, against what they take."""

from __future__ import annotations

import os
import statistics
import sys

from hosts_bench.bench import MB, ROOMY, Bench
from hosts_bench.fleet import Fleet, fleet, forget_parts, trade
from hosts_bench.network import LinkShape
from hosts_bench.plans import Wanted
from hosts_bench.programs import Job, Program, say

_PROMPT = 16
_SMALL, _LARGE = 2048, 1 << 20  # floats of a sum: one token's, and enough to tell the rate
_TARGET = 0.15
_SLOW = LinkShape(latency_s=1e-3, bits_per_s=300e6)
_USUAL = ("1b", "3b", "1b over slow links", "thin over slow links")


def tpot(bench: Bench) -> Job:
    """Measure this machine and its links, plan, and compare with what is measured after that."""
    measure_host(bench)
    rows = []
    for point in bench.chosen(*_USUAL):
        name, _, slow = point.partition(" over ")
        shape = _SLOW if slow else None
        model = bench.model(name)
        with fleet(bench.work, 2, shape=shape) as hosts:
            link = measured_link(hosts)
            room = model.stat().st_size + ROOMY
            wanted = Wanted(model, (1, 1), room, by_rows=True, link=link)
            manifest = bench.manifest(wanted)
            two = hosts.split(model, manifest)
            two.ask(do="decode", prompt=_PROMPT)
            two.ask(do="decode", n=3)
            turns = [
                statistics.median(two.ask(do="decode", n=6)["times_s"]) for _ in range(bench.turns)
            ]
        predicted_ms = manifest.predicted.tpot_ms.value
        measured_ms = 1e3 * statistics.median(turns)
        row = {
            "point": point, "predicted_ms": predicted_ms, "measured_ms": measured_ms,
            "error": predicted_ms / measured_ms - 1, "turns_ms": [1e3 * turn for turn in turns],
            "round_trip_us": 1e6 * link[0], "link_mb_per_s": link[1] / MB,
        }  # fmt: skip
        rows.append(row)
        say(f"{point}: {predicted_ms:.1f} predicted, {measured_ms:.1f} ms, {row['error']:+.1%}")
        forget_parts(bench.work)
    error = statistics.median(abs(row["error"]) for row in rows)
    return {"speedup": None, "identical": None, "median_error": error, "target": _TARGET,
            "rows": rows}  # fmt: skip


def measure_host(bench: Bench) -> None:
    """Measure this machine with one thread, pinned as hosts are; once for a work folder."""
    if (bench.profile_home / "cache" / "devices").is_dir():
        return
    bench.profile_home.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "edgert.cli.main", "devices", "--measure", "-t", "1"]
    command += [str(bench.model("1b"))]
    say("measuring this machine with one thread")
    with Program(
        command, log=bench.work / "measure.log", home=bench.profile_home,
        core=min(os.sched_getaffinity(0)),
    ) as program:  # fmt: skip
        program.finish(180.0)


def measured_link(hosts: Fleet) -> tuple[float, float]:
    """Return round trip and bytes a second between home and one other host, TLS included."""
    members = hosts.members("star", 2)
    small_s = trade(members, width=_SMALL, n=200)
    large_s = trade(members, width=_LARGE, n=5)
    for member in members:
        member.close()
    rate = 2 * 4 * (_LARGE - _SMALL) / max(1e-9, large_s - small_s)
    return small_s - 2 * 4 * _SMALL / rate, rate
