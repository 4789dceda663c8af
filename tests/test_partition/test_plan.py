"""Whole plans on small models and known devices: what they promise, refuse and explain."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders_plan import BOARD, MB, PI, alone, identity, limited, workload
from devices.catalog import known_host, names, usual_link
from devices.profile import HostProfile
from devices.topology import Topology
from edgert.errors import ConfigError, PlanError
from partition.bind import bind
from partition.goal import ALL_ABILITIES, Goal, Stay
from partition.language_workload import LanguageWorkload
from partition.manifest import Ability
from partition.manifest_file import canonical_json, parse_manifest
from partition.plan import Plan, frontier, make_plan
from partition.popularity import Popularity
from partition.problem import METRICS
from partition.stage_tiers import can_stream, stage_weights


def pair(one: HostProfile, other: HostProfile) -> Topology:
    links = tuple(
        usual_link("ethernet_1g", a.host_id, b.host_id) for a, b in ((one, other), (other, one))
    )
    return Topology(home=one.host_id, hosts=(one, other), links=links)


def plan_for(shape: str, topology: Topology, **changes: object) -> Plan:
    goal = replace(Goal(n_prompt=64, n_ctx=512), **changes)  # type: ignore[arg-type]
    return make_plan(workload(shape), topology, goal)


def planned(model: LanguageWorkload, topology: Topology, goal: Goal) -> Plan | PlanError:
    try:
        return make_plan(model, topology, goal)
    except PlanError as error:
        return error


@pytest.mark.parametrize("limit_mb", [600, 1000, 2000, 3000, 4300])
def test_plan_never_exceeds_the_memory_it_was_given(limit_mb: int) -> None:
    plan = plan_for("7b", alone(limited(PI, limit_mb * MB)))
    assert plan.chosen.peak_bytes <= limit_mb * MB
    (stage,) = plan.chosen.stages
    assert stage.peak_bytes == plan.chosen.peak_bytes


def test_more_memory_never_makes_a_plan_slower() -> None:
    limits = [600, 1000, 2000, 3000, 4300, 6000]
    seconds = [plan_for("7b", alone(limited(PI, mb * MB))).chosen.tpot_s for mb in limits]
    assert seconds == sorted(seconds, reverse=True)


def test_every_tensor_of_the_model_has_exactly_one_place() -> None:
    for limit_mb in (1000, 3000, 6000):
        plan = plan_for("7b", alone(limited(PI, limit_mb * MB)))
        tiers = plan.chosen.stages[0].tiers
        placed = [*tiers.pinned, *tiers.streamed, *tiers.looked_up, *tiers.cached]
        every = [
            tensor.name
            for part in (workload("7b").entrance, *workload("7b").layers, workload("7b").head)
            for tensor in part.tensors
        ]
        assert sorted(placed) == sorted(every)


def test_a_model_that_fits_is_resident_and_repacked() -> None:
    plan = plan_for("1b", alone(known_host(PI)))
    assert plan.chosen.stages[0].tiers.layout == "repacked"
    assert plan.binds.startswith("computing on")


def test_streaming_is_predicted_as_bytes_over_the_flash_rate() -> None:
    host = limited(PI, 1500 * MB)
    assert host.flash is not None
    plan = plan_for("7b", alone(host))
    read = plan.chosen.stages[0].forecast.read_bytes
    assert plan.chosen.tpot_s == pytest.approx(read / host.flash.streaming.value, rel=0.02)
    assert "flash of" in plan.binds


def test_impossible_memory_names_the_limit_in_bytes() -> None:
    with pytest.raises(PlanError) as caught:
        plan_for("7b", alone(limited(PI, 200 * MB)))
    assert "200,000,000" in caught.value.message
    assert caught.value.hint is not None


def test_ceiling_that_nothing_meets_names_metric_and_value() -> None:
    with pytest.raises(PlanError, match="tpot_s"):
        plan_for("7b", alone(limited(PI, 1500 * MB)), ceilings={"tpot_s": 1e-4})


def test_lossy_cache_is_used_only_where_it_is_allowed_and_needed() -> None:
    tight = limited(PI, 2300 * MB)
    with pytest.raises(PlanError):
        plan_for("7b", alone(tight), n_ctx=4096)
    allowed = plan_for("7b", alone(tight), n_ctx=4096, cache_types=("f16", "q8_0", "q4_0"))
    assert allowed.chosen.setting.cache_type == "q8_0"
    assert any("lossy" in warning for warning in allowed.warnings)
    roomy = plan_for("1b", alone(known_host(PI)), cache_types=("f16", "q4_0"))
    assert roomy.chosen.setting.cache_type == "f16"


def test_layers_stay_where_they_must() -> None:
    topology = pair(known_host(PI), known_host(BOARD))
    stays = (Stay(0, 20, topology.home),)
    plan = plan_for(
        "7b", topology, abilities=ALL_ABILITIES, may_leave=("hidden_states",), stays=stays
    )
    first = plan.chosen.stages[0]
    assert first.place.host.host_id == topology.home
    assert first.end_layer >= 20


def test_one_layer_on_two_hosts_is_a_contradiction() -> None:
    with pytest.raises(ConfigError, match=r"\$\.goal\.stays: layer 3"):
        Goal(stays=(Stay(0, 4, "a"), Stay(3, 8, "b"))).checked()


def test_logits_and_ids_stay_at_home_unless_they_may_leave() -> None:
    topology = pair(limited(PI, 1500 * MB), known_host(BOARD))
    plan = plan_for("7b", topology, abilities=ALL_ABILITIES, may_leave=("hidden_states",))
    first = plan.chosen.stages[0]
    assert (first.place.host.host_id, first.first_layer, first.head) == (topology.home, 0, True)
    free = plan_for(
        "7b", topology, abilities=ALL_ABILITIES, may_leave=("input", "hidden_states", "logits")
    )
    assert free.chosen.tpot_s <= plan.chosen.tpot_s


def test_a_slow_host_is_left_out_with_the_reason() -> None:
    topology = pair(known_host(BOARD), known_host(PI))
    plan = plan_for("1b", topology, abilities=ALL_ABILITIES, may_leave=("hidden_states",))
    assert {stage.place.host.host_id for stage in plan.chosen.stages} == {topology.home}


def test_unreachable_host_is_not_used_and_said_so() -> None:
    topology = pair(known_host(PI), known_host(BOARD)).model_copy(update={"links": ()})
    plan = plan_for("1b", topology, abilities=ALL_ABILITIES, may_leave=("hidden_states",))
    reasons = [item.reason for item in plan.rejected if item.option.startswith(BOARD)]
    assert any("unreachable" in reason for reason in reasons)


def test_runtime_without_an_expert_cache_gets_no_plan_it_cannot_execute() -> None:
    before = frozenset[Ability]({"resident", "streaming"})
    plan = plan_for("moe", alone(limited(PI, 2500 * MB)), abilities=before)
    assert plan.chosen.stages[0].tiers.cached == ()
    later = plan_for("moe", alone(limited(PI, 2500 * MB)))
    assert later.chosen.stages[0].tiers.experts is not None
    assert later.chosen.tpot_s < plan.chosen.tpot_s


def test_skewed_routing_makes_an_expert_cache_worth_more() -> None:
    goal = Goal(n_prompt=64, n_ctx=512, abilities=ALL_ABILITIES)
    topology = alone(limited(PI, 2500 * MB))
    even, skewed = (
        make_plan(workload("moe"), topology, goal, Popularity("assumed", exponent))
        for exponent in (0.0, 1.5)
    )
    assert skewed.chosen.tpot_s < even.chosen.tpot_s


def test_plan_beats_or_gives_way_to_every_baseline() -> None:
    for limit_mb in (800, 2000, 4300, 6500):
        plan = plan_for("7b", alone(limited(PI, limit_mb * MB)))
        possible = [way.tpot_s for way in plan.plain if way.tpot_s is not None]
        assert all(plan.chosen.tpot_s <= seconds * 1.03 for seconds in possible)


@pytest.mark.parametrize("shape", ["7b", "30b-a3b"])
@pytest.mark.parametrize("name", names())
def test_every_known_device_gets_a_valid_manifest_or_the_binding_limit(
    name: str, shape: str
) -> None:
    model = workload(shape)
    goal = Goal(n_prompt=128, n_ctx=4096, ubatches=(128,), abilities=ALL_ABILITIES)
    outcome = planned(model, alone(known_host(name)), goal)
    if isinstance(outcome, PlanError):
        assert "bytes" in outcome.message or "no rate is known" in outcome.message
    else:
        text = canonical_json(bind(outcome, identity(model), "test"))
        assert canonical_json(parse_manifest(text, name)) == text


def test_equal_input_gives_byte_equal_manifests() -> None:
    topology = pair(limited(PI, 1500 * MB), known_host(BOARD))
    made = [
        canonical_json(
            bind(
                plan_for("7b", topology, abilities=ALL_ABILITIES, may_leave=("hidden_states",)),
                identity(workload("7b")),
                "test",
            )
        )
        for _ in range(2)
    ]
    assert made[0] == made[1]


def test_no_candidate_of_the_frontier_is_beaten_by_another() -> None:
    goal = Goal(n_prompt=64, n_ctx=512)
    found = frontier(workload("1b"), alone(limited(PI, 700 * MB)), goal, METRICS)
    assert found
    for one in found:
        for other in found:
            better = [other.of(metric) < one.of(metric) * (1 - 1e-6) for metric in METRICS]
            worse = [other.of(metric) > one.of(metric) * (1 + 1e-6) for metric in METRICS]
            assert one is other or any(worse) or not any(better)


@pytest.mark.parametrize("limit_mb", [1500, 3000, 6000])
def test_least_memory_is_a_goal_that_no_other_goal_undercuts(limit_mb: int) -> None:
    topology = alone(limited(PI, limit_mb * MB))
    least = plan_for("7b", topology, minimise="memory_bytes").chosen.peak_bytes
    for other in ("tpot_s", "ttft_s"):
        assert least <= plan_for("7b", topology, minimise=other).chosen.peak_bytes


def test_least_memory_keeps_a_ceiling_on_the_time_per_token() -> None:
    topology = alone(limited(PI, 6000 * MB))
    fastest = plan_for("7b", topology).chosen
    ceilings = {"tpot_s": 8 * fastest.tpot_s}
    frugal = plan_for("7b", topology, minimise="memory_bytes", ceilings=ceilings).chosen
    assert frugal.tpot_s <= ceilings["tpot_s"]
    assert frugal.peak_bytes < fastest.peak_bytes


def test_device_of_unknown_power_is_no_free_lunch() -> None:
    host = known_host(PI)
    unknown = tuple(device.model_copy(update={"power_w": None}) for device in host.devices)
    other = known_host(BOARD).model_copy(update={"devices": unknown, "pools": host.pools})
    topology = pair(host, other)
    plan = plan_for(
        "1b", topology, minimise="energy_j", abilities=ALL_ABILITIES, may_leave=("hidden_states",)
    )
    assert {stage.place.host.host_id for stage in plan.chosen.stages} == {host.host_id}
    with pytest.raises(ConfigError, match="no device has a known power_w"):
        plan_for("1b", alone(other), minimise="energy_j")


def test_rotation_tables_and_vectors_never_stream() -> None:
    whole = stage_weights(workload("7b"), 0, 32, head=True).whole
    matrix = next(tensor for tensor in whole if tensor.name.endswith("ffn_up.weight"))
    assert can_stream(matrix)
    assert not can_stream(replace(matrix, name="rope_freqs.weight"))
    assert not can_stream(replace(matrix, name="blk.0.ssm_a"))
    assert not can_stream(replace(matrix, shape=(4096,)))
