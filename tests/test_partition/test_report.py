"""The report page: whole, safe, self-contained, the same every time, and drawn to scale."""

from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser

import pytest

import builders_manifest as build
from edgert.timeline import MemoryPoint, Span, Timeline
from partition.manifest import Manifest
from partition.report import Alternative, html_report
from partition.report_charts import memory_charts, pipeline
from partition.report_placement import HostView, host_views, pool_limits
from partition.report_text import duration, figures, printable

EMPTY = Timeline("predicted", ())
EVIL = "<script>alert('x')</script>\"&\u202e\x00"


def timeline() -> Timeline:
    spans = tuple(
        span
        for index, name in enumerate(["load", "tokens 0 to 9", "token 10", "token 11", "token 12"])
        for span in (
            Span("home", "compute", name, float(index), index + 0.5),
            Span("home", "flash", "blk.0.up.weight", index + 0.25, index + 0.75, 1000),
        )
    )
    memory = tuple(
        MemoryPoint("home", float(i), {"pinned": 100 * (i + 1), "kv cache": 50, "process": 900})
        for i in range(4)
    )
    return Timeline("predicted", spans, memory)


class Page(HTMLParser):
    """Checks that tags nest, and collects them with their attributes and the visible text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "line"):  # they have no end
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data


def page(made: build.Document | None = None, *alternatives: Alternative) -> Page:
    return Page(html_report(build.manifest(made), timeline(), alternatives))


@pytest.mark.parametrize(
    "make", [build.document, build.two_hosts, build.shared, build.streaming, build.onnx]
)
@pytest.mark.parametrize("drawn", [EMPTY, timeline()], ids=["no timeline", "timeline"])
def test_every_kind_of_plan_makes_a_page_whose_tags_nest(
    make: Callable[[], build.Document], drawn: Timeline
) -> None:
    manifest = build.manifest(make())
    found = Page(html_report(manifest, drawn, [Alternative("other", None, "no")]))
    assert found.open == []
    for stage in manifest.stages:
        assert f"{stage.stage_id}: " in found.text
    for host in manifest.hosts:
        assert host.name in found.text


def test_page_has_everything_that_was_decided() -> None:
    made = build.two_hosts()
    made["warnings"] = ["assumed rates"]
    other = Alternative("everything on board", 0.041, "slower")
    found = page(made, other, Alternative("on the moon", None, "too far"))
    manifest = build.manifest(made)
    wanted = [
        manifest.model.name, manifest.binds, "assumed rates", other.name, other.reason, "2.00x",
        "too far", "not possible", "hidden states", "1.02x", manifest.model.files[0].sha256,
        "20.5 ms", "lowest time per token",
    ]  # fmt: skip
    for decision in manifest.decisions:
        wanted += [decision.what, decision.choice, decision.reason]
    for baseline in manifest.baselines:
        wanted += [baseline.name, baseline.reason]
    assert [text for text in wanted if text not in found.text] == []


@pytest.mark.parametrize(
    "path",
    [
        "model.name", "model.architecture", "model.files.0.path", "hosts.0.name",
        "hosts.0.devices.0.name", "binds", "decisions.0.what", "decisions.0.choice",
        "decisions.0.reason", "baselines.0.name", "baselines.0.reason", "tool_version",
        "stages.0.precision",
    ],
)  # fmt: skip
def test_text_of_a_manifest_is_never_markup(path: str) -> None:
    value: object = {EVIL: 1} if path.endswith("precision") else EVIL
    made = build.edited(build.document(), path, value)
    html = html_report(Manifest.model_validate_json(build.text(made)), timeline(), [])
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert "\u202e" not in html
    assert "\x00" not in html
    assert Page(html).open == []


def test_text_of_timelines_and_alternatives_is_never_markup() -> None:
    evil = Timeline(
        "measured",
        (Span(EVIL, "compute", EVIL, 0.0, 1.0), Span(EVIL, "compute", "x", 2.0, 3.0)),
        (MemoryPoint(EVIL, 0.0, {EVIL: 10}),),
    )
    html = html_report(build.manifest(), evil, [Alternative(EVIL, 1.0, EVIL)])
    assert "<script" not in html
    assert html.count("&lt;script&gt;") > 5
    assert Page(html).open == []


def test_page_needs_nothing_but_itself() -> None:
    html = html_report(build.manifest(build.two_hosts()), timeline(), [])
    found = Page(html)
    assert not re.search(r"https?:|//|url\(|@import|javascript:", html.partition("<title>")[2])
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object"}
    names = {name for _, attributes in found.tags for name in attributes}
    assert not {name for name in names if name.startswith("on")} | names & {"src", "href"}
    policy = next(a for tag, a in found.tags if tag == "meta" and "http-equiv" in a)
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_equal_input_gives_an_equal_page() -> None:
    pages = {html_report(build.manifest(build.streaming()), timeline(), []) for _ in range(2)}
    assert len(pages) == 1


def test_page_of_a_huge_plan_stays_small() -> None:
    spans = tuple(
        Span("home", "compute", f"blk.{i}.q", i * 1e-3, i * 1e-3 + 5e-4) for i in range(50_000)
    )
    memory = tuple(MemoryPoint("home", i * 1e-3, {"pinned": i}) for i in range(50_000))
    made = build.edited(build.document(), "model.n_layer", 5000)
    made["stages"] = [build.stage("s0", "home", (0, 5000), head=True)]
    html = html_report(build.manifest(made), Timeline("predicted", spans, memory), [])
    assert len(html) < 200_000


def views(made: build.Document, sizes: dict[str, int] | None = None) -> HostView:
    return host_views(build.manifest(made), timeline(), sizes or {})[0]


def test_memory_bar_is_to_scale_with_the_limit() -> None:
    made = build.edited(build.streaming(), "hosts.0.pools.0.limit_bytes", 4 << 20)
    tiers = build.manifest(made).stages[0].tiers
    sizes = dict.fromkeys(
        (*tiers.pinned, *tiers.streamed, *tiers.looked_up, *tiers.cached), 1 << 16
    )
    memory, flash = views(made, sizes).bars
    # 9 pinned tensors of 64 KiB, a window and an expert cache of 1 MiB each, in 4 MiB
    shares = {segment.kind: segment.percent for segment in memory.segments}
    assert shares["pinned"] == pytest.approx(100 * 9 / 64, abs=1e-2)
    assert shares["window"] == shares["cache"] == 25.0
    assert not memory.over
    assert {s.kind: s.percent for s in flash.segments} == pytest.approx(
        {"streamed": 33.333, "looked": 33.333, "cached": 33.333}
    )


def test_memory_over_the_limit_is_said() -> None:
    made = build.edited(build.streaming(), "hosts.0.pools.0.limit_bytes", 1 << 20)
    (memory,) = views(made).bars
    assert memory.over
    assert sum(segment.percent for segment in memory.segments) == pytest.approx(100, abs=0.1)


def test_pinned_bytes_come_from_the_timeline_where_sizes_are_not_known() -> None:
    (memory,) = views(build.streaming()).bars
    assert memory.segments[0].label == "pinned weights 400 B"
    unknown = host_views(build.manifest(build.streaming()), EMPTY, {})[0].bars[0]
    assert "not known here" in unknown.note


def test_layer_strip_shows_each_layers_share_of_a_tier() -> None:
    (stage,) = views(build.streaming(), {"blk.0.up.weight": 300, "blk.0.q.weight": 99}).stages
    assert [cell.label for cell in stage.cells] == ["0", "1", "2", "3", "+"]
    # unknown tensors count as one byte: 99 + 1 pinned, 300 streamed
    assert {s.kind: s.percent for s in stage.cells[0].segments} == {"pinned": 25, "streamed": 75}
    assert [s.kind for s in stage.cells[1].segments] == ["pinned", "cached"]
    assert [s.kind for s in stage.cells[-1].segments] == ["pinned", "looked"]


def test_limits_are_known_by_host_device_and_stage() -> None:
    limits = pool_limits(build.manifest(build.two_hosts()))
    assert {"home", "board", "board/gpu0", "s0", "s1"} <= set(limits)


def test_pipeline_shows_one_prefill_and_two_tokens() -> None:
    drawn = pipeline(timeline())
    assert drawn is not None
    ((place, (compute, flash)),) = drawn.places
    assert place == "home"
    # from 1 s, the prefill, to 3.5 s, the end of token 11: 400 units a second
    assert [(b.x, b.width) for b in compute.blocks] == [
        (0.0, 200.0),
        (400.0, 200.0),
        (800.0, 200.0),
    ]
    assert compute.busy == "60%"
    assert flash.blocks[0].title == "blk.0.up.weight: 250 ms + 500 ms, 1.00 kB"
    assert drawn.ticks[-1] == "2.5 s"


def test_pipeline_of_two_places_ends_with_the_second_token_of_both() -> None:
    spans = tuple(
        Span(place, "compute", f"token {index}", index + shift, index + shift + 0.5)
        for index in range(4)
        for place, shift in (("a", 0.0), ("b", 0.5))
    )
    drawn = pipeline(Timeline("predicted", spans))
    assert drawn is not None
    assert drawn.ticks[-1] == "2 s"


def test_many_short_spans_are_drawn_as_faint_as_they_are_rare() -> None:
    spans = tuple(
        Span("a", "compute", f"w{i}", i * 1e-4, i * 1e-4 + 2.5e-5) for i in range(100_000)
    )
    drawn = pipeline(Timeline("predicted", spans))
    assert drawn is not None
    ((_, (row,)),) = drawn.places
    assert row.busy == "25%"
    assert len(row.blocks) < 1000
    assert all(block.opacity == pytest.approx(0.25, abs=0.1) for block in row.blocks[1:-1])


def test_memory_chart_stacks_parts_below_the_limit() -> None:
    (chart,) = memory_charts(timeline(), {"home": 1000})
    assert [area.title for area in chart.areas] == ["pinned, 400 B", "kv cache, 50 B"]
    assert chart.line is not None
    assert chart.line.title == "whole process, 900 B"
    assert chart.limit_y == pytest.approx(100 * (1 - 1000 / 1020), abs=0.01)
    first = chart.areas[1].path.removeprefix("M").split("L")[0]
    assert float(first.split()[1]) == pytest.approx(100 * (1 - 150 / 1020), abs=0.01)


def test_limit_far_above_is_not_drawn() -> None:
    (chart,) = memory_charts(timeline(), {"home": 10_000})
    assert chart.limit_y is None


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0"), (2e-9, "2 ns"), (4.5e-5, "45 us"), (0.0205, "20.5 ms"), (0.9999, "1 s"),
     (2.814, "2.81 s"), (640.0, "640 s")],
)  # fmt: skip
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_ranges_name_their_unit_once() -> None:
    spans = {figure.label: figure.span for figure in figures(build.manifest())}
    assert spans["Time per token"] == "10.2 to 30.8 ms"
    assert spans["Peak memory"] == "750 MB to 2.25 GB"
    assert spans["Sent per token"] == "0 B"


def test_letters_of_every_script_are_shown_and_controls_are_not() -> None:
    assert printable("Qwen \u5343\u95ee \u0646\u0645\u0648\u0646\u0647 \U0001f600\n") == (
        "Qwen \u5343\u95ee \u0646\u0645\u0648\u0646\u0647 \U0001f600\n"
    )
    assert printable("a\u202eb\x07\ud800") == "a\ufffdb\ufffd\ufffd"
