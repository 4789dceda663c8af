"""What plans must not do: forget a placement, a ceiling, a memory, or what they do not know."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

import numpy as np
import pytest

from builders_plan import BOARD, MB, PI, alone, limited, workload
from devices.catalog import known_host, usual_link
from devices.profile import DeviceProfile, Figure, HostProfile
from devices.topology import Topology
from edgert.errors import BackendError, CapacityError, ConfigError, PlanError
from partition.build_problem import build_problem
from partition.candidate_search import materialise, search_and_cut
from partition.candidates import Candidate
from partition.cost import work_seconds
from partition.goal import ALL_ABILITIES, Goal
from partition.linear_program import Floats, minimise
from partition.plan import frontier, make_plan, stopped_early
from partition.popularity import Popularity
from partition.search import search
from partition.settings import prepare
from partition.units import Work

GOAL = Goal(n_prompt=64, n_ctx=512, ubatches=(32,))
SPLIT = replace(
    GOAL,
    abilities=ALL_ABILITIES - {"tensor_parallel"},
    may_leave=("input", "hidden_states", "logits"),
)


def star(*hosts: HostProfile) -> Topology:
    home = hosts[0].host_id
    pairs = [(home, host.host_id) for host in hosts[1:]]
    links = [
        usual_link("ethernet_10g", *ends) for pair in pairs for ends in (pair, (pair[1], pair[0]))
    ]
    return Topology(home=home, hosts=hosts, links=tuple(links))


def with_power(host: HostProfile, watts: float | None) -> HostProfile:
    power = None if watts is None else Figure(value=watts, origin="declared")
    devices = tuple(device.model_copy(update={"power_w": power}) for device in host.devices)
    return host.model_copy(update={"devices": devices})


def without_flash(host: HostProfile) -> HostProfile:
    return host.model_copy(update={"flash": None})


def chosen(shape: str, topology: Topology, goal: Goal) -> Candidate:
    return make_plan(workload(shape), topology, goal).chosen


@pytest.mark.parametrize("a_mb", [120, 160, 180, 200, 250])
@pytest.mark.parametrize("b_mb", [220, 400, 600])
def test_a_second_host_never_takes_a_plan_away(a_mb: int, b_mb: int) -> None:
    home, other = limited(PI, a_mb * MB, "a"), limited(PI, b_mb * MB, "b")
    together = chosen("1b", star(home, other), SPLIT)
    by_itself = chosen("1b", alone(other), SPLIT)
    assert together.tpot_s <= by_itself.tpot_s * 1.02 + 0.002


@pytest.mark.parametrize("shape", ["1b", "7b", "moe"])
def test_search_finds_to_fit_exactly_what_can_be_cut(shape: str) -> None:
    topology = alone(known_host(PI))
    needs = []
    for option in prepare(workload(shape), topology, GOAL, Popularity()):
        built = build_problem(option.chain, topology, GOAL, option.overheads)
        device = built.problem.devices[0]
        kept = sum(unit.kept_bytes for unit in device.units if unit is not None)
        needs.append(int(device.fixed_bytes + kept + device.window_bytes))
    assert len(needs) == (2 if shape == "moe" else 1)
    least = min(needs)
    assert chosen(shape, alone(limited(PI, least)), GOAL).peak_bytes <= least
    with pytest.raises(PlanError, match=f"needs at least {least:,} bytes"):
        chosen(shape, alone(limited(PI, least - 1)), GOAL)


def test_a_placement_that_cannot_be_cut_is_searched_again_with_less() -> None:
    topology = star(limited(PI, 150 * MB, "a"), limited(PI, 400 * MB, "b"))
    (option,) = prepare(workload("1b"), topology, SPLIT, Popularity())
    built = build_problem(option.chain, topology, SPLIT, option.overheads)
    # As if windows took nothing: the search gives the small host more than can be cut there.
    devices = tuple(replace(device, window_bytes=0.0) for device in built.problem.devices)
    misled = replace(built, problem=replace(built.problem, devices=devices))
    with pytest.raises(CapacityError):
        materialise(workload("1b"), option, misled, search(misled.problem), SPLIT)
    found = search_and_cut(workload("1b"), option, misled, SPLIT)
    assert found.tpot_s <= chosen("1b", alone(limited(PI, 400 * MB)), SPLIT).tpot_s * 1.02


@pytest.mark.parametrize("extra", [-1, 0, 1, 50_000, 500_000, 1_000_000])
@pytest.mark.parametrize("can_read", [False, True])
def test_without_streaming_a_model_fits_or_is_refused(extra: int, can_read: bool) -> None:
    goal = GOAL if not can_read else replace(GOAL, abilities=frozenset({"resident"}))
    host = known_host(PI) if can_read else without_flash(known_host(PI))
    (option,) = prepare(workload("1b"), alone(host), goal, Popularity())
    device = build_problem(option.chain, alone(host), goal, option.overheads).problem.devices[0]
    units = [unit for unit in device.units if unit is not None]
    need = device.fixed_bytes + sum(unit.kept_bytes + sum(unit.weight_bytes) for unit in units)
    small = limited(PI, int(need) + extra)
    small = small if can_read else without_flash(small)
    if extra < 0:
        with pytest.raises(PlanError, match="memory of"):
            chosen("1b", alone(small), goal)
        return
    (stage,) = chosen("1b", alone(small), goal).stages
    assert not stage.tiers.streamed
    assert stage.peak_bytes <= int(need) + extra


@pytest.mark.parametrize("limit_mb", [240, 300, 500, 1000])
def test_an_expert_cache_never_takes_a_plan_away(limit_mb: int) -> None:
    topology = alone(limited(BOARD, limit_mb * MB))
    with_cache = chosen("moe", topology, replace(GOAL, abilities=ALL_ABILITIES))
    assert with_cache.peak_bytes <= limit_mb * MB
    try:
        plain = chosen("moe", topology, GOAL)
    except PlanError:
        return
    assert with_cache.tpot_s <= plain.tpot_s


def test_dense_weights_stream_beside_a_cache_that_leaves_no_room() -> None:
    (stage,) = chosen(
        "moe", alone(limited(BOARD, 240 * MB)), replace(GOAL, abilities=ALL_ABILITIES)
    ).stages
    assert stage.tiers.streamed
    assert stage.tiers.cached
    assert stage.tiers.experts is not None
    assert stage.tiers.window_bytes + stage.tiers.experts.cache_bytes < 70 * MB


def test_ceilings_are_by_token_where_a_pass_makes_several() -> None:
    topology = alone(with_power(limited(PI, 700 * MB), 5.0))
    drafting = replace(GOAL, tokens_per_pass=4.0, n_drafted=16, draft="ngram")
    free = chosen("1b", topology, drafting)
    for metric in ("tpot_s", "energy_j"):
        ceiling = {metric: 1.5 * free.of(metric)}
        assert chosen("1b", topology, replace(drafting, ceilings=ceiling)).tpot_s <= free.tpot_s


def test_unknown_power_keeps_no_ceiling_on_energy() -> None:
    topology = star(with_power(known_host(PI), 50.0), with_power(known_host(BOARD), None))
    goal = replace(SPLIT, ceilings={"energy_j": 1e-6})
    with pytest.raises(PlanError, match="energy_j"):
        chosen("1b", topology, goal)
    assert chosen("1b", alone(with_power(known_host(PI), None)), GOAL).energy_j == inf


def test_logits_stay_at_home_with_the_input_free_to_leave() -> None:
    topology = star(limited(PI, 700 * MB), known_host(BOARD))
    goal = replace(SPLIT, may_leave=("input", "hidden_states"))
    heads = [stage for stage in chosen("1b", topology, goal).stages if stage.head]
    assert [stage.place.host.host_id for stage in heads] == [topology.home]


def test_frontier_keeps_ceilings_and_knows_what_it_does_not_know() -> None:
    boards = star(known_host(BOARD, "b0"), known_host(BOARD, "b1"))
    goal = replace(
        GOAL,
        abilities=ALL_ABILITIES,
        may_leave=("hidden_states",),
        ceilings={"sent_bytes": 100.0},
    )
    found = frontier(workload("1b"), boards, goal, ("tpot_s", "memory_bytes"))
    assert found
    assert all(candidate.of("sent_bytes") <= 100 for candidate in found)
    unknown = alone(with_power(known_host(PI), None))
    found = frontier(workload("1b"), unknown, GOAL, ("tpot_s", "energy_j"))
    assert [candidate.of("energy_j") for candidate in found] == [inf]
    with pytest.raises(ConfigError, match="tokens_per_pass"):
        frontier(workload("1b"), unknown, replace(GOAL, tokens_per_pass=9.0), ("tpot_s",))
    with pytest.raises(PlanError, match="no plan satisfies"):
        frontier(workload("1b"), unknown, replace(GOAL, ceilings={"ttft_s": 1e-6}), ("tpot_s",))


def test_the_whole_model_on_one_device_is_part_of_the_frontier() -> None:
    # One device that holds everything is a baseline, and found as nothing else.
    found = frontier(workload("1b"), alone(known_host(PI)), GOAL, ("tpot_s", "memory_bytes"))
    assert found[0].stages[0].tiers.layout == "repacked"


def plain_tpot(shape: str, topology: Topology, goal: Goal) -> float:
    (way,) = [
        way
        for way in make_plan(workload(shape), topology, goal).plain
        if way.name.startswith("llama.cpp")
    ]
    assert way.tpot_s is not None
    return way.tpot_s


def test_mapped_experts_are_all_read_below_half_of_the_model_in_memory_and_few_above() -> None:
    host = limited(BOARD, 300 * MB)
    assert host.flash is not None
    model = workload("moe")
    parts = (model.entrance, *model.layers, model.head)
    tensors = [tensor for part in parts for tensor in part.tensors]
    flash = host.flash.streaming.value
    every = sum(tensor.size_bytes for tensor in tensors if tensor.role != "lookup")
    for megabytes in (300, 2000):
        seconds = plain_tpot("moe", alone(limited(BOARD, megabytes * MB)), GOAL)
        assert seconds == pytest.approx(every / flash, rel=0.03)
    active = sum(tensor.active_bytes for tensor in tensors)
    assert plain_tpot("moe", alone(limited(BOARD, 3600 * MB)), GOAL) < active / flash


def test_llama_alone_makes_a_token_a_pass() -> None:
    drafting = replace(GOAL, tokens_per_pass=4.0, n_drafted=16, draft="ngram")
    topology = alone(known_host(PI))
    assert plain_tpot("1b", topology, drafting) == plain_tpot("1b", topology, GOAL)


def of_sizes(*sizes: int) -> DeviceProfile:
    return known_host(PI).devices[0].model_copy(update={"static_tokens": sizes})


def test_prebuilt_graphs_compute_their_size_whatever_they_are_given() -> None:
    device, fixed = known_host(PI).devices[0], of_sizes(128)
    one = Work(1, 1, {"q4_0": 2e9}, {"q4_0": 5e8}, 1e9, 1e3, head_length=64)
    full = Work(128, 1, {"q4_0": 128 * 2e9}, {"q4_0": 5e8}, 128e9, 1e3, head_length=64)
    assert work_seconds(one, fixed, "file") == work_seconds(full, device, "file")
    # 130 tokens in sweeps of 100 and 30 are padded twice.
    two = Work(130, 2, {"q4_0": 130 * 2e9}, {"q4_0": 1e9}, sweep_tokens=100)
    padded = Work(256, 2, {"q4_0": 256 * 2e9}, {"q4_0": 1e9}, sweep_tokens=128)
    assert work_seconds(two, fixed, "file") == pytest.approx(work_seconds(padded, device, "file"))


GPU_HOST = "desktop-rtx-3060-12gb"


def with_ram(limit_bytes: int) -> HostProfile:
    host = known_host(GPU_HOST)
    ram = next(device.pool_id for device in host.devices if device.kind == "cpu")
    pools = tuple(
        pool.model_copy(update={"available_bytes": limit_bytes}) if pool.pool_id == ram else pool
        for pool in host.pools
    )
    return host.model_copy(update={"pools": pools})


def test_a_graphics_stage_takes_its_program_from_the_host() -> None:
    goal = replace(GOAL, abilities=ALL_ABILITIES)
    host = with_ram(1000 * MB)
    (stage,) = chosen("1b", alone(host), goal).stages
    assert stage.place.device.kind == "gpu"
    assert stage.host_bytes > host.process_bytes.value
    assert stage.fixed_bytes == stage.host_bytes + stage.buffer_bytes
    with pytest.raises(PlanError, match="its program takes"):
        chosen("1b", alone(with_ram(50 * MB)), goal)


def rows_bytes(goal: Goal) -> int:
    """Return what a table of wide rows takes."""
    topology = alone(known_host(PI))
    return prepare(workload("7b"), topology, goal, Popularity())[0].overheads.program_bytes


def test_rows_of_a_whole_micro_batch_are_kept_at_once() -> None:
    # Rows of 4096 in q4_0 take two pages: 2048 of them 16 MiB, and 1024 still the bound of 8 MiB.
    few, many, more = (
        rows_bytes(Goal(n_prompt=4096, n_ctx=4096, ubatches=(n,))) for n in (512, 1024, 2048)
    )
    assert few == many
    assert more - many == 8 << 20


@pytest.mark.parametrize("n_threads", [1, 64])
def test_scratch_is_that_of_the_threads_that_compute(n_threads: int) -> None:
    host = known_host(PI)
    kernels = tuple(
        kernel.model_copy(update={"n_threads": n_threads}) for kernel in host.devices[0].kernels
    )
    device = host.devices[0].model_copy(update={"kernels": kernels, "attention": ()})
    host = host.model_copy(update={"devices": (device,)})
    (option,) = prepare(workload("7b"), alone(host), GOAL, Popularity())
    (usual,) = prepare(workload("7b"), alone(known_host(PI)), GOAL, Popularity())
    more = option.overheads.buffer_bytes - usual.overheads.buffer_bytes
    # Tiles of 64 rows and 64 cells for keys and values of 128, and their scores.
    tiles = 4 * (128 * (128 + 128) + 2 * 64 * 64)
    assert (more > 50 * tiles) if n_threads == 64 else (more < 0)


def test_a_search_that_stopped_early_is_said_to() -> None:
    topology = alone(limited(PI, 500 * MB))
    (option,) = prepare(workload("1b"), topology, GOAL, Popularity())
    built = build_problem(option.chain, topology, GOAL, option.overheads)
    proven = search(built.problem)
    unsure = materialise(workload("1b"), option, built, replace(proven, gap=0.25), GOAL)
    assert stopped_early(unsure, GOAL) == (
        "the search stopped early: at most 25 % from the best tpot",
    )
    assert stopped_early(materialise(workload("1b"), option, built, proven, GOAL), GOAL) == ()


def rows(*values: Sequence[float]) -> Floats:
    return np.array(values, dtype=np.float64)


def test_a_linear_programme_without_an_end_is_not_called_infeasible() -> None:
    costs, most, upper = np.array([-1.0]), np.array([1.0]), np.array([np.inf])
    with pytest.raises(BackendError, match="HiGHS ended"):
        minimise(costs, rows([0.0]), most, upper)
    assert minimise(costs, rows([1.0]), np.array([-1.0]), upper) is None
    found = minimise(costs, rows([1.0]), most, upper)
    assert found is not None
    assert found[0] == pytest.approx(1.0)
