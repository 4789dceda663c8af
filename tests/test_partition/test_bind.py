"""From a plan to its manifest: ranges, warnings, abilities and hosts follow from what it uses."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders_plan import BOARD, MB, alone, identity, limited, workload
from builders_tensor import GOAL, star
from devices.catalog import known_host
from devices.profile import Figure, HostProfile
from devices.topology import Topology
from partition.bind import bind, requirements
from partition.goal import ALL_ABILITIES, Goal
from partition.manifest import Manifest
from partition.manifest_file import violations
from partition.plan import Plan, make_plan
from partition.rates_used import half_width, links_used

CHAIN = replace(GOAL, abilities=ALL_ABILITIES - {"tensor_parallel"})
MEASURED = {"origin": "measured", "spread": 0.01}


def measured(host: HostProfile, **changes: object) -> HostProfile:
    """Return a host whose processor, alone, and flash were measured."""
    processor = host.devices[0]
    kernels = tuple(
        kernel.model_copy(
            update={"matvec_bytes_per_s": kernel.matvec_bytes_per_s.model_copy(update=MEASURED)}
        )
        for kernel in processor.kernels
    )
    devices = (processor.model_copy(update={"kernels": kernels}),)
    return host.model_copy(update={"devices": devices, **changes})


def with_links(topology: Topology, update: dict[str, object]) -> Topology:
    links = tuple(
        link.model_copy(
            update={
                "round_trip_s": link.round_trip_s.model_copy(update=update),
                "bytes_per_s": link.bytes_per_s.model_copy(update=update),
            }
        )
        for link in topology.links
    )
    return topology.model_copy(update={"links": links})


def bound(shape: str, plan: Plan) -> Manifest:
    manifest = bind(plan, identity(workload(shape)), "test")
    assert violations(manifest) == ()
    return manifest


def half(manifest: Manifest) -> float:
    figure = manifest.predicted.tpot_ms
    return (figure.high - figure.low) / 2 / figure.value


def cached(host: HostProfile) -> Plan:
    goal = Goal(n_prompt=64, n_ctx=512, ubatches=(32,), abilities=ALL_ABILITIES)
    plan = make_plan(workload("moe"), alone(host), goal)
    assert plan.chosen.stages[0].tiers.cached
    return plan


def test_flash_behind_an_expert_cache_widens_the_range_and_is_warned_of() -> None:
    host = measured(limited(BOARD, 700 * MB))
    assert host.flash is not None
    doubtful = cached(host)
    assert half(bound("moe", doubtful)) == pytest.approx(0.3)
    assert any("rates of" in warning for warning in doubtful.warnings)
    flash = host.flash
    points = tuple(
        point.model_copy(update={"bytes_per_s": point.bytes_per_s.model_copy(update=MEASURED)})
        for point in flash.points
    )
    known = cached(host.model_copy(update={"flash": flash.model_copy(update={"points": points})}))
    assert half(bound("moe", known)) == pytest.approx(0.1)
    assert not any("rates of" in warning for warning in known.warnings)


@pytest.mark.parametrize("goal", [GOAL, CHAIN], ids=["shared", "one after another"])
def test_links_that_were_not_measured_widen_the_range_and_are_warned_of(goal: Goal) -> None:
    hosts = [measured(known_host(BOARD, name)) for name in ("home", "board")]
    hosts[0] = hosts[0].model_copy(update={"pools": limited(BOARD, 2500 * MB).pools})
    hosts[1] = hosts[1].model_copy(update={"pools": limited(BOARD, 2500 * MB).pools})
    topology = star(hosts)
    for update, width in (({"origin": "assumed", "spread": None}, 0.3), (MEASURED, 0.1)):
        plan = make_plan(workload("7b"), with_links(topology, update), goal)
        assert len(plan.chosen.stages) == 2
        manifest = bound("7b", plan)
        assert half(manifest) == pytest.approx(width)
        said = [warning for warning in manifest.warnings if warning.startswith("links ")]
        assert len(said) == (update["origin"] == "assumed")
        assert all("links home to board, board to home are assumed, not" in text for text in said)


def test_links_are_those_that_something_crosses() -> None:
    hosts = [known_host(BOARD, name) for name in ("a", "b", "c")]
    topology = star(hosts)

    def pairs(*ids: str, parallel: bool = False) -> list[tuple[str, str]]:
        links = links_used(ids, topology, parallel=parallel)
        return [(link.source, link.target) for link in links]

    assert pairs("a") == []
    assert pairs("b") == pairs("a", "b") == [("a", "b"), ("b", "a")]
    both_ways = [("a", "b"), ("b", "a"), ("a", "c"), ("c", "a")]
    assert pairs("a", "b", "c", parallel=True) == both_ways


def test_half_width_is_bounded() -> None:
    wild = Figure(value=1.0, origin="measured", spread=4.0)
    assert half_width([]) == 0.1
    assert half_width([wild]) == 0.5


def test_every_number_of_threads_of_a_profile_fits_a_manifest() -> None:
    host = known_host(BOARD)
    kernels = tuple(
        kernel.model_copy(update={"n_threads": 4096}) for kernel in host.devices[0].kernels
    )
    devices = (host.devices[0].model_copy(update={"kernels": kernels}),)
    topology = alone(host.model_copy(update={"devices": devices}))
    manifest = bound("1b", make_plan(workload("1b"), topology, GOAL))
    assert manifest.hosts[0].devices[0].n_threads == 4096


def test_stage_that_streams_and_caches_needs_both() -> None:
    plan = cached(limited(BOARD, 700 * MB))
    (stage,) = plan.chosen.stages
    tiers = stage.tiers.model_copy(update={"streamed": ("blk.0.attn_q.weight",)})
    both = replace(plan.chosen, stages=(replace(stage, tiers=tiers),))
    assert requirements(both, BOARD) == ("expert_cache", "streaming")


def test_host_of_an_accelerator_lists_the_memory_of_its_program_too() -> None:
    host = known_host("cloud-h100-80gb")
    plan = make_plan(workload("1b"), alone(host), GOAL)
    (stage,) = plan.chosen.stages
    assert stage.place.device.kind == "gpu"
    pools = {device.kind: device.pool_id for device in host.devices}
    found = {pool.pool_id for pool in bound("1b", plan).hosts[0].pools}
    assert found == {pools["gpu"], pools["cpu"]}
