"""Tensor-parallel shares against trying every split."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import PlanError
from partition.tensor_shares import ShareHost, ShareProblem, Shares, choose_shares

NUMBERS = st.floats(0.1, 10).map(lambda value: round(value, 3))


@st.composite
def share_problems(draw: st.DrawFn) -> ShareProblem:
    hosts = tuple(
        ShareHost(
            name=f"h{index}",
            decode_s=draw(NUMBERS),
            prefill_s=draw(NUMBERS),
            capacity_bytes=draw(st.integers(0, 120)),
            flash_bytes_per_s=draw(st.none() | st.floats(1, 100)),
            window_bytes=draw(st.integers(0, 20)),
            n_sweeps=draw(st.integers(1, 3)),
            exchange_decode_s=draw(st.just(0.0) | NUMBERS),
        )
        for index in range(draw(st.integers(1, 4)))
    )
    sizes = st.integers(0, 20)
    return ShareProblem(hosts, draw(st.integers(1, 6)), draw(sizes), draw(sizes), draw(sizes))


def seconds(problem: ShareProblem, counts: tuple[int, ...]) -> float:
    """TPOT of given shares, infinite where they do not fit."""
    slowest, exchange = 0.0, 0.0
    for host, n_groups in zip(problem.hosts, counts, strict=True):
        if n_groups == 0:
            continue
        needed = problem.whole_bytes + n_groups * problem.group_weight_bytes
        kv_bytes = n_groups * problem.group_kv_bytes
        stream_s = 0.0
        if needed + kv_bytes > host.capacity_bytes:
            pinned = host.capacity_bytes - kv_bytes - host.window_bytes
            if pinned < 0 or host.flash_bytes_per_s is None:
                return float("inf")
            stream_s = max(0.0, needed - pinned) / host.flash_bytes_per_s
        slowest = max(slowest, host.decode_s * n_groups / problem.n_groups, stream_s)
        if sum(map(bool, counts)) > 1:
            exchange = max(exchange, host.exchange_decode_s)
    return slowest + exchange


@settings(deadline=None, max_examples=300)
@given(share_problems())
def test_shares_equal_brute_force(problem: ShareProblem) -> None:
    best = min(
        seconds(problem, counts)
        for counts in product(range(problem.n_groups + 1), repeat=len(problem.hosts))
        if sum(counts) == problem.n_groups
    )
    found: Shares | None
    try:
        found = choose_shares(problem)
    except PlanError:
        found = None
    assert (found is None) == (best == float("inf"))
    if found is not None:
        assert found.tpot_s == pytest.approx(best, rel=1e-9)
        assert sum(share.n_groups for share in found.hosts) == problem.n_groups
        assert all(share.n_groups >= 1 for share in found.hosts)


def test_shares_follow_speed() -> None:
    hosts = (ShareHost("fast", 1.0, 1.0, 100), ShareHost("slow", 3.0, 3.0, 100))
    found = choose_shares(ShareProblem(hosts, 8, 1, 1, 4))
    # 6/8 of 1 s beside 2/8 of 3 s.
    assert [share.n_groups for share in found.hosts] == [6, 2]
    assert found.tpot_s == 0.75


def test_host_that_costs_more_than_it_saves_is_left_out() -> None:
    hosts = (ShareHost("hub", 1.0, 1.0, 100), ShareHost("far", 1.0, 1.0, 100, exchange_decode_s=1))
    found = choose_shares(ShareProblem(hosts, 8, 1, 1, 4))
    assert [(share.host, share.n_groups) for share in found.hosts] == [(0, 8)]
    assert found.tpot_s == 1.0


def test_second_host_saves_streaming() -> None:
    # Alone: 20 + 4 bytes in 14, 10 streamed at 5 bytes/s. Together everything is pinned.
    hosts = (
        ShareHost("hub", 1.0, 1.0, 14, flash_bytes_per_s=5.0),
        ShareHost("far", 1.0, 1.0, 14, exchange_decode_s=0.25, exchange_prefill_s=0.5),
    )
    found = choose_shares(ShareProblem(hosts, 10, 2, 0, 4))
    assert [(share.n_groups, share.pinned_bytes) for share in found.hosts] == [(5, 14), (5, 14)]
    assert (found.tpot_s, found.ttft_s) == (0.75, 1.0)


def test_error_says_what_each_host_holds() -> None:
    hosts = (ShareHost("small", 1, 1, 5), ShareHost("large", 1, 1, 10))
    with pytest.raises(PlanError) as caught:
        choose_shares(ShareProblem(hosts, 8, 2, 1, 1))
    assert caught.value.message.splitlines()[1:] == [
        "large: holds 3 of 8 groups, has 10 bytes; all need 25, and it cannot stream",
        "small: holds 1 of 8 groups, has 5 bytes; all need 25, and it cannot stream",
    ]


def test_too_many_hosts_are_a_value_error() -> None:
    host = ShareHost("h", 1, 1, 100)
    with pytest.raises(ValueError, match="1 to 8 hosts"):
        choose_shares(ShareProblem((host,) * 9, 8, 1, 1, 1))
