"""Geometry of the report's two charts, from a timeline: memory over time, and who did what when.

Shapes are in a box of `WIDTH` x `HEIGHT` units that the page stretches to its own width. However
long a timeline is, what is drawn is bounded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from edgert.timeline import LANES, Lane, MemoryPoint, Span, Timeline
from edgert.units import format_bytes
from partition.report_text import duration

WIDTH, HEIGHT = 1000, 100
PROCESS = "process"

_MOST_STEPS = 250
_MOST_PLACES = 24
_GAP = 0.6  # shapes closer than this are drawn as one
_THINNEST, _THIN = 0.8, 1.2
_FAINTEST = 0.15
_N_TICKS = 5
_N_TOKENS = 2
_KINDS = {
    "pinned": "pinned", "window": "window", "kv cache": "kv", "kv": "kv",
    "compute buffers": "buffers", "buffers": "buffers", "expert cache": "cache",
    "staging": "window", "rows": "looked", "looked up": "looked",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Shape:
    """A part of a chart.

    Attributes:
        kind: Class of its colour.
        title: What it is, with its figures.
        path: SVG path data.
    """

    kind: str
    title: str
    path: str


@dataclass(frozen=True, slots=True)
class MemoryChart:
    """Memory of a place over time.

    Attributes:
        place: Where.
        areas: Stacked from below.
        line: What the whole process takes; None where it is not known.
        limit_y: Height of the limit in the box; None where it is not known or far above.
        top: Memory at the upper edge.
        ticks: Times along the lower edge.
    """

    place: str
    areas: tuple[Shape, ...]
    line: Shape | None
    limit_y: float | None
    top: str
    ticks: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Spans of a lane that are drawn as one rectangle from `x` on, fainter the fewer they are."""

    x: float
    width: float
    opacity: float
    title: str


@dataclass(frozen=True, slots=True)
class LaneRow:
    """One lane of a place."""

    lane: Lane
    busy: str
    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """What every place did.

    Attributes:
        places: Lanes by place.
        ticks: Times along the lower edge.
        n_more: Places that are not drawn.
    """

    places: tuple[tuple[str, tuple[LaneRow, ...]], ...]
    ticks: tuple[str, ...]
    n_more: int


def memory_charts(timeline: Timeline, limits_bytes: Mapping[str, int]) -> tuple[MemoryChart, ...]:
    """Return a chart for each place whose memory is known.

    Args:
        timeline: With memory points.
        limits_bytes: Bound on each place, where it has one.
    """
    places = dict.fromkeys(point.place for point in timeline.memory)
    end_s = max(
        [point.at_s for point in timeline.memory] + [span.end_s for span in timeline.spans],
        default=0.0,
    )
    return tuple(
        _memory_chart(
            place, [p for p in timeline.memory if p.place == place], end_s, limits_bytes.get(place)
        )
        for place in list(places)[:_MOST_PLACES]
    )


def pipeline(timeline: Timeline) -> Pipeline | None:
    """Return what is drawn of a timeline: one prefill and two tokens where it tells them apart."""
    start_s, end_s = _interesting(timeline.spans)
    spans = [s for s in timeline.spans if s.end_s >= start_s and s.start_s <= end_s]
    if not spans or end_s <= start_s:
        return None
    names = list(dict.fromkeys(span.place for span in spans))
    places = tuple(
        (name, _rows([s for s in spans if s.place == name], start_s, end_s))
        for name in names[:_MOST_PLACES]
    )
    return Pipeline(places, _ticks(end_s - start_s), max(0, len(names) - _MOST_PLACES))


def _interesting(spans: Sequence[Span]) -> tuple[float, float]:
    """Return from the first pass to the end of the second token; all, where passes have no name."""
    work = sorted((s for s in spans if s.lane == "compute"), key=lambda s: s.start_s)
    start_s = min((s.start_s for s in work if s.name != "load"), default=0.0)
    tokens = list(dict.fromkeys(s.name for s in work if s.name.startswith("token ")))[:_N_TOKENS]
    until = work if len(tokens) < _N_TOKENS else [s for s in work if s.name in tokens]
    return start_s, max((s.end_s for s in (until or spans)), default=0.0)


def _rows(spans: Sequence[Span], start_s: float, end_s: float) -> tuple[LaneRow, ...]:
    found = []
    for lane in LANES:
        mine = sorted((s for s in spans if s.lane == lane), key=lambda s: (s.start_s, s.end_s))
        if mine:
            busy = _busy_s(mine, start_s, end_s) / (end_s - start_s)
            found.append(LaneRow(lane, f"{busy:.0%}", _blocks(mine, start_s, end_s)))
    return tuple(found)


def _busy_s(spans: Iterable[Span], start_s: float, end_s: float) -> float:
    total, at = 0.0, start_s
    for span in spans:
        total += max(0.0, min(span.end_s, end_s) - max(span.start_s, at))
        at = max(at, min(span.end_s, end_s))
    return total


def _blocks(spans: Sequence[Span], start_s: float, end_s: float) -> tuple[Block, ...]:
    scale = WIDTH / (end_s - start_s)
    groups: list[_Group] = []
    for span in spans:
        left = max(0.0, (span.start_s - start_s) * scale)
        right = min(float(WIDTH), (span.end_s - start_s) * scale)
        if groups and groups[-1].takes(left, right, span):
            groups[-1].add(left, right, span)
        else:
            groups.append(_Group(left, right, right - left, span, span))
    return tuple(
        Block(
            x=round(group.left, 2),
            width=round(max(group.right - group.left, _THINNEST), 2),
            opacity=group.opacity(),
            title=_title(group.first, group.last, start_s),
        )
        for group in groups
    )


@dataclass(slots=True)
class _Group:
    """Spans drawn as one block, in the order of their start."""

    left: float
    right: float
    covered: float
    first: Span
    last: Span

    def takes(self, left: float, right: float, span: Span) -> bool:
        """Whether a span belongs here: it overlaps, or both are too thin to tell apart."""
        thin = self.right - self.left < _THIN or right - left < _GAP
        near = left - self.right < _GAP
        return left < self.right - 1e-9 or (near and (thin or span.name == self.last.name))

    def add(self, left: float, right: float, span: Span) -> None:
        self.covered += max(0.0, right - max(left, self.right))
        self.right = max(self.right, right)
        self.last = span

    def opacity(self) -> float:
        """Return how much of the block is covered, so that sparse ones look it."""
        width = self.right - self.left
        return 1.0 if width <= _THIN else round(max(_FAINTEST, self.covered / width), 2)


def _title(first: Span, last: Span, start_s: float) -> str:
    end_s = max(first.end_s, last.end_s)
    when = f"{duration(max(0.0, first.start_s - start_s))} + {duration(end_s - first.start_s)}"
    if first is last:
        moved = "" if first.n_bytes is None else f", {format_bytes(first.n_bytes)}"
        return f"{first.name}: {when}{moved}"
    return f"{first.name} to {last.name}: {when}"


def _memory_chart(
    place: str, points: Sequence[MemoryPoint], end_s: float, limit_bytes: int | None
) -> MemoryChart:
    steps = _steps(points, end_s)
    held = dict.fromkeys(k for p in points for k, size in p.held_bytes.items() if size)
    kinds = [kind for kind in held if kind != PROCESS]
    peak = max((_height(point) for point in points), default=0)
    shown_limit = limit_bytes is not None and limit_bytes <= 3 * peak
    top = max(peak * 1.08, (limit_bytes or 0) * 1.02 if shown_limit else 0, 1)
    floor = [0.0] * len(steps)
    areas = []
    for kind in kinds:
        ceiling = [
            low + point.held_bytes.get(kind, 0)
            for low, (_, point) in zip(floor, steps, strict=True)
        ]
        most = max(point.held_bytes.get(kind, 0) for point in points)
        path = _area([at for at, _ in steps], floor, ceiling, (end_s, top))
        areas.append(Shape(_KINDS.get(kind, "other"), f"{kind}, {format_bytes(most)}", path))
        floor = ceiling
    line = None
    if any(PROCESS in point.held_bytes for point in points):
        heights = [float(point.held_bytes.get(PROCESS, 0)) for _, point in steps]
        path = _outline([at for at, _ in steps], heights, (end_s, top))
        line = Shape("process", f"whole process, {format_bytes(max(heights))}", path)
    limit_y = None
    if shown_limit and limit_bytes is not None:
        limit_y = round(HEIGHT * (1 - limit_bytes / top), 2)
    return MemoryChart(place, tuple(areas), line, limit_y, format_bytes(top), _ticks(end_s))


def _height(point: MemoryPoint) -> int:
    parts = sum(size for kind, size in point.held_bytes.items() if kind != PROCESS)
    return max(parts, point.held_bytes.get(PROCESS, 0))


def _steps(points: Sequence[MemoryPoint], end_s: float) -> list[tuple[float, MemoryPoint]]:
    """Return points by time; of many, the highest in each part of the time."""
    if len(points) <= _MOST_STEPS or end_s <= 0:
        return [(point.at_s, point) for point in points]

    def part(point: MemoryPoint) -> int:
        return int(point.at_s / end_s * _MOST_STEPS)

    groups = (list(group) for _, group in groupby(points, part))
    return [(group[0].at_s, max(group, key=_height)) for group in groups]


def _corners(
    times: Sequence[float], heights: Sequence[float], box: tuple[float, float]
) -> list[str]:
    """Return the corners of a staircase: a height holds until the next one's time."""
    end_s, top = box
    xs = [WIDTH * at / end_s if end_s > 0 else 0.0 for at in times]
    ys = [HEIGHT * (1 - height / top) for height in heights]
    corners = [(xs[0], ys[0])]
    for (_, y), (next_x, next_y) in pairwise(zip(xs, ys, strict=True)):
        corners += [(next_x, y), (next_x, next_y)]
    corners.append((float(WIDTH), ys[-1]))
    return [f"{x:.2f} {y:.2f}" for x, y in corners]


def _outline(times: Sequence[float], heights: Sequence[float], box: tuple[float, float]) -> str:
    return "M" + "L".join(_corners(times, heights, box))


def _area(
    times: Sequence[float],
    floor: Sequence[float],
    ceiling: Sequence[float],
    box: tuple[float, float],
) -> str:
    back = list(reversed(_corners(times, floor, box)))
    return "M" + "L".join([*_corners(times, ceiling, box), *back]) + "Z"


def _ticks(end_s: float) -> tuple[str, ...]:
    return tuple(duration(end_s * i / (_N_TICKS - 1)) for i in range(_N_TICKS))
