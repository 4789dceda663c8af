"""The simulated timeline: memory that adds up to the predicted peak, nothing counted twice."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders_plan import BOARD, MB, PI, alone, identity, limited, workload
from builders_tensor import GOAL, boards, shared, star
from devices.catalog import known_host
from edgert.timeline import Timeline
from partition.bind import bind
from partition.goal import ALL_ABILITIES, Goal
from partition.plan import Plan, make_plan
from partition.report_charts import memory_charts
from partition.report_placement import host_views, pool_limits
from partition.stage_tiers import page_bytes
from partition.timeline import plan_timeline


def plan_for(shape: str, limit_bytes: int | None, **changes: object) -> Plan:
    host = known_host(PI) if limit_bytes is None else limited(PI, limit_bytes)
    goal = replace(Goal(n_prompt=64, n_ctx=512, ubatches=(32,)), **changes)  # type: ignore[arg-type]
    return make_plan(workload(shape), alone(host), goal)


CASES = {
    "repacked": lambda: plan_for("1b", None),
    "streaming": lambda: plan_for("7b", 1500 * MB),
    "cached": lambda: plan_for("moe", 700 * MB, abilities=ALL_ABILITIES),
}


def most(timeline: Timeline, kind: str) -> int:
    return max(point.held_bytes[kind] for point in timeline.memory)


@pytest.mark.parametrize("name", CASES)
def test_memory_of_the_timeline_tops_out_at_the_predicted_peak(name: str) -> None:
    plan = CASES[name]()
    (stage,) = plan.chosen.stages
    timeline = plan_timeline(plan.chosen)
    assert (stage.tiers.layout == "repacked") == (name != "streaming")
    assert bool(stage.tiers.streamed) == (name == "streaming")
    assert (stage.tiers.experts is not None) == (name == "cached")
    assert max(sum(point.held_bytes.values()) for point in timeline.memory) == stage.peak_bytes
    sizes = {t.name: t.size_bytes for t in (*stage.weights.whole, *stage.weights.looked_up)}
    pinned_bytes = sum(page_bytes(sizes[name]) for name in stage.tiers.pinned)
    assert most(timeline, "pinned") == pinned_bytes
    assert most(timeline, "window") == stage.tiers.window_bytes
    assert (most(timeline, "staging") > 0) == (name != "streaming")
    times = [point.at_s for point in timeline.memory]
    assert times == sorted(times)


@pytest.mark.parametrize("name", CASES)
def test_chart_shows_what_is_held_and_nothing_that_never_is(name: str) -> None:
    (chart,) = memory_charts(plan_timeline(CASES[name]().chosen), {})
    shown = {area.title.split(",")[0] for area in chart.areas}
    other = {
        "repacked": {"staging"}, "streaming": {"window"}, "cached": {"expert cache", "staging"},
    }[name]  # fmt: skip
    assert shown == {"program", "kv cache", "pinned", "compute buffers"} | other


def of_graphics(parallel: bool) -> Plan:
    """Return a plan whose stages all compute from a memory of their device's own."""
    hosts = [known_host("desktop-rtx-3060-12gb", name) for name in ("a", "b")]
    if not parallel:
        return make_plan(workload("1b"), alone(hosts[0]), GOAL)
    plan = make_plan(workload("1b"), star(hosts), GOAL)
    return replace(plan, chosen=shared("1b", star(hosts)))


@pytest.mark.parametrize("parallel", [False, True])
def test_program_of_a_graphics_stage_is_in_the_memory_of_its_host(parallel: bool) -> None:
    plan = of_graphics(parallel)
    timeline = plan_timeline(plan.chosen)
    manifest = bind(plan, identity(workload("1b")), "test")
    limits = pool_limits(manifest)
    charts = {chart.place: chart for chart in memory_charts(timeline, limits)}
    views = host_views(manifest, timeline, {})
    for stage, view in zip(plan.chosen.stages, views, strict=True):
        host = stage.place.host
        points = [point for point in timeline.memory if point.place == f"{host.host_id}/ram"]
        assert [sum(point.held_bytes.values()) for point in points] == [stage.host_bytes] * 2
        assert points[0].at_s == 0.0
        assert limits[f"{host.host_id}/ram"] == host.pool("ram").available_bytes
        own = [p.held_bytes for p in timeline.memory if p.place == stage.place.name]
        assert max(sum(held.values()) for held in own) == stage.peak_bytes - stage.host_bytes
        assert all(held["program"] == 0 for held in own)
        assert [area.title.split(",")[0] for area in charts[f"{host.host_id}/ram"].areas] == [
            "program"
        ]
        bars = {bar.title: bar for bar in view.bars}
        (program,) = bars["ram: memory"].segments
        assert program.percent == pytest.approx(
            100 * stage.host_bytes / host.pool("ram").available_bytes, abs=1e-3
        )
        assert "other" not in {segment.kind for segment in bars["vram0: memory"].segments}


def test_bars_of_shares_count_window_and_pinned_weights_once() -> None:
    # Sizes of cut tensors are not known to a report: the timeline tells what is pinned.
    topology = boards(2).model_copy(
        update={"hosts": tuple(limited(BOARD, 1200 * MB, f"board{index}") for index in range(2))}
    )
    plan = make_plan(workload("7b"), topology, GOAL)
    found = shared("7b", topology)
    plan = replace(plan, chosen=found)
    manifest = bind(plan, identity(workload("7b")), "test")
    assert all(stage.tiers.streamed for stage in manifest.stages)
    for stage, view in zip(
        found.stages, host_views(manifest, plan_timeline(found), {}), strict=True
    ):
        percent = sum(segment.percent for segment in view.bars[0].segments)
        expected = 100 * stage.peak_bytes / (1200 * MB)
        assert percent == pytest.approx(expected, abs=0.01)
        assert not view.bars[0].over
