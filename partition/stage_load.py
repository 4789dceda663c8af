"""What one stage costs, as numbers that add up, and how two placements are ranked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partition.problem import METRICS, Metric

Vector = tuple[float, ...]  # one number for each of METRICS
ZERO: Vector = (0.0,) * len(METRICS)
TPOT, TTFT, MEMORY, ENERGY, SENT = range(len(METRICS))

TIE = 1e-9  # relative difference below which two values count as equal


@dataclass(frozen=True, slots=True)
class StageLoad:
    """What one stage computes and holds; bytes, seconds and watts as in `Problem`.

    Attributes:
        pool: Index of the memory.
        weight_bytes: By class.
        base_bytes: What is there whatever is pinned.
        window_bytes: Needed as soon as anything streams.
        decode_s: Computing one token.
        prefill_s: Computing the prompt.
        flash_bytes_per_s: None when the stage cannot stream.
        n_sweeps: Over the weights in a prefill.
        power_w: While computing.
    """

    pool: int
    weight_bytes: tuple[float, ...]
    base_bytes: float
    window_bytes: float
    decode_s: float
    prefill_s: float
    flash_bytes_per_s: float | None
    n_sweeps: int
    power_w: float

    @property
    def can_stream(self) -> bool:
        """Whether there is something to stream, and from where."""
        return bool(self.flash_bytes_per_s) and sum(self.weight_bytes) > 0


def ranking(objective: Metric) -> tuple[int, ...]:
    """Return the metrics that decide, as indices: the objective, then speed, then memory."""
    first = METRICS.index(objective)
    return (first, *(index for index in (TPOT, TTFT, MEMORY) if index != first))


def precedes(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether `values` is lexicographically better, near-equal numbers counting as equal."""
    for value, other in zip(values, others, strict=True):
        if abs(value - other) > TIE * max(abs(value), abs(other)):
            return value < other
    return False


def exceeds(value: float, limit: float) -> bool:
    """Whether a limit is broken by more than rounding."""
    return value > limit + TIE * abs(limit)


def stage_metrics(load: StageLoad, reads: Sequence[float], unpinned_bytes: float) -> Vector:
    """Return what a stage costs when the least read `unpinned_bytes` stream."""
    left = unpinned_bytes
    token_bytes = 0.0
    for weight, read in zip(reversed(load.weight_bytes), reversed(reads), strict=True):
        token_bytes += read * min(weight, left)
        left -= min(weight, left)
    rate = load.flash_bytes_per_s or 1.0  # nothing is unpinned where there is no flash
    decode_s = max(load.decode_s, token_bytes / rate)
    prefill_s = max(load.prefill_s, load.n_sweeps * unpinned_bytes / rate)
    window_bytes = load.window_bytes if unpinned_bytes > 0 else 0.0
    memory_bytes = load.base_bytes + sum(load.weight_bytes) - unpinned_bytes + window_bytes
    return decode_s, prefill_s, memory_bytes, load.power_w * decode_s, 0.0


def total(vectors: Sequence[Vector]) -> Vector:
    """Add metrics up."""
    return tuple(map(sum, zip(*vectors, strict=True))) if vectors else ZERO
