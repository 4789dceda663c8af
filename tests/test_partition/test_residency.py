"""What stays and what streams: everything that can work does, and refusals say the right number."""

from __future__ import annotations

import re
from fractions import Fraction
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import CapacityError
from partition import residency
from partition.language_workload import TensorWork
from partition.residency import Item, choose_residency, least_window, safe_window
from partition.stage_tiers import StageWeights, choose_tiers, page_bytes

SIZES = st.lists(
    st.integers(1, 40).map(lambda n: n * 100_000) | st.integers(40, 900).map(lambda n: n * 100_000),
    min_size=3,
    max_size=14,
)


def stage_of(sizes: list[int], n_vectors: int) -> StageWeights:
    """Weights of which the last `n_vectors` cannot stream."""
    tensors = []
    for index, size in enumerate(sizes):
        stays = index >= len(sizes) - n_vectors
        name = f"blk.{index}.ffn_{'norm' if stays else 'up'}.weight"
        shape = (8,) if stays else (8, 8)
        tensors.append(
            TensorWork(name, "f16", shape, size, "feed_forward", "every_token", Fraction(1))
        )
    return StageWeights(tuple(tensors), ())


@given(SIZES, st.integers(0, 2), st.floats(0, 1))
def test_tiers_exist_exactly_where_what_must_stay_and_a_window_fit(
    sizes: list[int], n_vectors: int, part: float
) -> None:
    pages = [page_bytes(size) for size in sizes]
    free, stay = pages[: len(pages) - n_vectors], pages[len(pages) - n_vectors :]
    least = sum(stay) + safe_window(free)
    available = int(least + part * (sum(pages) - least))
    weights = stage_of(sizes, n_vectors)
    tiers, residency = choose_tiers(weights, available)
    assert residency.pinned_bytes + tiers.window_bytes <= available
    streamed = [page_bytes(t.size_bytes) for t in weights.whole if t.name in tiers.streamed]
    assert tiers.window_bytes >= min(safe_window(streamed), sum(streamed))
    with pytest.raises(CapacityError) as caught:
        choose_tiers(weights, least - 1)
    assert caught.value.needed_bytes == least
    assert re.search(rf"at least {least:,} bytes", caught.value.message)


@given(SIZES, st.floats(0, 1), st.data())
def test_runtime_streams_exactly_where_what_must_stay_and_a_window_fit(
    sizes: list[int], part: float, data: st.DataObject
) -> None:
    must = [data.draw(st.integers(0, 3)) == 0 for _ in sizes]
    items = [Item(str(i), sizes[i], must_pin=must[i]) for i in range(len(sizes))]
    free = [item.size_bytes for item in items if not item.must_pin]
    least = sum(item.size_bytes for item in items if item.must_pin) + least_window(free)
    available = int(least + part * (sum(sizes) - least))
    residency = choose_residency(items, available)
    assert residency.pinned_bytes + residency.ring_bytes <= available
    with pytest.raises(CapacityError) as caught:
        choose_residency(items, least - 1)
    assert caught.value.needed_bytes == least


@given(SIZES, st.floats(0.3, 1.05), st.booleans(), st.randoms(use_true_random=False))
def test_pinning_one_after_another_counts_as_pinning_them_at_once(
    sizes: list[int], share: float, any_order: bool, random: Random
) -> None:
    items = tuple(Item(str(index), size) for index, size in enumerate(sizes))
    budget = residency._Budget(items, int(share * sum(sizes)), 50_000, any_order)
    window, pinned = residency._Window(budget, set()), set[str]()
    for index in random.sample(range(len(items)), len(items)):
        more = pinned | {items[index].name}
        assert window.pin(index) == budget.fits(more)
        pinned = more if budget.fits(more) else pinned
