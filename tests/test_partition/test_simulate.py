"""Passes over weights, event by event, against times worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partition.simulate import PassItem, simulate_passes

RATE = 100.0  # bytes a second


def item(name: str, size: int, streamed: bool, compute_s: float) -> PassItem:
    return PassItem(name, size, streamed, compute_s)


def test_pinned_weights_take_their_computation() -> None:
    passes = simulate_passes([item("a", 50, False, 1.0), item("b", 50, False, 2.0)], None, 0)
    assert passes.steady_s == pytest.approx(3.0)
    assert passes.stall_s == 0


def test_flash_bound_pass_takes_its_reads() -> None:
    # Two weights of 100 bytes at 100 bytes/s are 2 s of reading; computing 0.5 s hides in them.
    items = [item("a", 100, True, 0.25), item("b", 100, True, 0.25)]
    passes = simulate_passes(items, RATE, window_bytes=200, n_passes=4)
    assert passes.steady_s == pytest.approx(2.0)


def test_reads_hide_behind_pinned_computation_as_far_as_the_window_reaches() -> None:
    # 1 s of reading, 3 s of computing: the window holds the weight, nothing waits.
    items = [item("a", 100, True, 1.0), item("b", 100, False, 2.0)]
    passes = simulate_passes(items, RATE, window_bytes=200, n_passes=4)
    assert passes.steady_s == pytest.approx(3.0)


def test_a_window_of_one_weight_cannot_read_ahead() -> None:
    # Each weight: read 1 s, then compute 1 s, and only then is its place free again.
    items = [item("a", 100, True, 1.0), item("b", 100, True, 1.0)]
    tight = simulate_passes(items, RATE, window_bytes=100, n_passes=4)
    assert tight.steady_s == pytest.approx(4.0)
    roomy = simulate_passes(items, RATE, window_bytes=200, n_passes=4)
    assert roomy.steady_s == pytest.approx(2.0)


def test_what_cannot_stream_is_a_value_error() -> None:
    with pytest.raises(ValueError, match="no flash rate"):
        simulate_passes([item("a", 1, True, 0.0)], None, 10)
    with pytest.raises(ValueError, match="larger than the window"):
        simulate_passes([item("a", 11, True, 0.0)], RATE, 10)


items_of = st.lists(
    st.builds(
        item, st.just("w"), st.integers(1, 100), st.booleans(), st.floats(0, 2, allow_nan=False)
    ),
    min_size=1, max_size=12,
)  # fmt: skip


@given(items_of, st.integers(100, 400))
def test_a_pass_is_never_faster_than_computing_or_reading_alone(
    items: list[PassItem], window: int
) -> None:
    passes = simulate_passes(items, RATE, window, n_passes=3)
    compute_s = sum(one.compute_s for one in items)
    read_s = sum(one.size_bytes for one in items if one.streamed) / RATE
    assert passes.ends_s[-1] >= 3 * compute_s - 1e-9
    assert passes.ends_s[-1] >= 3 * read_s - 1e-9 or not any(one.streamed for one in items)
    assert passes.ends_s[-1] <= 3 * (compute_s + read_s) + 1e-9


@given(items_of, st.integers(100, 400))
def test_spans_of_a_lane_follow_each_other(items: list[PassItem], window: int) -> None:
    passes = simulate_passes(items, RATE, window)
    for lane in ("compute", "flash"):
        spans = [span for span in passes.spans if span.lane == lane]
        for one, other in pairwise(spans):
            assert other.start_s >= one.end_s - 1e-9
