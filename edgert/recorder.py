"""Records what a run really did as a `Timeline`: reads, waits, passes, memory.

What is kept is bounded, to about 5 MB and 10 more while it is written: both count towards the
memory of the process.
"""

from __future__ import annotations

import threading
import time
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import overload

from edgert.llama.backend import Backend, ExpertCounts
from edgert.llama.buffer_log import BufferSizes
from edgert.observer import ReadWatch
from edgert.recorded_backend import RecordedBackend
from edgert.timeline import CounterPoint, Lane, MemoryPoint, Span, Timeline
from edgert.weights.memory import resident_bytes

Clock = Callable[[], float]

MOST_SPANS = 100_000
MOST_MEMORY_POINTS = 5_000

_NO_BYTES = -1  # in the array only; a span says None
_HELD = {"kv cache": ("KV", "RS"), "compute buffers": ("output", "compute")}


class Tape:
    """Spans and memory points from the moment it is made, the first so many of each.

    Args:
        clock: Gives seconds.
        most_spans: How many are kept; later ones are only counted.
    """

    def __init__(self, clock: Clock = time.perf_counter, most_spans: int = MOST_SPANS) -> None:
        self.clock = clock
        self._origin_s = clock()
        self._most_spans = most_spans
        self._lock = threading.Lock()
        self._labels: dict[tuple[str, Lane, str], int] = {}
        self._names: list[tuple[str, Lane, str]] = []
        self._label_of = array("I")
        self._starts_s, self._ends_s = array("d"), array("d")
        self._sizes = array("q")
        self._memory: list[MemoryPoint] = []
        self._experts: list[tuple[str, float, ExpertCounts]] = []
        self._n_cut = 0

    def add(self, span: Span) -> None:
        """Keep a span whose times are the clock's; callable from any thread."""
        with self._lock:
            if len(self._label_of) >= self._most_spans:
                self._n_cut += 1
                return
            label = (span.place, span.lane, span.name)
            number = self._labels.setdefault(label, len(self._labels))
            if number == len(self._names):
                self._names.append(label)
            self._label_of.append(number)
            self._starts_s.append(span.start_s)
            self._ends_s.append(span.end_s)
            self._sizes.append(_NO_BYTES if span.n_bytes is None else span.n_bytes)

    def add_memory(self, place: str, held_bytes: Mapping[str, int]) -> None:
        """Keep what is held now."""
        with self._lock:
            if len(self._memory) < MOST_MEMORY_POINTS:
                at_s = self.clock() - self._origin_s
                self._memory.append(MemoryPoint(place, at_s, dict(held_bytes)))

    def add_experts(self, place: str, counts: ExpertCounts) -> None:
        """Keep what routed experts did in a pass that ends now."""
        with self._lock:
            if len(self._experts) < MOST_MEMORY_POINTS:
                self._experts.append((place, self.clock() - self._origin_s, counts))

    def timeline(self) -> Timeline:
        """Return what was recorded so far, in order of start."""
        with self._lock:
            order = sorted(range(len(self._starts_s)), key=self._starts_s.__getitem__)
            spans = _Spans(self, array("I", order))
            counters = tuple(point for one in self._experts for point in _counters(*one))
            return Timeline("measured", spans, tuple(self._memory), self._n_cut, counters)

    def span(self, index: int) -> Span:
        """Return a span, by when it was added."""
        size = self._sizes[index]
        return Span(
            *self._names[self._label_of[index]], self._starts_s[index] - self._origin_s,
            self._ends_s[index] - self._origin_s, None if size == _NO_BYTES else size,
        )  # fmt: skip


class _Spans(Sequence[Span]):
    """Spans of a tape that are made when they are looked at: all at once take 40 times as much."""

    def __init__(self, tape: Tape, order: array[int]) -> None:
        self._tape, self._order = tape, order

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> Span: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Span]: ...

    def __getitem__(self, index: int | slice) -> Span | Sequence[Span]:
        if isinstance(index, slice):
            return _Spans(self._tape, self._order[index])
        return self._tape.span(self._order[index])


class Recorder:
    """The `RunObserver` that writes on a tape.

    Args:
        tape: Where everything goes; several recorders may share one.
        place: Which model, for people.
        finish: Called once the backend is closed.
    """

    def __init__(
        self, tape: Tape, place: str = "model", finish: Callable[[], None] = lambda: None
    ) -> None:
        self.tape = tape
        self.place = place
        self.finish = finish
        self._began_s = tape.clock()
        self._sizes = BufferSizes()
        self._experts = ExpertCounts()

    def beside(self, place: str) -> Recorder:
        """Return a recorder of another model on the same tape."""
        return Recorder(self.tape, place)

    def reading(self, name: str, n_bytes: int) -> ReadWatch:
        """Record a read from the moment when the first of it is being read."""
        return _Read(self, name, n_bytes)

    def waited(self, name: str, started_s: float, ended_s: float) -> None:
        """Record a wait."""
        self.add("wait", name, started_s, ended_s)

    def heard(self, line: str) -> None:
        """Take the sizes of KV cache and buffers from llama.cpp's log."""
        self._sizes.heard(line)

    def opened(self, backend: Backend) -> Backend:
        """Record that loading is over, and every pass of the backend that is returned."""
        self.add("compute", "load", self._began_s, self.tape.clock())
        self.remember(backend)
        return RecordedBackend(backend, self)

    def add(
        self, lane: Lane, name: str, started_s: float, ended_s: float, n_bytes: int | None = None
    ) -> None:
        """Record a span; times are the tape's clock's."""
        self.tape.add(Span(self.place, lane, name, started_s, ended_s, n_bytes))

    def remember(self, backend: Backend) -> None:
        """Record the memory held now, and what routed experts did since the last time."""
        counters = backend.counters()
        if counters.experts is not None:
            total = counters.experts.total
            if total != self._experts:
                self.tape.add_experts(self.place, total.plus(self._experts, -1))
            self._experts = total
        held = {
            "pinned": counters.pinned_bytes,
            "window": counters.resident_weight_bytes - counters.pinned_bytes,
            **{
                what: size
                for what, kinds in _HELD.items()
                if (size := self._sizes.bytes_of(*kinds))
            },
            "process": resident_bytes(),
        }
        self.tape.add_memory(self.place, held)


def _counters(place: str, at_s: float, counts: ExpertCounts) -> Iterator[CounterPoint]:
    """Make the tracks of a trace: parts of a track add up to what they are parts of."""
    hits = {"hit": counts.wanted - counts.missed, "missed": counts.missed}
    yield CounterPoint(place, at_s, "experts", hits)
    right, early = max(0, counts.saved_bytes), max(0, counts.early_bytes)
    read = {
        "needed": max(0, counts.bytes_read - early),
        "guessed": min(right, early),
        "guessed in vain": max(0, early - right),
    }
    yield CounterPoint(place, at_s, "expert bytes", read)
    yield CounterPoint(place, at_s, "expert stall", {"ms": 1e3 * counts.stall_s})
    if (bits := counts.bits_per_weight) is not None:
        yield CounterPoint(place, at_s, "expert bits", {"per weight": bits})


class _Read:
    """Watches one read for a recorder."""

    __slots__ = ("_n_bytes", "_name", "_recorder", "_started_s")

    def __init__(self, recorder: Recorder, name: str, n_bytes: int) -> None:
        self._recorder = recorder
        self._name = name
        self._n_bytes = n_bytes
        self._started_s: float | None = None

    def began(self) -> None:
        if self._started_s is None:
            self._started_s = self._recorder.tape.clock()

    def ended(self) -> None:
        ended_s = self._recorder.tape.clock()
        started_s = ended_s if self._started_s is None else self._started_s
        self._recorder.add("flash", self._name, started_s, ended_s, self._n_bytes)
