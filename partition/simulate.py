"""A pass over the weights, event by event: reads ahead through a window, computing as they arrive.

The rules are those of the streamer (edgert/weights/streamer.py): weights are read in order of use,
one after another at the flash rate, as far ahead as the window has room; a weight's place is free
again when the node that reads it is done. Experts that are not in their cache are read when their
layer's router has chosen them (edgert/experts/streamer.py), all stacks of the layer at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from edgert.timeline import Span


@dataclass(frozen=True, slots=True)
class PassItem:
    """One weight in order of use.

    Attributes:
        name: The tensor.
        size_bytes: What a read of it moves.
        streamed: Whether it is read on every pass.
        compute_s: From its arrival to the next weight: its product and what follows.
        turn: The router that chooses what is read of it: those of a turn are read when the pass
            comes to the first of them, into places of their own. None for what is always read.
        ready_s: From the end of its read to its being ready, where it is repacked on the way in.
    """

    name: str
    size_bytes: int
    streamed: bool
    compute_s: float
    turn: int | None = None
    ready_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Passes:
    """What a sequence of passes took.

    Attributes:
        ends_s: End of each pass.
        stall_s: Waiting for flash, all passes.
        spans: Computing, reading, waiting.
    """

    ends_s: tuple[float, ...]
    stall_s: float
    spans: tuple[Span, ...]

    @property
    def steady_stall_s(self) -> float:
        """Seconds of the last pass that wait for flash."""
        began_s = self.ends_s[-1] - self.steady_s
        waits = [span for span in self.spans if span.lane == "wait" and span.start_s >= began_s]
        return sum(span.end_s - span.start_s for span in waits)

    @property
    def steady_s(self) -> float:
        """Seconds of the last pass: by then reads run ahead as they always will."""
        return self.ends_s[-1] - (self.ends_s[-2] if len(self.ends_s) > 1 else 0.0)


def simulate_passes(
    items: Sequence[PassItem],
    flash_bytes_per_s: float | None,
    window_bytes: int,
    n_passes: int = 3,
    place: str = "stage",
) -> Passes:
    """Run passes one after another, the window kept between them.

    Args:
        items: In order of use.
        flash_bytes_per_s: Rate of reads; None when nothing streams.
        window_bytes: Most bytes read and not yet released.
        n_passes: At least 2, so that the last one starts with a full window.
        place: Name of the stage in spans.

    Raises:
        ValueError: something streams without a flash rate, or is larger than the window.
    """
    moving = [item for item in items if item.streamed]
    streamed = [item for item in moving if item.turn is None]
    if moving and flash_bytes_per_s is None:
        raise ValueError("weights stream and there is no flash rate")
    if any(item.size_bytes > window_bytes for item in streamed):
        raise ValueError(f"a streamed weight is larger than the window of {window_bytes} bytes")
    reader = _Reader(streamed, flash_bytes_per_s or 1.0, window_bytes, n_passes, place)
    spans: list[Span] = []
    ends: list[float] = []
    now_s = stall_s = 0.0
    for _ in range(n_passes):
        turns: set[int | None] = {None}
        for item in items:
            if item.turn not in turns:
                turns.add(item.turn)
                reader.choose([one for one in moving if one.turn == item.turn], now_s)
            if item.streamed:
                arrived_s = reader.arrival() if item.turn is None else reader.chosen_arrival()
                if arrived_s > now_s:
                    spans.append(Span(place, "wait", item.name, now_s, arrived_s))
                    stall_s += arrived_s - now_s
                    now_s = arrived_s
            spans.append(Span(place, "compute", item.name, now_s, now_s + item.compute_s))
            now_s += item.compute_s
            if item.streamed and item.turn is None:
                reader.release(now_s)
        ends.append(now_s)
    return Passes(tuple(ends), stall_s, (*spans, *reader.spans))


class _Reader:
    """The reads of all passes, started as room allows."""

    def __init__(
        self,
        streamed: Sequence[PassItem],
        rate: float,
        window_bytes: int,
        n_passes: int,
        place: str,
    ) -> None:
        self._todo = deque(item for _ in range(n_passes) for item in streamed)
        self._rate = rate
        self._room_bytes = window_bytes
        self._place = place
        self._held: deque[tuple[int, float]] = deque()  # size and arrival, oldest first
        self._waiting: deque[float] = deque()
        self._chosen: deque[float] = deque()
        self._free_s = 0.0
        self.spans: list[Span] = []
        self._top_up(0.0)

    def arrival(self) -> float:
        """Return when the next weight in order is there."""
        return self._waiting.popleft()

    def choose(self, items: Sequence[PassItem], now_s: float) -> None:
        """Read what a router has just chosen, after what is being read."""
        for item in items:
            ends_s = self._read(item, now_s)
            self._chosen.append(ends_s + item.ready_s)

    def chosen_arrival(self) -> float:
        """Return when the next chosen weight in order is ready."""
        return self._chosen.popleft()

    def release(self, now_s: float) -> None:
        """Free the oldest weight's place and read further ahead."""
        size, _ = self._held.popleft()
        self._room_bytes += size
        self._top_up(now_s)

    def _top_up(self, now_s: float) -> None:
        while self._todo and self._todo[0].size_bytes <= self._room_bytes:
            item = self._todo.popleft()
            self._room_bytes -= item.size_bytes
            ends_s = self._read(item, now_s)
            self._held.append((item.size_bytes, ends_s))
            self._waiting.append(ends_s)

    def _read(self, item: PassItem, now_s: float) -> float:
        start_s = max(now_s, self._free_s)
        self._free_s = start_s + item.size_bytes / self._rate
        span = Span(self._place, "flash", item.name, start_s, self._free_s, item.size_bytes)
        self.spans.append(span)
        return self._free_s
