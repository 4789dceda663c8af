"""The ring and the residency decision: nothing overlaps, nothing is lost, no budget is exceeded."""

from collections import deque
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import CapacityError
from edgert.weights.ring import Ring
from partition.residency import Item, choose_residency


@given(st.integers(10, 200), st.lists(st.integers(1, 60), min_size=1, max_size=80))
def test_pieces_never_overlap_and_an_empty_ring_takes_any(capacity: int, sizes: list[int]) -> None:
    ring = Ring(capacity)
    live: deque[tuple[int, int]] = deque()
    for size in (min(size, capacity) for size in sizes):
        place = ring.take(size)
        while place is None:
            assert live
            live.popleft()
            ring.give_back()
            place = ring.take(size)
        assert 0 <= place <= capacity - size
        assert all(place + size <= start or end <= place for start, end in live)
        live.append((place, place + size))
    assert len(ring) == len(live)


def test_a_piece_larger_than_the_ring_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="11 bytes in a ring of 10"):
        Ring(10).take(11)


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Item], int]:
    sizes = draw(st.lists(st.integers(1, 10_000), min_size=1, max_size=40))
    items = [
        Item(f"w{index}", size, draw(st.booleans()) and index % 7 == 0)
        for index, size in enumerate(sizes)
    ]
    return items, draw(st.integers(1, 2 * sum(sizes)))


@given(problems())
def test_residency_keeps_the_budget_and_places_every_weight_once(
    problem: tuple[list[Item], int],
) -> None:
    items, available = problem
    try:
        residency = choose_residency(items, available)
    except CapacityError as error:
        needed = error.needed_bytes or 0
        residency = choose_residency(items, needed)
        available = max(available + 1, needed)
    names = [item.name for item in items]
    assert sorted([*residency.pinned, *residency.streamed]) == sorted(names)
    assert [name for name in names if name not in residency.pinned] == list(residency.streamed)
    assert residency.pinned_bytes + residency.ring_bytes <= available
    assert all(item.name in residency.pinned for item in items if item.must_pin)
    largest = max((i.size_bytes for i in items if i.name in residency.streamed), default=0)
    assert residency.ring_bytes >= largest


def test_streamed_weights_are_spread_over_the_pass() -> None:
    items = [Item(f"w{index}", 1000) for index in range(100)]
    residency = choose_residency(items, 55_000)
    places = [int(name[1:]) for name in residency.streamed]
    gaps = [second - first for first, second in pairwise(places)]
    assert max(gaps) <= 4


def test_pinning_a_small_neighbour_does_not_push_the_window_over_the_budget() -> None:
    items = [Item(f"w{index}", size) for index, size in enumerate((325, 1, 51, 1))]
    residency = choose_residency(items, 373)
    assert residency.pinned_bytes + residency.ring_bytes <= 373
