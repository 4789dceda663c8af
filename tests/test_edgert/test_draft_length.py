"""The length controller, with made-up pass times."""

from __future__ import annotations

import itertools

from edgert.draft_length import DraftLength, PassCost


def settle(length: DraftLength, seconds_of: dict[str, float], n_rounds: int, rate: float) -> int:
    """Run rounds in which `rate` of a draft (rounded down) stands; return the last choice."""
    chosen = 0
    for _ in range(n_rounds):
        chosen = length.choose(0, 100)
        length.cost.observe(1 + chosen, seconds_of["base"] + seconds_of["per_token"] * chosen)
        if chosen:
            length.observe(0, chosen, int(chosen * rate))
    return chosen


def test_first_pass_is_plain_so_that_there_is_something_to_compare_with() -> None:
    assert DraftLength(16).choose(0, 100) == 0


def test_long_drafts_where_more_tokens_cost_nothing() -> None:
    length = DraftLength(16)
    assert settle(length, {"base": 3.0, "per_token": 0.0}, 40, rate=1.0) == 16


def test_a_streaming_pass_that_hardly_grows_keeps_drafting_at_half_acceptance() -> None:
    length = DraftLength(16)
    settle(length, {"base": 3.0, "per_token": 0.01}, 60, rate=0.5)
    assert length.choose(0, 100) >= 4


def test_drafting_stops_where_each_token_costs_a_pass() -> None:
    length = DraftLength(16)
    settle(length, {"base": 0.1, "per_token": 0.1}, 60, rate=0.3)
    chosen = [length.choose(0, 100) for _ in range(7)]
    assert chosen.count(0) >= 6


def test_drafting_stops_when_drafts_are_wrong_and_is_probed_ever_less() -> None:
    length = DraftLength(16)
    probes = []
    for index in range(400):
        chosen = length.choose(0, 100)
        length.cost.observe(1 + chosen, 1.0 + 0.05 * chosen)
        if chosen:
            length.observe(0, chosen, 0)
            probes.append(index)
    late = [index for index in probes if index > 40]
    gaps = [b - a for a, b in itertools.pairwise(late)]
    assert late, "never probed again"
    assert gaps == sorted(gaps)
    assert len(probes) < 60


def test_drafting_resumes_when_drafts_become_right() -> None:
    length = DraftLength(16)
    settle(length, {"base": 1.0, "per_token": 0.05}, 100, rate=0.0)
    settle(length, {"base": 1.0, "per_token": 0.05}, 400, rate=1.0)
    assert max(length.choose(0, 100) for _ in range(2)) >= 8


def test_classes_have_their_own_rates() -> None:
    length = DraftLength(16)
    length.cost.observe(1, 1.0)
    length.cost.observe(17, 1.8)
    for _ in range(20):
        length.observe(1, 4, 0)
        length.observe(16, 4, 4)
    assert length.choose(1, 100) == 0
    assert length.choose(16, 100) >= 8


def test_room_and_longest_are_never_exceeded() -> None:
    length = DraftLength(5)
    length.cost.observe(1, 1.0)
    assert length.choose(0, 100) == 5
    assert length.choose(0, 3) == 3
    assert length.choose(0, 0) == 0
    assert length.choose(0, -1) == 0


def test_slow_drafter_is_counted() -> None:
    length = DraftLength(16)
    length.cost.observe(1, 1.0)
    for _ in range(30):
        length.observe_drafting(4, 8.0)
    assert length.choose(0, 100) == 0


def test_pass_cost_interpolates_and_never_falls() -> None:
    cost = PassCost()
    assert cost.seconds(3) == 1.0
    cost.observe(1, 2.0)
    assert cost.seconds(9) == 2.0  # flat while nothing else is known
    cost.observe(5, 4.0)
    assert cost.seconds(3) == 3.0
    assert cost.seconds(7) == 5.0
    cost.observe(7, 1.0)
    assert cost.seconds(7) == 4.0
