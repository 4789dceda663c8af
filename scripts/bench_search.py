"""Seconds the planner's search takes on made-up problems of the size it is meant for."""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from random import Random

from partition.problem import DeviceOption, Hop, Metric, Placement, Problem, UnitCost
from partition.search import search

_HOSTS_OF_TWO = tuple(index // 2 for index in range(8))


def main() -> None:
    """Search each problem for some seeds; print a table, then one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    print(f"{'problem':44} {'median s':>9} {'worst s':>9} {'worst gap':>10}")
    for name in _CASES:
        runs = [_timed(_problem(name, seed)) for seed in range(arguments.seeds)]
        seconds = [run[0] for run in runs]
        row = {
            "problem": name,
            "median_s": round(statistics.median(seconds), 3),
            "worst_s": round(max(seconds), 3),
            "worst_gap": max(run[1].gap for run in runs),
        }
        rows.append(row)
        print(f"{name:44} {row['median_s']:9} {row['worst_s']:9} {row['worst_gap']:10.2g}")
    print(json.dumps({"benchmark": "search", "seeds": arguments.seeds, "results": rows}))


# Units, read classes, memory of each device, objective, ceiling as a multiple of what is reached
# when only TPOT counts.
_Case = tuple[int, int, tuple[int, ...], Metric, dict[Metric, float]]
_CASES: dict[str, _Case] = {
    "80 units, 8 devices": (80, 1, tuple(range(8)), "tpot_s", {}),
    "80 units, 8 devices, 4 shared memories": (80, 1, _HOSTS_OF_TWO, "tpot_s", {}),
    "80 units, 8 devices, ceiling on TTFT": (80, 1, tuple(range(8)), "tpot_s", {"ttft_s": 0.95}),
    "48 units, 16 classes, 4 devices": (48, 16, (0, 1, 2, 3), "tpot_s", {}),
    "48x16, 4 devices, 1 shared memory": (48, 16, (0, 0, 1, 2), "tpot_s", {}),
    "48x16, shared memory, energy under TPOT": (48, 16, (0, 0, 1, 2), "energy_j", {"tpot_s": 1.2}),
    "48x16, shared memory, memory under TPOT": (
        48, 16, (0, 0, 1, 2), "memory_bytes", {"tpot_s": 1.2},
    ),
    "48x16, shared memory, bytes sent under TPOT": (
        48, 16, (0, 0, 1, 2), "sent_bytes", {"tpot_s": 1.2},
    ),
}  # fmt: skip


def _timed(problem: Problem) -> tuple[float, Placement]:
    start = time.perf_counter()
    found = search(problem)
    return time.perf_counter() - start, found


def _problem(name: str, seed: int) -> Problem:
    n_units, n_classes, pools, objective, ceilings = _CASES[name]
    problem = _made_up(n_units, n_classes, pools, seed)
    if not ceilings:
        return problem
    fast = search(problem).score
    lean = search(replace(problem, objective="ttft_s")).score
    limits = {
        # A ceiling below what the fastest decoder reaches, but not below what is possible.
        metric: max(factor * fast.of(metric), 1.001 * lean.of(metric) if factor < 1 else 0.0)
        for metric, factor in ceilings.items()
    }
    return replace(problem, objective=objective, ceilings=limits)


def _made_up(n_units: int, n_classes: int, pools: tuple[int, ...], seed: int) -> Problem:
    """Make units of about 200 MB, too many for all memories together, for unequal devices."""
    random = Random(seed)
    weights = [
        tuple(float(int(random.uniform(0.9, 1.1) * 200e6 / n_classes)) for _ in range(n_classes))
        for _ in range(n_units)
    ]
    devices = tuple(_device(random, index, pool, weights) for index, pool in enumerate(pools))
    pairs = [(a, b) for a in range(len(pools)) for b in range(len(pools)) if a != b]
    return Problem(
        n_units=n_units,
        reads=tuple(1 / (index + 1) for index in range(n_classes)),
        devices=devices,
        pool_bytes=tuple(float(int(random.uniform(2, 6) * 1e9)) for _ in set(pools)),
        hops={
            (a, b): Hop(2e-5, 1e-3)
            if pools[a] == pools[b]
            else Hop(random.uniform(1e-4, 5e-3), random.uniform(0.01, 0.3), 8192.0)
            for a, b in pairs
        },
        first_hops=(Hop(1e-4, 1e-2, 100.0),) * len(pools),
        last_hops=(Hop(1e-4, 1e-4, 100.0),) * len(pools),
    )


def _device(
    random: Random, index: int, pool: int, weights: list[tuple[float, ...]]
) -> DeviceOption:
    speed = random.uniform(0.5, 3)
    return DeviceOption(
        name=f"h{pool}/d{index}",
        pool=pool,
        units=tuple(
            UnitCost(weight, 4e6, 2e-3 * speed * random.uniform(0.9, 1.1), 0.2 * speed)
            for weight in weights
        ),
        fixed_bytes=5e8,
        window_bytes=4e8,
        flash_bytes_per_s=1e9 if index == 0 else random.choice((None, 1e9, 3e9)),
        n_sweeps=random.randint(1, 4),
        power_w=random.uniform(2, 50),
    )


if __name__ == "__main__":
    main()
