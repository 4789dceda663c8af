"""The trace that timelines become: the Trace Event Format, threads that nest, what was cut."""

from __future__ import annotations

import itertools
import json

from hypothesis import given
from hypothesis import strategies as st

from edgert.timeline import MemoryPoint, Span, Timeline, chrome_trace, tracks

READS = (
    Span("a", "flash", "x", 0.0, 2.0, 10),
    Span("a", "flash", "y", 1.0, 3.0, 20),
    Span("a", "flash", "z", 2.0, 4.0, 30),
    Span("a", "compute", "token 0", 0.0, 4.0),
)


def events(*timelines: Timeline) -> list[dict[str, object]]:
    found = json.loads(chrome_trace(timelines))["traceEvents"]
    assert isinstance(found, list)
    return found


def test_overlapping_reads_are_on_threads_of_their_own_and_free_threads_are_used_again() -> None:
    assert tracks(READS) == [0, 1, 0, 0]
    found = events(Timeline("measured", READS))
    threads = {e["tid"]: e["args"] for e in found if e["name"] == "thread_name"}
    assert threads[6] == {"name": "flash 2"}
    assert [e["tid"] for e in found if e["ph"] == "X"] == [2, 6, 2, 1]


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=30))
def test_no_two_spans_of_a_thread_overlap(pairs: list[tuple[int, int]]) -> None:
    spans = [Span("a", "flash", "x", start, start + length) for start, length in pairs]
    placed = sorted(
        (track, span.start_s, span.end_s) for track, span in zip(tracks(spans), spans, strict=True)
    )
    for (track, _, end_s), (next_track, next_start_s, _) in itertools.pairwise(placed):
        assert track != next_track or end_s <= next_start_s


def test_predicted_and_measured_places_are_processes_side_by_side() -> None:
    memory = (MemoryPoint("a", 0.5, {"pinned": 7}),)
    found = events(Timeline("predicted", READS[:1]), Timeline("measured", READS[:1], memory))
    names = {e["pid"]: e["args"] for e in found if e["name"] == "process_name"}
    assert names == {1: {"name": "predicted a"}, 2: {"name": "measured a"}}
    (counter,) = (e for e in found if e["ph"] == "C")
    assert (counter["ts"], counter["args"], counter["pid"]) == (500_000.0, {"pinned": 7}, 2)


def test_trace_says_when_spans_are_missing() -> None:
    trace = json.loads(chrome_trace([Timeline("measured", READS, n_cut=3)]))
    assert "the last 3 spans are missing" in trace["otherData"]["cut"]
    assert "otherData" not in json.loads(chrome_trace([Timeline("measured", READS)]))
