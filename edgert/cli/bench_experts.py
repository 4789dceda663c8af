"""What routed experts did during a benchmark: pass by pass, by layer, and in all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from edgert.cli.opening import user_path
from edgert.llama.backend import ExpertCounters, ExpertCounts

if TYPE_CHECKING:
    from edgert.cli.bench_options import RoutingFlags
    from edgert.cli.command import Context
    from edgert.experts.routing_trace import RoutingTrace
    from edgert.llama.backend import Backend

MOST_PASSES = 1_000

Row = dict[str, object]


@contextmanager
def routing_trace(flags: RoutingFlags, context: Context) -> Iterator[RoutingTrace | None]:
    """Write what routers choose to the file that the flags name, however the run ends."""
    if flags.routing_trace is None:
        yield None
        return
    from edgert.experts.routing_trace import RoutingTrace

    trace = RoutingTrace(user_path(flags.routing_trace))
    try:
        yield trace
    finally:
        trace.close()
    if trace.n_cut:
        context.say(f"note: {trace.path} is full: the last {trace.n_cut:,} choices are missing")


class PassLog:
    """Keeps what experts did in each of the first passes.

    Args:
        backend: Whose.
        clock: Gives seconds; looking at counters takes some, which `spent_s` adds up.
    """

    def __init__(self, backend: Backend, clock: Callable[[], float]) -> None:
        self._backend = backend
        self._clock = clock
        self._begun = self._last = backend.counters().experts
        self.passes: list[ExpertCounts] = []
        self.spent_s = 0.0

    def note(self) -> None:
        """Take note of the pass that has just ended."""
        if self._last is None or len(self.passes) >= MOST_PASSES:
            return
        started_s = self._clock()
        now = self._backend.counters().experts
        if now is not None:
            self.passes.append(now.total.plus(self._last.total, -1))
            self._last = now
        self.spent_s += self._clock() - started_s

    def counters(self) -> ExpertCounters | None:
        """Return what experts did since the log was begun."""
        now = self._backend.counters().experts
        return None if now is None else now.since(self._begun)


def summary(
    counters: Sequence[ExpertCounters],
    passes: Sequence[ExpertCounts],
    n_tokens: int,
    seconds: float,
) -> Row:
    """Return the fields of a record; all of them None for a model without streamed experts.

    Args:
        counters: What experts did in each sample.
        passes: What they did in single passes.
        n_tokens: Tokens of all samples.
        seconds: In which they were computed.
    """
    total, by_layer = (
        ExpertCounts(),
        [ExpertCounts()] * (len(counters[0].by_layer) if counters else 0),
    )
    for one in counters:
        total = total.plus(one.total)
        by_layer = [a.plus(b) for a, b in zip(by_layer, one.by_layer, strict=True)]
    known = bool(counters)
    return {
        "expert_hit_rate": total.hit_rate,
        "expert_bytes_read_per_token": total.bytes_read / max(1, n_tokens) if known else None,
        "expert_bits_per_weight": total.bits_per_weight,
        "expert_stall_share": _share(total.stall_s, seconds) if known else None,
        "expert_early_bytes": total.early_bytes if known else None,
        "expert_saved_bytes": total.saved_bytes if known else None,
        "samples_experts_by_layer": [
            {"layer": layer, **_record(counts)}
            for layer, counts in zip(counters[0].layers if known else (), by_layer, strict=True)
        ],
        "samples_experts_by_pass": [_record(counts) for counts in passes[:MOST_PASSES]],
    }


def in_words(row: Row) -> str | None:
    """Describe a record's experts on one line; None where it has none."""
    if row["expert_hit_rate"] is None:
        return None
    values = {name: value for name, value in row.items() if isinstance(value, int | float)}
    bits = values.get("expert_bits_per_weight")
    return (
        f"experts: {100 * values['expert_hit_rate']:.1f} % hits, "
        f"{values['expert_bytes_read_per_token'] / 1e6:.1f} MB/token, "
        + ("" if bits is None else f"{bits:.1f} bits, ")
        + f"stalled {100 * values['expert_stall_share']:.0f} %, "
        f"{values['expert_saved_bytes'] / 1e6:.1f} of "
        f"{values['expert_early_bytes'] / 1e6:.1f} MB guessed were needed"
    )


def _record(counts: ExpertCounts) -> Row:
    return {
        "hit_rate": counts.hit_rate,
        "wanted": counts.wanted,
        "missed": counts.missed,
        "bytes_read": counts.bytes_read,
        "early_bytes": counts.early_bytes,
        "saved_bytes": counts.saved_bytes,
        "stall_ms": 1e3 * counts.stall_s,
        "bits_per_weight": counts.bits_per_weight,
    }


def _share(part_s: float, whole_s: float) -> float:
    return min(1.0, part_s / whole_s) if whole_s > 0 else 0.0
