"""What a cache of experts leaves to be read: by hand, and against the runtime's own policy."""

from __future__ import annotations

import numpy as np
import pytest

from builders_plan import BOARD, MB, alone, limited, workload
from edgert.experts.scores import Mixed
from partition.cached_tiers import cached_stage
from partition.expert_misses import assumed, replayed, wanted_together
from partition.expert_slots import SlotUse, least_cache_bytes, share_slots, slot_stride
from partition.goal import Goal
from partition.plan import make_plan
from partition.popularity import Choices, Popularity
from partition.simulate import PassItem, simulate_passes
from partition.stage_tiers import stage_weights

N_EXPERT = 8


def test_slots_are_whole_pages_with_those_around_what_is_read_from_a_file() -> None:
    assert slot_stride(8192, repacked=True) == 8192
    assert slot_stride(8193, repacked=True) == 12288
    assert slot_stride(8192, repacked=False) == 12288  # it may begin anywhere in its first page
    assert slot_stride(8193, repacked=False) == 12288


def test_pools_share_a_budget_and_hold_one_token_at_least() -> None:
    # Two layers with two stacks of 4 KB and one of 8 KB; a token wants 2 of 4 experts.
    stacks = [SlotUse(turn, 4, stride) for turn in (0, 1) for stride in (4096, 4096, 8192)]
    assert least_cache_bytes(stacks, 2) == 2 * 2 * 4096 + 2 * 8192
    assert share_slots(stacks, 2, 32768) == {4096: 4, 8192: 2}
    whole = 16 * 4096 + 8 * 8192
    assert share_slots(stacks, 2, whole) == {4096: 16, 8192: 8}
    half = share_slots(stacks, 2, whole // 2)
    assert sum(stride * n for stride, n in half.items()) <= whole // 2


def test_same_choice_again_is_read_once() -> None:
    choices: Choices = (((0, 1),) * 8, ((2, 3),) * 8)
    assert replayed(choices, N_EXPERT, 0.5) == 0.0
    # Nothing is held: two of eight experts on every token.
    assert replayed(choices, N_EXPERT, 0.0) == pytest.approx(2 / 8)
    assert wanted_together(choices, N_EXPERT, 4) == pytest.approx(2 / 8)


def test_choices_that_never_come_back_are_all_read() -> None:
    rounds = tuple(((2 * i) % 8, (2 * i + 1) % 8) for i in range(16))
    assert replayed((rounds,), N_EXPERT, 0.25) == pytest.approx(2 / 8)
    assert wanted_together((rounds,), N_EXPERT, 4) == 1.0


def test_a_layer_that_hardly_any_token_reached_does_not_count() -> None:
    choices: Choices = (((0, 1),) * 32, ((6, 7),))
    assert replayed(choices, N_EXPERT, 0.5) == 0.0


def test_replay_drops_what_the_runtime_drops() -> None:
    n_layers, n_tokens, capacity = 3, 60, 12
    generator = np.random.default_rng(5)
    drawn = generator.permuted(np.tile(np.arange(N_EXPERT), (n_layers, n_tokens, 1)), axis=2)
    choices: Choices = tuple(tuple(tuple(map(int, t[:2])) for t in layer) for layer in drawn)
    scores, held, missed = Mixed(n_layers, N_EXPERT), set[tuple[int, int]](), 0
    for token in range(n_tokens):
        for layer in range(n_layers):
            wanted = {(layer, expert) for expert in choices[layer][token]}
            counts = np.bincount(choices[layer][token], minlength=N_EXPERT)
            scores.routed(layer, counts, 1)
            missing = wanted - held
            missed += len(missing) if token >= n_tokens // 4 else 0
            worth = scores.worth(layer)
            droppable = sorted(held - wanted, key=lambda key: float(worth[key]))
            held -= set(droppable[: max(0, len(held) + len(missing) - capacity)])
            held |= missing
    share = missed / ((n_tokens - n_tokens // 4) * n_layers * N_EXPERT)
    assert replayed(choices, N_EXPERT, capacity / (n_layers * N_EXPERT)) == pytest.approx(
        share, rel=0.05
    )


def test_assumed_law_is_right_at_its_ends() -> None:
    wanted, shares = np.array([0.5, 0.1]), np.array([0.25, 0.75])
    assert assumed(wanted, shares, 0.0) == pytest.approx(wanted @ shares)
    assert assumed(wanted, shares, 1.0) == 0.0
    between = [assumed(wanted, shares, held) for held in (0.1, 0.3, 0.6, 0.9)]
    assert between == sorted(between, reverse=True)
    # All alike: whatever is kept, the rest is read.
    assert assumed(np.array([0.25]), np.array([1.0]), 0.6) == pytest.approx(0.25 * 0.4)


def test_experts_are_read_once_their_router_has_chosen() -> None:
    # 1 s of attention, then two stacks of 100 bytes at 100 bytes/s: the second is read meanwhile.
    dense = PassItem("attention", 0, False, 1.0)
    gate, down = (PassItem(name, 100, True, 0.5, turn=0) for name in ("gate", "down"))
    passes = simulate_passes([dense, gate, down], 100.0, 0, n_passes=3)
    assert passes.steady_s == pytest.approx(1.0 + 2.0 + 0.5)
    late = PassItem("down", 100, True, 0.5, turn=0, ready_s=0.25)
    assert simulate_passes([dense, gate, late], 100.0, 0).steady_s == pytest.approx(3.75)


def test_everything_that_is_not_routed_is_repacked_where_it_all_stays() -> None:
    moe = workload("moe")
    weights = stage_weights(moe, 0, len(moe.run_layers), head=True)
    for room_mb in (150, 300, 600):
        found = cached_stage(weights, room_mb * MB, 128, repacks=True)
        assert (found.tiers.layout == "repacked") == (not found.tiers.streamed)
        assert cached_stage(weights, room_mb * MB, 128, repacks=False).tiers.layout == "file"


def test_plan_with_a_trace_reads_what_the_trace_leaves_and_no_longer_guesses() -> None:
    moe = workload("moe")
    experts = moe.run_layers[0].experts
    assert experts is not None
    n_expert, n_used = experts.n_expert, experts.n_used
    choices: Choices = tuple((tuple(range(n_used)),) * 64 for _ in moe.run_layers)
    shares = tuple(float(expert < n_used) for expert in range(n_expert))
    trace = Popularity("trace", 0.0, (shares,) * len(moe.run_layers), choices)
    topology, goal = alone(limited(BOARD, 1500 * MB)), Goal(n_prompt=64, n_ctx=512)
    assumed_plan, traced = (make_plan(moe, topology, goal, kind) for kind in (Popularity(), trace))
    assert traced.chosen.stages[0].forecast.read_bytes == 0
    assert traced.chosen.stages[0].forecast.found == 1.0
    assert traced.chosen.tpot_s < assumed_plan.chosen.tpot_s
    said = ["is assumed: texts" in " ".join(plan.warnings) for plan in (assumed_plan, traced)]
    assert said == [True, False]
