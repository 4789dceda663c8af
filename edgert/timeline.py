"""A timeline of what moved and what was computed, predicted or recorded, as a Chrome trace.

The planner's simulation and the runtime's recorder make the same `Timeline`, so that both can be
laid side by side in Perfetto. Standard library only.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
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
class Timeline:
    """Spans and memory over time.

    Attributes:
        origin: Whether it was simulated or recorded.
        spans: In any order.
        memory: In order of time for each place.
    """

    origin: Literal["predicted", "measured"]
    spans: tuple[Span, ...]
    memory: tuple[MemoryPoint, ...] = ()


def chrome_trace(timelines: Iterable[Timeline]) -> str:
    """Return timelines in the Trace Event Format (JSON object form), one process a place.

    Source: "Trace Event Format", complete events `X`, counters `C`, metadata `M`; times in us.
    """
    events: list[dict[str, object]] = []
    process_ids: dict[str, int] = {}
    for timeline in timelines:
        for span in timeline.spans:
            process = _process(process_ids, f"{timeline.origin} {span.place}", events)
            events.append(_complete(span, process))
        for point in timeline.memory:
            process = _process(process_ids, f"{timeline.origin} {point.place}", events)
            events.append(
                {
                    "ph": "C", "name": "memory", "pid": process, "tid": 0,
                    "ts": _us(point.at_s), "args": dict(point.held_bytes),
                }
            )  # fmt: skip
    return json.dumps({"displayTimeUnit": "ms", "traceEvents": events}, separators=(",", ":"))


def _process(known: dict[str, int], name: str, events: list[dict[str, object]]) -> int:
    if name not in known:
        known[name] = number = len(known) + 1
        events.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}})
        events.extend(
            {"ph": "M", "name": "thread_name", "pid": number, "tid": tid, "args": {"name": lane}}
            for tid, lane in enumerate(LANES, 1)
        )
    return known[name]


def _complete(span: Span, process: int) -> dict[str, object]:
    event: dict[str, object] = {
        "ph": "X", "name": span.name, "cat": span.lane, "pid": process,
        "tid": LANES.index(span.lane) + 1, "ts": _us(span.start_s),
        "dur": _us(span.end_s - span.start_s),
    }  # fmt: skip
    return event if span.n_bytes is None else event | {"args": {"bytes": span.n_bytes}}


def _us(seconds: float) -> float:
    return round(seconds * 1e6, 3)
