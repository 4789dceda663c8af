"""The planner's search against an independent brute force, and what it promises in any case."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import PlanError
from oracles import best_value, recount
from partition.bounded_search import bounded_search
from partition.chain_search import chain_search, separable
from partition.enumerate_search import enumerate_search
from partition.evaluate import score
from partition.problem import METRICS, DeviceOption, Hop, Placement, Problem, UnitCost
from partition.search import search
from random_problems import random_problem

SEEDS = st.integers(10_000, 1_000_000)


def found_or_none(problem: Problem) -> Placement | None:
    try:
        return search(problem)
    except PlanError:
        return None


def without_sharing(problem: Problem) -> Problem:
    devices = tuple(replace(option, pool=i) for i, option in enumerate(problem.devices))
    sizes = tuple(problem.pool_bytes[option.pool] for option in problem.devices)
    return replace(problem, ceilings={}, devices=devices, pool_bytes=sizes)


def two_devices(**changes: object) -> Problem:
    """Two units of 10 bytes, 1 s and 4 s of prefill each, on `a` (slow flash) or `b` (none)."""
    units = (UnitCost((10.0,), 0.0, 1.0, 4.0),) * 2
    problem = Problem(
        n_units=2,
        reads=(1.0,),
        devices=(
            DeviceOption("h0/a", 0, units, 0.0, flash_bytes_per_s=5.0),
            DeviceOption("h1/b", 1, units, 0.0),
        ),
        pool_bytes=(10.0, 10.0),
        hops={(0, 1): Hop(0.25, 1.0, 100.0), (1, 0): Hop(0.25, 1.0, 100.0)},
        first_hops=(Hop(0.0, 0.0), Hop(0.25, 1.0, 100.0)),
        last_hops=(Hop(0.0, 0.0), Hop(0.25, 1.0, 100.0)),
    )
    return replace(problem, **changes)


@pytest.mark.parametrize("first_seed", range(0, 500, 50))
def test_search_equals_brute_force_on_500_random_instances(first_seed: int) -> None:
    for seed in range(first_seed, first_seed + 50):
        problem = random_problem(seed)
        expected = best_value(problem)
        found = found_or_none(problem)
        assert (found is None) == (expected is None), seed
        if found is not None:
            value = found.score.of(problem.objective)
            assert value == pytest.approx(expected, rel=1e-6, abs=1e-9), seed
            assert found.gap == 0.0


def test_random_instances_are_of_every_kind() -> None:
    problems = [random_problem(seed) for seed in range(500)]
    feasible = sum(found_or_none(problem) is not None for problem in problems)
    assert 300 < feasible < 450
    assert {problem.objective for problem in problems} == set(METRICS)
    assert {metric for problem in problems for metric in problem.ceilings} == set(METRICS)
    assert {len(problem.devices) for problem in problems} == {1, 2, 3}
    assert {problem.n_units for problem in problems} == {2, 3, 4, 5, 6, 7}
    shared = [p for p in problems if len({d.pool for d in p.devices}) < len(p.devices)]
    assert len(shared) > 100
    assert any(None in device.units for p in problems for device in p.devices)
    assert any(len(p.hops) < len(p.devices) * (len(p.devices) - 1) for p in problems)


@settings(deadline=None, max_examples=150)
@given(SEEDS)
def test_every_unit_is_placed_once_and_no_memory_or_ceiling_is_exceeded(seed: int) -> None:
    problem = random_problem(seed, most_units=10, most_devices=4)
    found = found_or_none(problem)
    if found is None:
        return
    stages = found.stages
    assert [stage.first for stage in stages] == [0, *(stage.end for stage in stages[:-1])]
    assert stages[-1].end == problem.n_units
    assert all(stage.first < stage.end for stage in stages)
    assert len({stage.device for stage in stages}) == len(stages)
    counted, taken = recount(problem, found)
    for used, capacity in zip(taken, problem.pool_bytes, strict=True):
        assert used <= capacity * (1 + 1e-12)
    for metric in METRICS:
        assert counted.of(metric) == pytest.approx(found.score.of(metric), rel=1e-7, abs=1e-7)
        assert counted.of(metric) <= problem.ceilings.get(metric, float("inf")) * (1 + 1e-8)


@settings(deadline=None, max_examples=60)
@given(SEEDS)
def test_dynamic_programme_equals_enumeration_ties_included(seed: int) -> None:
    problem = without_sharing(random_problem(seed, most_units=8, most_devices=4))
    assert separable(problem)
    assert chain_search(problem) == enumerate_search(problem)[0]


@settings(deadline=None, max_examples=60)
@given(SEEDS)
def test_branch_and_bound_equals_enumeration(seed: int) -> None:
    problem = random_problem(seed, most_units=8, most_devices=4)
    expected, _ = enumerate_search(problem)
    found = bounded_search(problem)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        for metric in (problem.objective, "tpot_s"):
            best = expected.score.of(metric)
            assert found.score.of(metric) == pytest.approx(best, rel=1e-8, abs=1e-9)


@settings(deadline=None, max_examples=40)
@given(SEEDS)
def test_branch_and_bound_equals_dynamic_programme_on_longer_chains(seed: int) -> None:
    problem = without_sharing(random_problem(seed, most_units=30, most_devices=5))
    expected, found = chain_search(problem), bounded_search(problem)
    assert (found is None) == (expected is None)
    if found is not None and expected is not None:
        best = expected.score.of(problem.objective)
        assert found.score.of(problem.objective) == pytest.approx(best, rel=1e-8, abs=1e-9)


def test_equal_problems_give_equal_placements() -> None:
    for seed in range(2000, 2040):
        one, other = random_problem(seed, 9, 4), random_problem(seed, 9, 4)
        assert repr(found_or_none(one)) == repr(found_or_none(other))


def test_names_do_not_change_a_placement() -> None:
    for seed in range(2100, 2120):
        problem = random_problem(seed, 9, 4)
        devices = tuple(replace(option, name=option.name[::-1]) for option in problem.devices)
        renamed = replace(problem, devices=devices)
        assert found_or_none(problem) == found_or_none(renamed)


def test_slow_device_is_not_used() -> None:
    # Both units on a: 2 s of computing hides 10 bytes at 5 bytes/s. With b: 2 s and 0.5 s of hops.
    found = search(two_devices())
    assert [stage.device for stage in found.stages] == [0]
    assert found.score.tpot_s == 2.0


def test_bytes_whose_streaming_hides_behind_computing_are_not_pinned() -> None:
    # 20 bytes fit, but 10 stream in the 2 s that computing takes anyway.
    found = search(two_devices(pool_bytes=(20.0, 20.0)))
    assert [stage.pinned_bytes for stage in found.stages] == [10.0]
    assert found.score.tpot_s == 2.0


def test_second_device_is_used_where_it_saves_streaming() -> None:
    # Alone a streams 15 bytes in 3 s; beside b it hides 5 bytes: 2 s and 0.5 s of hops.
    found = search(two_devices(pool_bytes=(5.0, 10.0)))
    assert {(stage.device, stage.pinned_bytes) for stage in found.stages} == {(0, 5.0), (1, 10.0)}
    assert found.score.tpot_s == 2.5


def test_equally_good_placements_are_decided_by_speed() -> None:
    problem = two_devices(objective="sent_bytes", pool_bytes=(0.0, 20.0))
    # Nothing crosses a link on a, which streams 20 bytes in 4 s.
    assert search(problem).score.tpot_s == 4.0
    alike = replace(problem, first_hops=(Hop(0, 0),) * 2, last_hops=(Hop(0, 0),) * 2)
    assert search(alike).score.tpot_s == 2.0


def test_devices_that_are_alike_are_used_in_their_order() -> None:
    option = replace(two_devices().devices[1], pool=0)
    problem = two_devices(
        devices=(option, replace(option, name="h2/b")),
        pool_bytes=(20.0, 10.0),
        first_hops=(Hop(0.25, 1.0),) * 2,
        last_hops=(Hop(0.25, 1.0),) * 2,
    )
    assert [stage.device for stage in search(problem).stages] == [0]
    apart = (option, replace(option, name="h2/b", pool=1))
    problem = replace(problem, devices=apart, pool_bytes=(10.0, 10.0))
    assert [stage.device for stage in search(problem).stages] == [0, 1]


def test_error_names_memory_and_numbers_nearest_miss_first() -> None:
    problem = two_devices(
        devices=tuple(replace(d, flash_bytes_per_s=None) for d in two_devices().devices)
    )
    problem = replace(problem, pool_bytes=(9.0, 8.0))
    with pytest.raises(PlanError) as caught:
        search(problem)
    lines = caught.value.message.splitlines()
    assert lines[1] == (
        "all devices together: memory of all devices: needs at least 20 bytes, has 17"
    )
    assert lines[2] == "h0/a 0..1, h1/b 1..2: memory of h0/a: needs at least 10 bytes, has 9"
    assert lines[-1] == "h1/b 0..2: memory of h1/b: needs at least 20 bytes, has 8"
    assert len(lines) <= 9


def test_error_names_ceiling_and_the_least_that_is_possible() -> None:
    with pytest.raises(
        PlanError, match=r"any placement: tpot_s is at least 2, the ceiling is 1\.5"
    ):
        search(two_devices(ceilings={"tpot_s": 1.5}, objective="memory_bytes"))


def test_error_names_ceilings_that_only_together_are_too_low() -> None:
    # Alone, 2 s need 10 bytes pinned, and 0 bytes pinned need 4 s.
    ceilings = {"tpot_s": 2.5, "memory_bytes": 2.0}
    with pytest.raises(PlanError, match=r"tpot_s <= 2\.5 and memory_bytes <= 2 cannot all hold"):
        search(two_devices(ceilings=ceilings, objective="energy_j"))


def test_error_names_missing_links_and_forbidden_units() -> None:
    problem = two_devices(hops={})
    first, second = problem.devices
    devices = (
        replace(first, units=(first.units[0], None)),
        replace(second, units=(None, second.units[1])),
    )
    with pytest.raises(PlanError, match=r"no link from h0/a to h1/b"):
        search(replace(problem, devices=devices))
    devices = (devices[0], replace(second, units=(second.units[0], None)))
    with pytest.raises(PlanError, match=r"unit 1: is not allowed on any device"):
        search(replace(problem, devices=devices))


def test_error_of_a_large_problem_is_short() -> None:
    device = two_devices().devices[1]
    unit = UnitCost((10.0,), 0.0, 1.0, 4.0)
    problem = replace(
        two_devices(),
        n_units=80,
        devices=tuple(
            replace(device, name=f"h{i}/b", pool=i, units=(unit,) * 80) for i in range(8)
        ),
        pool_bytes=tuple(range(10, 90, 10)),
        hops={(a, b): Hop(0.1, 0.1) for a in range(8) for b in range(8)},
        first_hops=(Hop(0.1, 0.1),) * 8,
        last_hops=(Hop(0.1, 0.1),) * 8,
    )
    with pytest.raises(PlanError, match="needs at least 800 bytes, has 360") as caught:
        search(problem)
    lines = caught.value.message.splitlines()
    assert len(lines) <= 9
    assert lines[2].startswith("h7/b 0..80: ")


def test_misuse_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="not covered once"):
        score(two_devices(), ((0, 0, 1),))
    with pytest.raises(ValueError, match="used twice"):
        score(two_devices(), ((0, 0, 1), (0, 1, 2)))
    with pytest.raises(ValueError, match="share a memory"):
        chain_search(two_devices(ceilings={"tpot_s": 9.0}))
