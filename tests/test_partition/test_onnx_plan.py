"""Plans of ONNX models: where the graph is cut, what must fit, what static shapes refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from onnx import helper

from builders_plan import MB, alone, limited
from devices.catalog import known_host, usual_link
from devices.profile import DeviceProfile, Figure, HostProfile
from devices.topology import Topology
from edgert.errors import ConfigError, FormatError, PlanError
from onnx_builders import externalised, model, small_network, weight, write
from partition.goal import ALL_ABILITIES, Goal
from partition.manifest import ModelFile, ModelIdentity
from partition.manifest_file import canonical_json, parse_manifest
from partition.onnx_bind import bind_onnx
from partition.onnx_candidates import onnx_candidate
from partition.onnx_cost import FloatRates, float_rates, node_seconds
from partition.onnx_plan import OnnxPlan, make_onnx_plan, onnx_timeline
from partition.onnx_problem import onnx_chain, usable_places
from partition.onnx_workload import OnnxWorkload, describe_onnx
from partition.units import Work

PHONE = "snapdragon-8-elite-phone"
GOAL = Goal(n_prompt=1, n_ctx=1, abilities=ALL_ABILITIES, may_leave=("input", "hidden_states"))
WIDTH, N_LAYERS = 1024, 8


@pytest.fixture(scope="module")
def layers(tmp_path_factory: pytest.TempPathFactory) -> OnnxWorkload:
    """Products one after another, 4 MB of weights each; between them 4 KB cross."""
    nodes = [
        helper.make_node("MatMul", [f"h{i}", f"w{i}"], [f"h{i + 1}"], name=f"product{i}")
        for i in range(N_LAYERS)
    ]
    weights = [weight(f"w{i}", WIDTH, WIDTH) for i in range(N_LAYERS)]
    built = model(nodes, {"h0": [1, WIDTH]}, [f"h{N_LAYERS}"], weights)
    return describe_onnx(write(built, tmp_path_factory.mktemp("onnx")))


def identity(plan: OnnxPlan) -> ModelIdentity:
    size = plan.chain.workload.weight_bytes
    file = ModelFile(path="model.onnx", size_bytes=size + 1000, sha256="0" * 64)
    return ModelIdentity(
        format="onnx", name="model", architecture="onnx", n_layer=len(plan.chain.units),
        weight_bytes=size, files=(file,),
    )  # fmt: skip


def joined(hosts: Sequence[HostProfile]) -> Topology:
    links = tuple(
        usual_link("ethernet_1g", a.host_id, b.host_id) for a in hosts for b in hosts if a != b
    )
    return Topology(home=hosts[0].host_id, hosts=tuple(hosts), links=links)


def only(host: HostProfile, *device_ids: str) -> HostProfile:
    devices = tuple(device for device in host.devices if device.device_id in device_ids)
    return host.model_copy(update={"devices": devices})


def test_seconds_of_a_product_are_its_slower_limit_by_hand() -> None:
    rates = FloatRates(flops=1e9, bytes_per_s=1e8, node_s=1e-3, origin="measured", note="")
    # 4 MB at 100 MB/s take 40 ms, 2 million operations 2 ms; the activation 1 ms; two nodes 2 ms.
    work = Work(1, 1, {"f32": 2e6}, {"f32": 4e6}, other_flops=1e6)
    assert node_seconds(work, 2, rates) == pytest.approx(0.040 + 0.001 + 0.002)


def test_rates_without_float_kernels_are_assumed_and_say_so() -> None:
    device = known_host(PHONE).device("npu0")
    rates = float_rates(device)
    assert rates.origin == "assumed"
    assert "half the rate of" in rates.note
    bare = device.model_copy(update={"kernels": ()})
    assert "for want of any rate" in float_rates(bare).note
    known = _with_float(device)
    assert float_rates(known).note == ""
    assert float_rates(known).origin == "declared"


def _with_float(device: DeviceProfile) -> DeviceProfile:
    kernel = device.kernels[0].model_copy(update={"ggml_type": "f32"})
    return device.model_copy(update={"kernels": (kernel,)})


def test_fastest_device_runs_it_all_where_it_fits(layers: OnnxWorkload) -> None:
    plan = make_onnx_plan(layers, alone(only(known_host(PHONE), "cpu", "gpu0")), GOAL)
    seconds = [way.tpot_s for way in plan.plain if way.tpot_s is not None]
    assert plan.chosen.tpot_s == min(seconds)
    assert len(plan.chosen.stages) == 1


def test_graph_is_cut_where_no_device_holds_it_all(layers: OnnxWorkload) -> None:
    process_bytes = int(known_host(PHONE).process_bytes.value)
    hosts = [
        only(limited(PHONE, process_bytes + 22 * MB, f"phone{index}"), "cpu") for index in range(2)
    ]
    plan = make_onnx_plan(layers, joined(hosts), GOAL)
    first, second = plan.chosen.stages
    assert first.end_unit == second.first_unit
    assert first.outputs == second.inputs == (f"h{first.end_unit}",)
    assert sorted([*first.weights, *second.weights]) == sorted(layers.weights)
    for stage in plan.chosen.stages:
        assert stage.peak_bytes <= process_bytes + 22 * MB
    # 4 KB of hidden state there, 4 KB of results back; the input starts at home.
    assert plan.chosen.sent_bytes == 2 * 4 * WIDTH


def test_cut_is_where_least_crosses(tmp_path: Path) -> None:
    # Wide between the two products of a pair, narrow between the pairs.
    nodes, weights, wide = [], [], 16 * WIDTH
    for i in range(2):
        nodes.append(helper.make_node("MatMul", [f"h{i}", f"u{i}"], [f"m{i}"], name=f"up{i}"))
        nodes.append(helper.make_node("MatMul", [f"m{i}", f"d{i}"], [f"h{i + 1}"], name=f"down{i}"))
        weights += [weight(f"u{i}", 64, wide), weight(f"d{i}", wide, 64)]
    built = model(nodes, {"h0": [1, 64]}, ["h2"], weights)
    workload = describe_onnx(write(built, tmp_path))
    process_bytes = int(known_host(PHONE).process_bytes.value)
    hosts = [
        only(limited(PHONE, process_bytes + 14 * MB, f"phone{index}"), "cpu") for index in range(2)
    ]
    plan = make_onnx_plan(workload, joined(hosts), GOAL)
    assert plan.chosen.stages[0].outputs == ("h1",)


def test_no_device_takes_more_memory_than_it_has(layers: OnnxWorkload) -> None:
    needed = int(known_host(PHONE).process_bytes.value) + layers.weight_bytes
    with pytest.raises(PlanError, match="bytes"):
        make_onnx_plan(layers, alone(only(limited(PHONE, needed - MB), "cpu")), GOAL)
    plan = make_onnx_plan(layers, alone(only(limited(PHONE, needed + MB), "cpu")), GOAL)
    assert plan.chosen.peak_bytes <= needed + MB


def test_static_device_refuses_a_model_with_open_dimensions(tmp_path: Path) -> None:
    path = write(small_network(), tmp_path)
    topology = alone(known_host(PHONE))
    plan = make_onnx_plan(describe_onnx(path), topology, GOAL)
    (reason,) = (r.reason for r in plan.rejected if r.option.endswith("/npu0"))
    assert "fixed shapes" in reason
    assert "batch" in reason
    assert any("--dimension batch=N" in warning for warning in plan.warnings)
    fixed = make_onnx_plan(describe_onnx(path, {"batch": 1}), topology, GOAL)
    assert not any(item.option.endswith("/npu0") for item in fixed.rejected)


def test_static_device_gets_the_part_whose_shapes_are_known(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("NonZero", ["h"], ["n"], name="search"),
    ]
    built = model(nodes, {"x": [1, 64]}, ["n"], [weight("w", 64, 64)])
    chain = onnx_chain(describe_onnx(write(built, tmp_path)))
    assert [bool(reason) for reason in chain.static_refusal] == [False, True]
    places, _ = usable_places(chain, alone(known_host(PHONE)), GOAL)
    assert "npu0" in {place.device.device_id for place in places}
    plan = make_onnx_plan(chain.workload, alone(known_host(PHONE)), GOAL)
    last = plan.chosen.stages[-1]
    assert last.place.device.device_id != "npu0"


def test_what_may_not_leave_stays_at_home(layers: OnnxWorkload) -> None:
    hosts = [known_host("raspberry-pi-5-8gb"), known_host("cloud-h100-80gb")]
    away = make_onnx_plan(layers, joined(hosts), GOAL)
    assert away.chosen.stages[-1].place.host.host_id == hosts[1].host_id
    assert not away.chosen.stages[-1].place.at_home
    private = make_onnx_plan(layers, joined(hosts), replace(GOAL, may_leave=()))
    assert {stage.place.host.host_id for stage in private.chosen.stages} == {hosts[0].host_id}
    assert any("may not leave" in item.reason for item in private.rejected)


def test_ceiling_that_nothing_meets_names_metric_and_value(layers: OnnxWorkload) -> None:
    with pytest.raises(PlanError, match="tpot_s"):
        make_onnx_plan(layers, alone(known_host(PHONE)), replace(GOAL, ceilings={"tpot_s": 1e-9}))


def powered(host: HostProfile, power_w: float | None) -> HostProfile:
    """Return a host with its processor alone."""
    processor = only(host, "cpu").devices[0]
    power = None if power_w is None else Figure(value=power_w, origin="declared")
    devices = (processor.model_copy(update={"power_w": power}),)
    return host.model_copy(update={"devices": devices})


def test_device_of_unknown_power_is_no_free_lunch(layers: OnnxWorkload) -> None:
    known, unknown = powered(known_host(PHONE, "a"), 5.0), powered(known_host(PHONE, "b"), None)
    asked: list[Goal] = [
        replace(GOAL, minimise="energy_j"), replace(GOAL, ceilings={"energy_j": 1e9}),
    ]  # fmt: skip
    for goal in asked:
        plan = make_onnx_plan(layers, joined([known, unknown]), goal)
        assert {stage.place.host.host_id for stage in plan.chosen.stages} == {"a"}
        assert [r.option for r in plan.rejected if "its power is not known" in r.reason] == [
            "b/cpu"
        ]
        energy = bind_onnx(plan, identity(plan), "test").predicted.energy_mj_per_token
        assert energy is not None
        assert energy.value == pytest.approx(1e3 * 5.0 * plan.chosen.stages[0].compute_s)
        with pytest.raises(ConfigError, match="no device has a known power_w"):
            make_onnx_plan(layers, alone(unknown), goal)


def test_energy_is_told_only_where_the_power_of_every_stage_is_known(layers: OnnxWorkload) -> None:
    process_bytes = int(known_host(PHONE).process_bytes.value)
    hosts = [
        powered(limited(PHONE, process_bytes + 22 * MB, name), power_w)
        for name, power_w in (("a", 5.0), ("b", None))
    ]
    plan = make_onnx_plan(layers, joined(hosts), GOAL)
    assert len(plan.chosen.stages) == 2
    assert bind_onnx(plan, identity(plan), "test").predicted.energy_mj_per_token is None


def test_links_that_were_not_measured_are_warned_of(layers: OnnxWorkload) -> None:
    hosts = [known_host("raspberry-pi-5-8gb"), known_host("cloud-h100-80gb")]
    plan = make_onnx_plan(layers, joined(hosts), GOAL)
    manifest = bind_onnx(plan, identity(plan), "test")
    assert sum(warning.startswith("links ") for warning in manifest.warnings) == 1
    private = make_onnx_plan(layers, joined(hosts), replace(GOAL, may_leave=()))
    manifest = bind_onnx(private, identity(private), "test")
    assert not any(warning.startswith("links ") for warning in manifest.warnings)


@pytest.mark.parametrize("n_hosts", [1, 2])
def test_manifest_is_read_back_unchanged_and_equal_each_time(
    layers: OnnxWorkload, n_hosts: int
) -> None:
    process_bytes = int(known_host(PHONE).process_bytes.value)
    hosts = [
        only(limited(PHONE, process_bytes + 44 * MB // n_hosts, f"phone{index}"), "cpu")
        for index in range(n_hosts)
    ]
    texts = []
    for _ in range(2):
        plan = make_onnx_plan(layers, joined(hosts), GOAL)
        texts.append(canonical_json(bind_onnx(plan, identity(plan), "test")))
    manifest = parse_manifest(texts[0], "test")
    assert canonical_json(manifest) == texts[0] == texts[1]
    assert ("pipeline" in manifest.requires) == (n_hosts == 2)
    assert {"onnx", "resident"} <= set(manifest.requires)
    assert all(stage.subgraph is not None for stage in manifest.stages)
    assert any("cannot execute it yet" in warning for warning in manifest.warnings)


def test_timeline_shows_every_stage_after_the_one_before(layers: OnnxWorkload) -> None:
    chain = onnx_chain(layers)
    places, _ = usable_places(chain, alone(known_host(PHONE)), GOAL)
    split = [(places[0], 0, 3), (places[1], 3, len(chain.units))]
    candidate = onnx_candidate(chain, alone(known_host(PHONE)), split)
    one, other = [s for s in onnx_timeline(candidate).spans if s.lane == "compute"]
    assert other.start_s >= one.end_s


def test_results_made_early_are_returned_by_the_stage_that_makes_them(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["early"], name="first"),
        helper.make_node("MatMul", ["x", "w"], ["late"], name="second"),
    ]
    built = model(nodes, {"x": [1, 64]}, ["early", "late"], [weight("w", 64, 64)])
    chain = onnx_chain(describe_onnx(write(built, tmp_path)))
    topology = alone(known_host(PHONE))
    places, _ = usable_places(chain, topology, GOAL)
    stages = onnx_candidate(chain, topology, [(places[0], 0, 1), (places[1], 1, 2)]).stages
    assert [set(stage.outputs) for stage in stages] == [{"x", "early"}, {"late"}]


def test_files_with_weights_are_listed(tmp_path: Path) -> None:
    path = externalised(small_network(), tmp_path, "m")
    assert describe_onnx(path).external == ("weights.bin",)


def test_graph_without_nodes_is_refused(layers: OnnxWorkload) -> None:
    empty = replace(layers, nodes=(), cuts=(), live_bytes=())
    with pytest.raises(FormatError, match="no nodes"):
        make_onnx_plan(empty, alone(known_host(PHONE)), GOAL)
