"""What is measured over several hosts: one function a case, each returns a JSON-able dict.

A new case is a function that takes a `Bench`, and a line in `CASES`. Both sides of a comparison are
open at the same time and run in turn; figures are medians over the turns.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence

from hosts_bench.bench import MB, ROOMY, Bench
from hosts_bench.fleet import Fleet, Limits, fleet, forget_parts, trade
from hosts_bench.network import LinkShape
from hosts_bench.plans import Wanted, groups_of
from hosts_bench.programs import Job, Program, say
from hosts_bench.texts import same_tokens
from partition.cost import allreduce_s
from partition.manifest import Manifest

_STAR_LINKS = LinkShape(latency_s=1e-3, bits_per_s=300e6)
_PROMPT = 16
_N_LAYERS_THIN, _WIDTH_THIN = 22, 2048
_SPLITS = ((1, 1), (3, 1), (2, 1, 1))


def tensor2(bench: Bench) -> Job:
    """Two hosts of one thread against one, everything in memory, over loopback."""
    rows = []
    for name in bench.chosen("1b", "7b"):
        model = bench.model(name)
        room = model.stat().st_size + ROOMY
        manifest = bench.manifest(Wanted(model, (1, 1), room, by_rows=True))
        with fleet(bench.work, 2) as hosts:
            one, two = hosts.alone(model), hosts.split(model, manifest)
            row = {"model": name, **compared(one, two, hosts, bench.turns, _tokens_of(name))}
            row["exchange_us"] = exchange_us(two, manifest, _tokens_of(name))
            row["layouts"] = [side.ask(do="facts")["layout"] for side in (one, two)]
        row["target"] = 1.8 if name == "7b" else 1.6
        rows.append(row)
        say(f"{name}: {row['speedup']:.2f}x (target {row['target']}x)")
        forget_parts(bench.work)
    same = same_tokens(bench, (1, 1))
    return {"speedup": [row["speedup"] for row in rows], "identical": same["identical"],
            "rows": rows, "tokens": same}  # fmt: skip


def capped2(bench: Bench) -> Job:
    """Two hosts with memory for 60 % of the model each, against one of them that streams."""
    rows = []
    for name in bench.chosen("7b"):
        model = bench.model(name)
        cap = int(0.6 * model.stat().st_size)
        manifest = bench.manifest(Wanted(model, (1, 1), cap, by_rows=True))
        limits = Limits(cap, bench.flash_bps)
        with fleet(bench.work, 2, limits=limits) as hosts:
            one = hosts.alone(model)
            two = hosts.split(model, manifest)
            row = {"model": name, "cap_bytes": cap, **compared(one, two, hosts, bench.turns, 3)}
            facts = [side.ask(do="facts") for side in (one, two)]
            row["streaming"] = [fact["streaming"] for fact in facts]
            row["peaks_and_limit_hits"] = hosts.peaks()
        row["streamed_on_two"] = [list(s.tiers.streamed)[:1] for s in manifest.stages]
        rows.append(row)
        say(f"{name} under {cap / MB:.0f} MB: {row['speedup']:.2f}x (target 3x)")
        forget_parts(bench.work)
    same = same_tokens(bench, (1, 1))
    return {"speedup": [row["speedup"] for row in rows], "identical": same["identical"],
            "rows": rows}  # fmt: skip


def star4(bench: Bench) -> Job:
    """Exchanges of four hosts over links of 1 ms and 300 Mbit/s against the model of the star.

    Waiting for slower hosts is told apart by the clock that all hosts here share: every host writes
    down when it had its part of each sum and when it had the sum, and what counts is from the last
    of the former to the last of the latter. The model computes little but has the real width and
    number of layers. Sums of the same hosts and links without a model are measured beside it.
    """
    model = bench.model("thin")
    shape = _STAR_LINKS
    manifest = bench.manifest(Wanted(model, (1, 1, 1, 1), ROOMY))
    trips = {f"h{index}": 2 * shape.latency_s for index in range(1, 4)}
    expected_s = allreduce_s(trips, 4 * _WIDTH_THIN, shape.bytes_per_s)
    n_tokens, n_sums = 8 * bench.turns, 2 * _N_LAYERS_THIN
    with fleet(bench.work, 4, shape=shape) as hosts:
        home = hosts.split(model, manifest, stamped=True)
        home.ask(do="decode", prompt=_PROMPT)
        home.ask(do="decode", n=4)
        times = home.ask(do="decode", n=n_tokens)["times_s"]
        home.close()
        for worker in hosts.workers:
            worker.close()
        stamps = [json.loads(hosts.stamps(index).read_bytes()) for index in range(4)]
        bare_s = trade(hosts.members("star", 4), width=_WIDTH_THIN, n=200)
    sums = [_from_last_to_last(pairs) for pairs in zip(*stamps, strict=True)][-n_tokens * n_sums :]
    tokens_s = [sum(sums[i : i + n_sums]) for i in range(0, len(sums), n_sums)]
    measured_s = statistics.median(tokens_s)
    spread = [1e3 * value for value in statistics.quantiles(tokens_s, n=4)]
    waits_s = [statistics.fmean(end - start for start, end in own[-len(sums) :]) for own in stamps]
    same = same_tokens(bench, (1, 1, 1, 1))
    return {
        "speedup": None, "identical": same["identical"], "groups": groups_of(manifest),
        "exchange_over_model": measured_s / (n_sums * expected_s), "target": 1.3,
        "bare_over_model": bare_s / expected_s,
        "expected_ms": 1e3 * n_sums * expected_s, "measured_ms": 1e3 * measured_s,
        "quartiles_ms": spread, "bare_ms": 1e3 * n_sums * bare_s,
        "with_waiting_ms": [1e3 * n_sums * wait_s for wait_s in waits_s],
        "token_ms": 1e3 * statistics.median(times),
    }  # fmt: skip


def _from_last_to_last(pairs: Sequence[Sequence[float]]) -> float:
    """Return the seconds of a sum since the last host had its part of it."""
    return max(end for _, end in pairs) - max(start for start, _ in pairs)


def tokens(bench: Bench) -> Job:
    """Greedy tokens of the trained model over several splits against one host."""
    rows = [same_tokens(bench, shares) for shares in _SPLITS]
    return {"speedup": None, "identical": all(row["identical"] for row in rows), "rows": rows}


def ring(bench: Bench) -> Job:
    """Sums over a ring against those over a star, without a model; nothing is judged."""
    rows: list[Job] = []
    for n_hosts in (3, 4):
        found: dict[str, list[float]] = {}
        with fleet(bench.work, n_hosts, shape=_STAR_LINKS) as hosts:
            for kind in ("star", "ring"):
                members = hosts.members(kind, n_hosts)
                for width, n in ((_WIDTH_THIN, 50), (128 * _WIDTH_THIN, 3)):
                    found.setdefault(kind, []).append(1e3 * trade(members, width=width, n=n))
                for member in members:
                    member.close()
        rows.append({"n_hosts": n_hosts, "token_and_prompt_ms": found})
        say(f"{n_hosts} hosts, one token and 128: {found}")
    ratios = [row["token_and_prompt_ms"] for row in rows]
    return {"speedup": [r["star"][0] / r["ring"][0] for r in ratios], "identical": None,
            "rows": rows}  # fmt: skip


def compared(one: Program, two: Program, hosts: Fleet, turns: int, n_tokens: int) -> Job:
    """Decode on both sides in turn.

    Returns:
        The speed-up, how far turns are apart, and processor time of a token on one host, at home
        and on the others, which other programs disturb less than the clock.
    """
    for side in (one, two):
        side.ask(do="decode", prompt=_PROMPT)
        side.ask(do="decode", n=3)
    programs = (one, two, *hosts.workers)
    before = [program.cpu_s for program in programs]
    pairs = []
    for _ in range(turns):
        pair = [
            statistics.median(side.ask(do="decode", n=n_tokens)["times_s"]) for side in (one, two)
        ]
        pairs.append(pair)
        say(f"  {1e3 * pair[0]:.1f} against {1e3 * pair[1]:.1f} ms")
    ratios = [a / b for a, b in pairs]
    cpu = [program.cpu_s - start for program, start in zip(programs, before, strict=True)]
    return {
        "speedup": statistics.median(ratios), "ratios": ratios,
        "one_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "two_ms": 1e3 * statistics.median(b for _, b in pairs),
        "cpu_ms": [1e3 * value / (turns * n_tokens) for value in cpu],
    }  # fmt: skip


def exchange_us(split: Program, manifest: Manifest, n_tokens: int) -> float:
    """Return the microseconds of one sum at the spoke, waiting for home included."""
    spokes: dict[str, float] = _exchange_s(split, n_tokens)["spokes_s"]
    return 1e6 * min(spokes.values()) / (2 * manifest.model.n_layer)


def _exchange_s(split: Program, n_tokens: int) -> Job:
    """Return the seconds of a token, and of those what each spoke was in sums."""
    before = _waits(split.ask(do="facts"))
    times = split.ask(do="decode", n=n_tokens)["times_s"]
    after = _waits(split.ask(do="facts"))
    spokes = {name: (after[name] - before[name]) / n_tokens for name in after}
    return {"token_s": statistics.fmean(times), "spokes_s": spokes}


def _waits(facts: Job) -> dict[str, float]:
    return {
        name: sum(part["exchange_s"] for one in told["sessions"] for part in one["parts"])
        for name, told in facts["others"].items()
    }


def _tokens_of(name: str) -> int:
    """Return how many tokens a turn has, so that it takes about a second."""
    return {"1b": 16, "3b": 6}.get(name, 3)


CASES: dict[str, Callable[[Bench], Job]] = {
    "tensor2": tensor2,
    "capped2": capped2,
    "star4": star4,
    "tokens": tokens,
    "ring": ring,
}
