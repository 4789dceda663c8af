"""Slots and scores: what is held stays, no slot is given twice, the least worth goes first."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import CapacityError
from edgert.experts.scores import POLICIES, Mixed, Scores, make_scores
from edgert.experts.slots import SlotPool

N_TURNS, N_EXPERTS = 3, 6

steps = st.lists(
    st.tuples(st.integers(0, N_TURNS - 1), st.sets(st.integers(0, N_EXPERTS - 1), min_size=1)),
    max_size=30,
)


@given(n_slots=st.integers(1, 12), wanted=steps, policy=st.sampled_from(POLICIES))
def test_pool_never_drops_what_is_held_and_gives_no_slot_twice(
    n_slots: int, wanted: list[tuple[int, set[int]]], policy: str
) -> None:
    pool, table = SlotPool(n_slots), {}
    scores = make_scores(policy, N_TURNS, N_EXPERTS)  # type: ignore[arg-type]
    for turn, experts in wanted:
        keys = [(turn, expert) for expert in sorted(experts)][:n_slots]
        counts = np.bincount([expert for _, expert in keys], minlength=N_EXPERTS)
        scores.routed(turn, counts, 1)
        there = [key for key in keys if key in table]
        for key in there:
            pool.hold(table[key])
        missing = [key for key in keys if key not in table]
        dropped = pool.make_room(len(missing), scores.worth(turn))
        assert not set(dropped) & set(there)
        for key in dropped:
            del table[key]
        for key in missing:
            table[key] = pool.take(key[0], key[0], key[1])
        assert set(keys) <= set(table)
        assert len(set(table.values())) == len(table) == pool.n_taken <= n_slots
        assert all(0 <= slot < n_slots for slot in table.values())
        pool.release(table[key] for key in keys)


def test_pool_refuses_when_everything_is_held() -> None:
    pool = SlotPool(2)
    slots = [pool.take(0, 0, expert) for expert in range(2)]
    worth = np.zeros((1, N_EXPERTS), np.float32)
    assert pool.n_available() == 0
    with pytest.raises(CapacityError, match="2 experts are needed at once, 0 of 2"):
        pool.make_room(2, worth)
    with pytest.raises(CapacityError):
        pool.make_room(3, worth)
    pool.release(slots)
    assert sorted(pool.make_room(2, worth)) == [(0, 0), (0, 1)]


def test_pool_drops_the_least_worth_first() -> None:
    pool = SlotPool(4)
    pool.release([pool.take(0, 0, expert) for expert in range(4)])
    worth = np.array([[3.0, 1.0, 2.0, 4.0]], np.float32)
    assert pool.make_room(1, worth) == [(0, 1)]
    assert pool.make_room(2, worth) == [(0, 2)]
    assert pool.make_room(2, worth) == []


def test_given_back_slot_is_empty_and_stays_until_it_is_taken() -> None:
    pool = SlotPool(1)
    slot = pool.take(0, 0, 3)
    pool.give_back(slot)
    assert (pool.n_taken, pool.n_available()) == (0, 1)
    assert pool.make_room(1, np.zeros((1, N_EXPERTS), np.float32)) == []
    assert pool.take(1, 0, 2) == slot


def order(scores: Scores, turn: int) -> list[int]:
    """Experts of a turn, the first to go first."""
    return [int(expert) for expert in np.argsort(scores.worth(turn)[turn], kind="stable")]


def chosen(*experts: int) -> np.ndarray:
    return np.bincount(experts, minlength=3)


def test_recency_forgets_who_was_not_wanted_for_longest() -> None:
    scores = make_scores("recency", 1, 3)
    for experts in ((0,), (1,), (2,), (0,)):
        scores.routed(0, chosen(*experts), 1)
    assert order(scores, 0) == [1, 2, 0]


def test_frequency_forgets_who_was_wanted_least() -> None:
    scores = make_scores("frequency", 1, 3)
    for experts in ((0, 1), (1,), (0, 2), (0,), (0,)):
        scores.routed(0, chosen(*experts), 1)
    assert order(scores, 0) == [2, 1, 0]


def test_mixed_waits_one_over_the_share_and_the_layers_between() -> None:
    scores = Mixed(4, 2, half_life=1.0)
    for turn, _ in itertools.product(range(4), range(20)):
        scores.routed(turn, np.array([1, 0]), 1)
    worth = scores.worth(1)[:, 0]
    # Wanted by every token: the next layer comes first, this one only a token later.
    assert [int(turn) for turn in np.argsort(-worth)] == [2, 3, 0, 1]
    assert worth[2] == pytest.approx(0.0, abs=1e-4)
    assert worth[1] == pytest.approx(-0.75, abs=1e-4)


def test_mixed_counts_a_batch_as_its_tokens() -> None:
    single, batch = Mixed(1, 2), Mixed(1, 2)
    for _ in range(8):
        single.routed(0, np.array([1, 0]), 1)
    batch.routed(0, np.array([8, 0]), 8)
    assert np.allclose(single.worth(0), batch.worth(0), rtol=1e-5)


def test_mixed_still_tells_apart_who_was_not_wanted_for_long() -> None:
    scores = make_scores("mixed", 1, 3)
    scores.routed(0, np.array([1, 0, 0]), 1)
    scores.routed(0, np.array([0, 1, 0]), 1)
    for _ in range(400):
        scores.routed(0, np.array([0, 0, 1]), 1)
    assert order(scores, 0) == [0, 1, 2]


def test_unknown_policy_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="recency, frequency, mixed, steady"):
        make_scores("oldest", 1, 1)  # type: ignore[arg-type]
