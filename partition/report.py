"""The report of a plan: one HTML page that needs nothing but itself, not even scripts."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import jinja2
import jinja2.sandbox

from edgert.timeline import Timeline
from edgert.units import format_bytes
from partition.manifest import Manifest
from partition.report_charts import HEIGHT, WIDTH, memory_charts, pipeline
from partition.report_placement import host_views, pool_limits
from partition.report_text import asked, duration, figures, printable, ratio, settings

_TEMPLATE = "report.html.j2"


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another way that was considered.

    Attributes:
        name: For people.
        tpot_s: Seconds a token; None where it is not possible.
        reason: Why it was not taken.
    """

    name: str
    tpot_s: float | None
    reason: str


@dataclass(frozen=True, slots=True)
class _Row:
    """A row of a table of ways to run the model."""

    name: str
    time: str
    ratio: str
    reason: str


def html_report(
    manifest: Manifest,
    timeline: Timeline,
    alternatives: Sequence[Alternative],
    sizes_bytes: Mapping[str, int] | None = None,
) -> str:
    """Return a self-contained page about a plan; equal input gives an equal page.

    Args:
        manifest: What was decided, and why.
        timeline: Predicted or measured; its places are host ids, `host/device`, `host/pool` or
            stage ids where limits are to be drawn.
        alternatives: The next best ways, best first.
        sizes_bytes: Bytes of tensors by name, which the manifest does not have; without them the
            bytes of a tier are shown only where the timeline or the total tells them.
    """
    plan_s = manifest.predicted.tpot_ms.value / 1e3
    page = _environment().get_template(_TEMPLATE)
    return page.render(
        manifest=manifest,
        weight=format_bytes(manifest.model.weight_bytes),
        asked=asked(manifest.goal),
        settings=settings(manifest),
        figures=figures(manifest),
        hosts=host_views(manifest, timeline, sizes_bytes or {}),
        charts=memory_charts(timeline, pool_limits(manifest)),
        pipeline=pipeline(timeline),
        timeline=timeline,
        plan_time=duration(plan_s),
        baselines=[
            _row(b.name, None if b.tpot_ms is None else b.tpot_ms / 1e3, plan_s, b.reason)
            for b in manifest.baselines
        ],
        alternatives=[_row(a.name, a.tpot_s, plan_s, a.reason) for a in alternatives],
        width=WIDTH,
        height=HEIGHT,
    )


def _row(name: str, seconds: float | None, plan_s: float, reason: str) -> _Row:
    time = "not possible" if seconds is None else duration(seconds)
    return _Row(name, time, ratio(seconds, plan_s), reason)


@functools.cache
def _environment() -> jinja2.Environment:
    """Return the sandbox in which every value is escaped, and stripped of unseen characters."""
    return jinja2.sandbox.ImmutableSandboxedEnvironment(
        loader=jinja2.PackageLoader("partition", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_shown,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _shown(value: object) -> object:
    return printable(value) if type(value) is str else value
