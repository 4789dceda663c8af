"""Which bytes the stages of one memory leave unpinned: exact, cheapest first.

A stage either pins everything or streams, which costs a window. Given which stages stream, every
metric is convex and piecewise linear in the bytes a stage leaves unpinned.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from partition.stage_load import MEMORY, ZERO, StageLoad, Vector, precedes, stage_metrics, total


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes of a stage that can be left unpinned at a constant price per byte."""

    stage: int
    n_bytes: float
    slopes: Vector


@dataclass(frozen=True, slots=True)
class PoolCase:
    """Stages of one pool, it being settled which of them stream.

    Attributes:
        base: Metrics with everything pinned.
        pieces: What can be left unpinned; within a stage the prices ascend.
        need_bytes: What has to be.
    """

    base: Vector
    pieces: tuple[Piece, ...]
    need_bytes: float


def pool_cases(
    loads: Sequence[StageLoad], inside: Sequence[int], reads: Sequence[float], capacity: float
) -> Iterator[PoolCase]:
    """Yield every way of settling which stages stream.

    Args:
        loads: All stages.
        inside: Which of them take from the pool.
        reads: By weight class, as in `Problem`.
        capacity: Of the pool, in bytes.
    """
    choices = [streaming_choices(loads[index]) for index in inside]
    for streams in product(*choices):
        base = ZERO
        pieces: list[Piece] = []
        for index, streaming in zip(inside, streams, strict=True):
            load = loads[index]
            alone = list(stage_metrics(load, reads, 0.0))
            if streaming:
                alone[MEMORY] += load.window_bytes
                pieces += pieces_of(load, reads, index)
            base = total((base, tuple(alone)))
        yield PoolCase(base, tuple(pieces), max(0.0, base[MEMORY] - capacity))


def streaming_choices(load: StageLoad) -> tuple[bool, ...]:
    """Return whether a stage may pin everything (False) and whether it may stream (True)."""
    if not load.can_stream:
        return (False,)
    return (False, True) if load.window_bytes > 0 else (True,)


def pieces_of(load: StageLoad, reads: Sequence[float], stage: int) -> Iterator[Piece]:
    """Cut the weights where the price of one more unpinned byte changes, cheapest first."""
    rate = load.flash_bytes_per_s or 1.0
    free_prefill = load.prefill_s * rate / load.n_sweeps if load.n_sweeps else float("inf")
    free_decode = load.decode_s * rate  # token bytes that hide behind computing
    start = token_bytes = 0.0
    for weight, read in zip(reversed(load.weight_bytes), reversed(reads), strict=True):
        hidden = weight
        if read > 0:
            hidden = min(weight, max(0.0, (free_decode - token_bytes) / read))
        end = start + weight
        cuts = {start, start + hidden, min(max(free_prefill, start), end), end}
        edges = sorted(cuts)
        for low, high in pairwise(edges):
            decode = read / rate if low >= start + hidden else 0.0
            prefill = load.n_sweeps / rate if low >= free_prefill else 0.0
            yield Piece(stage, high - low, (decode, prefill, -1.0, load.power_w * decode, 0.0))
        start = end
        token_bytes += read * weight


def streamable_bytes(case: PoolCase) -> float:
    """Return the most that can be left unpinned."""
    return sum(piece.n_bytes for piece in case.pieces)


def fill(case: PoolCase, order: Sequence[int]) -> tuple[Vector, list[float]]:
    """Leave unpinned what pays, then what costs least until the pool is not exceeded.

    Lexicographic costs add up like numbers, so the greedy choice is exact for them too.

    Returns:
        The metrics, and the bytes taken of each piece.
    """
    prices = [tuple(piece.slopes[index] for index in order) for piece in case.pieces]
    free = tuple(0.0 for _ in order)
    taken = [0.0] * len(prices)
    left = case.need_bytes
    for index in sorted(range(len(prices)), key=prices.__getitem__):
        n_bytes = case.pieces[index].n_bytes
        taken[index] = n_bytes if prices[index] < free else min(n_bytes, max(0.0, left))
        left -= taken[index]
    metrics = tuple(
        start + sum(n * piece.slopes[m] for n, piece in zip(taken, case.pieces, strict=True))
        for m, start in enumerate(case.base)
    )
    return metrics, taken


def best_of(cases: Sequence[PoolCase], order: Sequence[int]) -> tuple[PoolCase, list[float]]:
    """Return the case whose metrics, in this order, are least, and the bytes of its pieces."""
    best: tuple[PoolCase, list[float]] | None = None
    best_ranks: Vector = ()
    for case in cases:
        metrics, taken = fill(case, order)
        ranks = tuple(metrics[index] for index in order)
        if best is None or precedes(ranks, best_ranks):
            best, best_ranks = (case, taken), ranks
    if best is None:
        raise ValueError("no case to choose from")
    return best
