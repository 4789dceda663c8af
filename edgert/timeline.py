"""A timeline of what moved and what was computed, predicted or recorded, as a Chrome trace.

The planner's simulation and the runtime's recorder make the same `Timeline`, so that both can be
laid side by side in Perfetto. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Lane = Literal["compute", "flash", "link", "wait"]
LANES: tuple[Lane, ...] = ("compute", "flash", "link", "wait")


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time.

    Attributes:
        place: Stage or host it happened at.
        lane: What was busy.
        name: What it was, such as `blk.3.ffn_up.weight` or `token 5`.
        start_s: Since the timeline began.
        end_s: At least `start_s`.
        n_bytes: Bytes that moved; None where none did.
    """

    place: str
    lane: Lane
    name: str
    start_s: float
    end_s: float
    n_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryPoint:
    """Bytes held at a moment, by what holds them, such as `pinned` or `kv cache`."""

    place: str
    at_s: float
    held_bytes: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class CounterPoint:
    """Figures of a moment that are shown as one track, such as hits and misses of a pass."""

    place: str
    at_s: float
    name: str
    values: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Timeline:
    """Spans and memory over time.

    Attributes:
        origin: Whether it was simulated or recorded.
        spans: In any order.
        memory: In order of time for each place.
        n_cut: Spans that are missing at the end, because a recording was full.
        counters: In order of time for each place and name.
    """

    origin: Literal["predicted", "measured"]
    spans: Sequence[Span]
    memory: tuple[MemoryPoint, ...] = ()
    n_cut: int = 0
    counters: tuple[CounterPoint, ...] = ()


def chrome_trace(timelines: Iterable[Timeline]) -> str:
    """Return timelines as `trace_pieces` writes them, in one string."""
    return "".join(trace_pieces(timelines))


def trace_pieces(timelines: Iterable[Timeline]) -> Iterator[str]:
    """Write timelines in the Trace Event Format (JSON object form), one process a place.

    Spans of a lane that overlap get threads of their own: on one thread they would have to nest.
    In pieces, since all of them in memory may be more than a model's bound has left.

    Source: "Trace Event Format", complete events `X`, counters `C`, metadata `M`; times in us.
    """
    found = tuple(timelines)
    yield '{"displayTimeUnit":"ms","traceEvents":['
    between = ""
    for event in _events(found):
        yield between + json.dumps(event, separators=(",", ":"))
        between = ","
    yield "]"
    n_cut = sum(timeline.n_cut for timeline in found)
    if n_cut:
        cut = f"the last {n_cut} spans are missing: the recording was full"
        yield ',"otherData":' + json.dumps({"cut": cut})
    yield "}"


def _events(timelines: Iterable[Timeline]) -> Iterator[dict[str, object]]:
    process_ids: dict[str, int] = {}
    named: set[tuple[int, Lane, int]] = set()
    for timeline in timelines:
        for span, track in zip(timeline.spans, tracks(timeline.spans), strict=True):
            yield from _process(process_ids, f"{timeline.origin} {span.place}")
            process = process_ids[f"{timeline.origin} {span.place}"]
            if track and (process, span.lane, track) not in named:
                named.add((process, span.lane, track))
                yield _thread_name(process, span.lane, track)
            yield _complete(span, process, track)
        for point in timeline.memory:
            yield from _process(process_ids, f"{timeline.origin} {point.place}")
            yield {
                "ph": "C", "name": "memory", "tid": 0, "ts": _us(point.at_s),
                "pid": process_ids[f"{timeline.origin} {point.place}"],
                "args": dict(point.held_bytes),
            }  # fmt: skip
        for counter in timeline.counters:
            yield from _process(process_ids, f"{timeline.origin} {counter.place}")
            yield {
                "ph": "C", "name": counter.name, "tid": 0, "ts": _us(counter.at_s),
                "pid": process_ids[f"{timeline.origin} {counter.place}"],
                "args": dict(counter.values),
            }  # fmt: skip


def tracks(spans: Sequence[Span]) -> list[int]:
    """Return a track for each span, from 0 on, such that no two on a track of a lane overlap."""
    ends: dict[tuple[str, Lane], list[float]] = {}
    found = [0] * len(spans)
    for index in sorted(range(len(spans)), key=lambda i: spans[i].start_s):
        span = spans[index]
        taken = ends.setdefault((span.place, span.lane), [])
        free = (track for track, end_s in enumerate(taken) if end_s <= span.start_s)
        track = next(free, len(taken))
        taken[track : track + 1] = [span.end_s]
        found[index] = track
    return found


def _process(known: dict[str, int], name: str) -> Iterator[dict[str, object]]:
    """Give a process its number and name, where it has none yet."""
    if name not in known:
        known[name] = number = len(known) + 1
        yield {"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}}
        for lane in LANES:
            yield _thread_name(number, lane, 0)


def _thread_id(lane: Lane, track: int) -> int:
    return LANES.index(lane) + 1 + track * len(LANES)


def _thread_name(process: int, lane: Lane, track: int) -> dict[str, object]:
    name = f"{lane} {track + 1}" if track else lane
    return {
        "ph": "M", "name": "thread_name", "pid": process, "tid": _thread_id(lane, track),
        "args": {"name": name},
    }  # fmt: skip


def _complete(span: Span, process: int, track: int) -> dict[str, object]:
    event: dict[str, object] = {
        "ph": "X", "name": span.name, "cat": span.lane, "pid": process,
        "tid": _thread_id(span.lane, track), "ts": _us(span.start_s),
        "dur": _us(span.end_s - span.start_s),
    }  # fmt: skip
    return event if span.n_bytes is None else event | {"args": {"bytes": span.n_bytes}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
