"""Stages of shares: equal hosts are cut once, and come out as if each had been cut by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders_plan import BOARD, MB, PI, limited, workload
from builders_tensor import GOAL, star
from devices.catalog import known_host
from partition.manifest import TensorShare
from partition.popularity import Popularity
from partition.problem import Metric
from partition.settings import language_goal_of, settings
from partition.tensor_candidates import tensor_candidates
from partition.tensor_problem import Ask, share_places
from partition.tensor_split import Part, part_widths, split_workload, unlike_shares
from partition.tensor_stages import StageCuts
from partition.units import language_units

HOSTS = [limited(BOARD, 1200 * MB, f"board{index}") for index in range(3)] + [known_host(PI)]


@pytest.fixture
def ask() -> Ask:
    (setting,) = settings(GOAL)
    return Ask(workload("7b"), star(HOSTS), GOAL, setting, Popularity(), by_rows=True)


def test_stage_of_an_equal_host_is_that_of_its_own(ask: Ask) -> None:
    places, cuts = share_places(ask, ask.chain(ask.workload)), StageCuts()
    for index, place in enumerate(places):
        share = TensorShare(first_group=8 * index, end_group=8 * index + 8, n_groups=32)
        assert cuts.stage(ask, place, share) == StageCuts().stage(ask, place, share)
    kinds = [cuts.kind_of(place.host) for place in places]
    assert kinds == [0, 0, 0, 1]


@pytest.mark.parametrize("shape", ["1b", "7b"])
def test_parts_of_equal_widths_are_equal(shape: str) -> None:
    model = workload(shape)
    found: dict[tuple[int, ...], object] = {}
    for share in unlike_shares(model):
        for by in range(share.n_groups - share.end_group + 1):
            moved = share.model_copy(
                update={"first_group": share.first_group + by, "end_group": share.end_group + by}
            )
            if by not in (0, 1, 7):
                continue
            part = Part(moved, entrance=False, head="rows")
            thin = split_workload(model, part)
            assert found.setdefault(part_widths(model, part), thin) == thin


def test_chain_of_shared_units_costs_what_each_layer_does(ask: Ask) -> None:
    other = replace(ask.workload.layers[5], tensors=ask.workload.layers[5].tensors[:-1])
    layers = (*ask.workload.layers[:5], other, *ask.workload.layers[6:])
    model = replace(ask.workload, layers=layers)
    asked = language_goal_of(ask.goal, ask.setting)
    plain, found = language_units(model, asked, Popularity()), ask.chain(model)
    assert (plain.reads, plain.activation_bytes) == (found.reads, found.activation_bytes)
    assert len({id(unit) for unit in found.units}) == 4
    for one, unit in zip(plain.units, found.units, strict=True):
        assert replace(unit, index=one.index, name=one.name, layer=one.layer) == one


@pytest.mark.parametrize("metric", ["tpot_s", "ttft_s", "memory_bytes", "sent_bytes"])
def test_hosts_in_another_order_share_alike(metric: Metric) -> None:
    goal = replace(GOAL, minimise=metric)
    model = workload("1b")
    found, _ = tensor_candidates(model, star(HOSTS), goal, Popularity())
    turned, _ = tensor_candidates(model, star([HOSTS[0], *HOSTS[:0:-1]]), goal, Popularity())
    assert [one.of(goal.minimise) for one in found] == [one.of(goal.minimise) for one in turned]
