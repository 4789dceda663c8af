"""Which hosts share every layer: the fastest, or fewer where the goal or a ceiling wants that."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders_plan import BOARD, workload
from builders_tensor import GOAL, boards, powered, refused, shared, star
from devices.catalog import known_host
from partition.problem import Metric
from partition.tensor_sets import host_sets
from partition.tensor_shares import ShareBytes, ShareHost, ShareProblem


@pytest.mark.parametrize("metric", ["memory_bytes", "energy_j", "sent_bytes"])
def test_fewer_hosts_share_where_the_goal_is_not_speed(metric: Metric) -> None:
    topology = star([powered(known_host(BOARD, f"board{index}"), 9.0) for index in range(4)])
    fastest = shared("7b", topology)
    assert len(fastest.stages) == 4
    found = shared("7b", topology, replace(GOAL, minimise=metric))
    assert len(found.stages) < 4
    assert found.of(metric) < fastest.of(metric)


def test_frugal_host_shares_where_energy_is_the_goal() -> None:
    watts = {"home": 9.0, "hungry": 200.0, "frugal": 9.0}
    topology = star([powered(known_host(BOARD, name), watts[name]) for name in watts])
    found = shared("7b", topology, replace(GOAL, minimise="energy_j"))
    assert [stage.place.host.host_id for stage in found.stages] == ["home", "frugal"]


def test_ceiling_is_kept_with_fewer_hosts_where_the_fastest_break_it() -> None:
    four, two = shared("7b", boards(4)), shared("7b", boards(2))
    assert two.of("sent_bytes") < four.of("sent_bytes")
    ceilings: dict[Metric, float] = {"sent_bytes": two.of("sent_bytes")}
    found = shared("7b", boards(4), replace(GOAL, ceilings=ceilings))
    assert len(found.stages) == 2
    assert found.of("sent_bytes") <= ceilings["sent_bytes"]


def test_ceiling_that_no_shares_keep_says_what_was_tried() -> None:
    for ceilings in ({"sent_bytes": 1.0}, {"sent_bytes": 0.0, "tpot_s": 1e-6}):
        reason = refused(workload("1b"), boards(3), replace(GOAL, ceilings=ceilings))
        assert "sent_bytes is " in reason
        assert "only the fastest shares of 3 sets of hosts were tried" in reason


def test_of_many_hosts_a_bounded_number_of_sets_is_tried() -> None:
    ask = ShareHost("a", 1.0, 1.0, 1e9, (ShareBytes(1.0),) * 8)
    problem = ShareProblem((ask,) * 8, 8, 1.0, hub=0, least_hosts=2)
    for n_hosts, n_sets in ((2, 1), (5, 15), (6, 9), (8, 13)):
        sets = host_sets(replace(problem, hosts=problem.hosts[:n_hosts]))
        assert len(sets) == len({*sets}) == n_sets
        assert sets[-1] == tuple(range(n_hosts))
        assert all(found[0] == 0 and len(found) > 1 for found in sets)
