"""Tensor-parallel shares against trying every split."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import PlanError
from partition.tensor_shares import ShareBytes, ShareHost, ShareProblem, Shares, choose_shares

NUMBERS = st.floats(0.1, 10).map(lambda value: round(value, 3))


def sizes(
    n_groups: int, group: float, whole: float, floor: float = 0, window: float = 0
) -> tuple[ShareBytes, ...]:
    """Weights that grow by `group` with every group; `floor` and `window` do so too."""
    return tuple(
        ShareBytes(whole + n * group, min(n * floor, whole + n * group), n * window)
        for n in range(1, n_groups + 1)
    )


@st.composite
def share_problems(draw: st.DrawFn) -> ShareProblem:
    n_groups, few = draw(st.integers(1, 6)), st.integers(0, 20)
    hosts = tuple(
        ShareHost(
            name=f"h{index}",
            decode_s=draw(NUMBERS),
            prefill_s=draw(NUMBERS),
            capacity_bytes=draw(st.integers(0, 120)),
            sizes=sizes(n_groups, *(draw(few) for _ in range(4))),
            flash_bytes_per_s=draw(st.none() | st.floats(1, 100)),
            n_sweeps=draw(st.integers(1, 3)),
            exchange_decode_s=draw(st.just(0.0) | NUMBERS),
        )
        for index in range(draw(st.integers(1, 4)))
    )
    return ShareProblem(hosts, n_groups, draw(few))


def seconds(problem: ShareProblem, counts: tuple[int, ...]) -> float:
    """TPOT of given shares, infinite where they do not fit."""
    slowest, exchange = 0.0, 0.0
    for host, n_groups in zip(problem.hosts, counts, strict=True):
        if n_groups == 0:
            continue
        size = host.sizes[n_groups - 1]
        needed = size.weight_bytes
        kv_bytes = n_groups * problem.group_kv_bytes
        stream_s = 0.0
        if needed + kv_bytes > host.capacity_bytes:
            pinned = host.capacity_bytes - kv_bytes - size.window_bytes
            if pinned < size.floor_bytes or host.flash_bytes_per_s is None:
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
    of = sizes(8, group=1, whole=4)
    hosts = (ShareHost("fast", 1.0, 1.0, 100, of), ShareHost("slow", 3.0, 3.0, 100, of))
    found = choose_shares(ShareProblem(hosts, 8, 1))
    # 6/8 of 1 s beside 2/8 of 3 s.
    assert [share.n_groups for share in found.hosts] == [6, 2]
    assert found.tpot_s == 0.75


def test_host_that_costs_more_than_it_saves_is_left_out() -> None:
    hub = ShareHost("hub", 1.0, 1.0, 100, sizes(8, group=1, whole=4))
    far = replace(hub, name="far", exchange_decode_s=1)
    found = choose_shares(ShareProblem((hub, far), 8, 1))
    assert [(share.host, share.n_groups) for share in found.hosts] == [(0, 8)]
    assert found.tpot_s == 1.0


def test_second_host_saves_streaming() -> None:
    # Alone: 20 + 4 bytes in 14, 10 streamed at 5 bytes/s. Together everything is pinned.
    of = sizes(10, group=2, whole=4)
    hosts = (
        ShareHost("hub", 1.0, 1.0, 14, of, flash_bytes_per_s=5.0),
        ShareHost("far", 1.0, 1.0, 14, of, exchange_decode_s=0.25, exchange_prefill_s=0.5),
    )
    found = choose_shares(ShareProblem(hosts, 10, 0))
    assert [(share.n_groups, share.pinned_bytes) for share in found.hosts] == [(5, 14), (5, 14)]
    assert (found.tpot_s, found.ttft_s) == (0.75, 1.0)


def test_error_says_what_each_host_holds() -> None:
    of = sizes(8, group=2, whole=1)
    hosts = (ShareHost("small", 1, 1, 5, of), ShareHost("large", 1, 1, 10, of))
    with pytest.raises(PlanError) as caught:
        choose_shares(ShareProblem(hosts, 8, 1))
    assert caught.value.message.splitlines()[1:] == [
        "large: holds 3 of 8 groups, has 10 bytes; all need 25, and it cannot stream",
        "small: holds 1 of 8 groups, has 5 bytes; all need 25, and it cannot stream",
    ]


def test_too_many_hosts_are_a_value_error() -> None:
    host = ShareHost("h", 1, 1, 100, sizes(8, group=1, whole=1))
    with pytest.raises(ValueError, match="1 to 8 hosts"):
        choose_shares(ShareProblem((host,) * 9, 8, 1))


def test_sizes_of_other_numbers_of_groups_are_a_value_error() -> None:
    host = ShareHost("h", 1, 1, 100, sizes(7, group=1, whole=1))
    with pytest.raises(ValueError, match="sizes of 1 to 8 groups"):
        choose_shares(ShareProblem((host,), 8, 1))


def test_what_must_stay_needs_room_beside_the_window() -> None:
    # 8 + 4 bytes in 11; 5 of them stay and 6 is the window: 11 suffices, 10 does not.
    size = (ShareBytes(12, floor_bytes=5, window_bytes=6),)
    host = ShareHost("h", 1, 1, 11, size, flash_bytes_per_s=1.0)
    (share,) = choose_shares(ShareProblem((host,), 1, 0)).hosts
    assert (share.pinned_bytes, share.decode_s) == (5, 7)
    with pytest.raises(PlanError):
        choose_shares(ShareProblem((replace(host, capacity_bytes=10),), 1, 0))
