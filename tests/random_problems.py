"""Random search problems: small enough for brute force, with everything that can go wrong."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from partition.problem import METRICS, DeviceOption, Hop, Problem, UnitCost


def random_problem(seed: int, most_units: int = 7, most_devices: int = 3) -> Problem:
    """Shared memories, missing links, forbidden units, several classes, ceilings, any objective."""
    random = Random(seed)
    n_units = random.choice((random.randint(2, most_units), most_units))
    n_devices = random.choice((random.randint(1, most_devices), most_devices))
    n_classes = random.choice((1, 1, 2, 3))
    reads = tuple(sorted(random.choice((1.0, 0.6, 0.3, 0.0)) for _ in range(n_classes))[::-1])
    pools = [random.randrange(n_devices) for _ in range(n_devices)]
    names = sorted(set(pools))
    weights = [_weights(random, n_classes) for _ in range(n_units)]
    kept = [random.choice((0, random.randint(0, 20))) for _ in range(n_units)]
    whole = sum(map(sum, weights)) + sum(kept)
    problem = Problem(
        n_units=n_units,
        reads=reads,
        devices=tuple(
            _device(random, f"h{names.index(pool)}/d{index}", names.index(pool), weights, kept)
            for index, pool in enumerate(pools)
        ),
        pool_bytes=tuple(int(whole * random.uniform(0.3, 1.5)) for _ in names),
        hops={
            (a, b): _hop(random, inside=pools[a] == pools[b])
            for a in range(n_devices)
            for b in range(n_devices)
            if a != b and random.random() < 0.85
        },
        first_hops=_ends(random, n_devices),
        last_hops=_ends(random, n_devices),
        objective=random.choice(METRICS),
    )
    return replace(problem, ceilings=_ceilings(random, problem, whole))


def _weights(random: Random, n_classes: int) -> tuple[float, ...]:
    return tuple(random.choice((0, random.randint(1, 100))) for _ in range(n_classes))


def _device(
    random: Random, name: str, pool: int, weights: list[tuple[float, ...]], kept: list[int]
) -> DeviceOption:
    speed, sweeps = random.uniform(0.2, 3), random.randint(1, 3)
    units = tuple(
        None
        if random.random() < 0.03
        else UnitCost(weight, keep, speed * random.uniform(0.5, 1.5), speed * random.uniform(3, 9))
        for weight, keep in zip(weights, kept, strict=True)
    )
    return DeviceOption(
        name=name,
        pool=pool,
        units=units,
        fixed_bytes=random.choice((0, random.randint(0, 60))),
        window_bytes=random.choice((0, random.randint(0, 60))),
        flash_bytes_per_s=random.choice((None, random.uniform(5, 80), random.uniform(5, 80))),
        n_sweeps=sweeps,
        power_w=random.choice((0.0, random.uniform(1, 20))),
    )


def _hop(random: Random, *, inside: bool) -> Hop:
    decode = random.uniform(0, 0.5)
    return Hop(decode, decode * random.uniform(1, 9), 0 if inside else random.randint(0, 9) * 100)


def _ends(random: Random, n_devices: int) -> tuple[Hop | None, ...]:
    return tuple(
        None if random.random() < 0.03 else _hop(random, inside=random.random() < 0.5)
        for _ in range(n_devices)
    )


def _ceilings(random: Random, problem: Problem, whole: int) -> dict[str, float]:
    typical = {
        "tpot_s": 1.2 * problem.n_units,
        "ttft_s": 8.0 * problem.n_units,
        "memory_bytes": 0.8 * whole,
        "energy_j": 9.0 * problem.n_units,
        "sent_bytes": 900.0,
    }
    n_ceilings = random.choice((0, 0, 1, 1, 2))
    chosen = random.sample(sorted(set(METRICS) - {problem.objective}), n_ceilings)
    return {metric: typical[metric] * random.uniform(0.6, 3) for metric in chosen}
