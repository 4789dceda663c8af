"""Which bytes stages leave unpinned when ceilings tie all memories together.

A linear programme in which a stage that might stream has a share of its window; branching settles
the shares to none or all. The relaxation is tight: hardly any share is broken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from partition.linear_program import Floats, minimise
from partition.pool_pins import Piece, pieces_of, streaming_choices
from partition.problem import METRICS, Problem
from partition.stage_load import (
    MEMORY,
    TIE,
    TPOT,
    StageLoad,
    Vector,
    ranking,
    stage_metrics,
    total,
)

_WHOLE = 1e-7  # a share this close to none or all is that

Streams = tuple[bool | None, ...]  # whether each stage streams; None where it is not settled


@dataclass(frozen=True, slots=True)
class _Programme:
    """Columns are the pieces that may be unpinned, then the windows that are not settled.

    Attributes:
        base: Metrics with everything pinned and no open window.
        pieces: In the order of their columns.
        open_stages: In the order of their columns.
        prices: (n_metrics, n_columns).
        rows: (n_rows, n_columns).
        most: (n_rows,).
    """

    base: Vector
    pieces: tuple[Piece, ...]
    open_stages: tuple[int, ...]
    prices: Floats
    rows: Floats
    most: Floats

    def least(self, metric: int) -> tuple[float, Floats] | None:
        """Return the least value of a metric and the columns; None where nothing is possible."""
        prices = self.prices[metric]
        if not prices.size:
            return (self.base[metric], prices) if (self.most >= 0).all() else None
        scale = float(np.abs(prices).max()) or 1.0
        found = minimise(prices / scale, self.rows, self.most, np.ones(len(prices)))
        return None if found is None else (self.base[metric] + float(prices @ found), found)


def unpin_under_ceilings(
    problem: Problem, loads: Sequence[StageLoad], hops: Vector
) -> list[float] | None:
    """Choose the unpinned bytes of each stage; None where limits cannot hold together.

    The objective is least, then TPOT, TTFT and memory.
    """
    limits = {METRICS.index(metric): most for metric, most in problem.ceilings.items()}
    streams: Streams = tuple(_only(streaming_choices(load)) for load in loads)
    best = streams
    for metric in dict.fromkeys((METRICS.index(problem.objective), TPOT)):
        settled = _settle(problem, loads, hops, (limits, streams), metric)
        if settled is None:
            return None
        value, best = settled
        limits = {**limits, metric: min(value + TIE * abs(value), limits.get(metric, np.inf))}
    return _fine_tune(problem, loads, hops, (limits, best))


def _only(choices: tuple[bool, ...]) -> bool | None:
    return choices[0] if len(choices) == 1 else None


def _settle(
    problem: Problem,
    loads: Sequence[StageLoad],
    hops: Vector,
    given: tuple[Mapping[int, float], Streams],
    metric: int,
) -> tuple[float, Streams] | None:
    """Return the least value of a metric, and which stages stream then."""
    limits, streams = given
    best: tuple[float, Streams] | None = None
    stack = [streams]
    while stack:
        streams = stack.pop()
        programme = _programme(problem, loads, hops, (limits, streams))
        found = programme.least(metric)
        if found is None or (best is not None and found[0] >= best[0] - TIE * abs(best[0])):
            continue
        shares = found[1][len(programme.pieces) :]
        broken = np.minimum(shares, 1 - shares)
        if not broken.size or broken.max() <= _WHOLE:
            best = (found[0], _with(streams, programme.open_stages, shares))
            continue
        column = int(broken.argmax())
        stage = programme.open_stages[column]
        likely = bool(shares[column] > 0.5)
        stack += [_with(streams, (stage,), (not likely,)), _with(streams, (stage,), (likely,))]
    return best


def _with(streams: Streams, stages: Sequence[int], shares: Sequence[float] | Floats) -> Streams:
    changed = list(streams)
    for stage, share in zip(stages, shares, strict=True):
        changed[stage] = bool(share > 0.5)
    return tuple(changed)


def _programme(
    problem: Problem,
    loads: Sequence[StageLoad],
    hops: Vector,
    given: tuple[Mapping[int, float], Streams],
) -> _Programme:
    limits, streams = given
    pieces = tuple(
        piece
        for stage, load in enumerate(loads)
        if streams[stage] is not False
        for piece in pieces_of(load, problem.reads, stage)
    )
    open_stages = tuple(stage for stage, streaming in enumerate(streams) if streaming is None)
    base = [stage_metrics(load, problem.reads, 0.0) for load in loads]
    windows = [load.window_bytes if streams[k] else 0.0 for k, load in enumerate(loads)]
    prices = np.zeros((len(METRICS), len(pieces) + len(open_stages)))
    for column, piece in enumerate(pieces):
        prices[:, column] = np.array(piece.slopes) * piece.n_bytes
    for column, stage in enumerate(open_stages, len(pieces)):
        prices[MEMORY, column] = loads[stage].window_bytes
    owners = [*(piece.stage for piece in pieces), *open_stages]
    rows, most = [], []
    for pool in sorted({load.pool for load in loads}):
        inside = np.array([loads[stage].pool == pool for stage in owners], dtype=float)
        held = sum(
            base[k][MEMORY] + windows[k] for k, load in enumerate(loads) if load.pool == pool
        )
        scale = problem.pool_bytes[pool] or 1.0
        rows.append(prices[MEMORY] * inside / scale)
        most.append((problem.pool_bytes[pool] - held) / scale)
    everything = list(total((*base, hops)))
    everything[MEMORY] += sum(windows)
    for metric, limit in limits.items():
        scale = abs(limit) or 1.0
        rows.append(prices[metric] / scale)
        # Half of what `exceeds` forgives, or a ceiling at its own optimum would be out of reach.
        most.append((limit - everything[metric]) / scale + TIE / 2)
    links = _links(pieces, open_stages)
    return _Programme(
        base=tuple(everything),
        pieces=pieces,
        open_stages=open_stages,
        prices=prices,
        rows=np.vstack((*rows, links)),
        most=np.concatenate((most, np.zeros(len(links)))),
    )


def _links(pieces: Sequence[Piece], open_stages: Sequence[int]) -> Floats:
    """Allow no larger share of a piece than of the window it needs."""
    linked = [column for column, piece in enumerate(pieces) if piece.stage in open_stages]
    links = np.zeros((len(linked), len(pieces) + len(open_stages)))
    for row, column in enumerate(linked):
        links[row, column] = 1.0
        links[row, len(pieces) + open_stages.index(pieces[column].stage)] = -1.0
    return links


def _fine_tune(
    problem: Problem,
    loads: Sequence[StageLoad],
    hops: Vector,
    given: tuple[Mapping[int, float], Streams],
) -> list[float] | None:
    """Minimise the metrics one after the other, it being settled which stages stream."""
    limits, streams = given
    unpinned: list[float] | None = None
    for metric in ranking(problem.objective):
        programme = _programme(problem, loads, hops, (limits, streams))
        found = programme.least(metric)
        if found is None:
            break
        value, taken = found
        limits = {**limits, metric: min(value + TIE * abs(value), limits.get(metric, np.inf))}
        unpinned = [0.0] * len(loads)
        for piece, share in zip(programme.pieces, taken.tolist(), strict=True):
            unpinned[piece.stage] += piece.n_bytes * share
    if unpinned is None:
        return None
    return _keep_to_the_byte(problem, loads, streams, unpinned)


def _keep_to_the_byte(
    problem: Problem, loads: Sequence[StageLoad], streams: Streams, unpinned: list[float]
) -> list[float]:
    """Mend what the solver's tolerance takes too much of a memory."""
    for pool in {load.pool for load in loads}:
        inside = [stage for stage, load in enumerate(loads) if load.pool == pool]
        held = sum(
            loads[k].base_bytes + sum(loads[k].weight_bytes) - unpinned[k]
            + (loads[k].window_bytes if streams[k] else 0.0)
            for k in inside
        )  # fmt: skip
        left = held - problem.pool_bytes[pool]
        for stage in inside:
            if streams[stage] and left > 0:
                more = min(left, sum(loads[stage].weight_bytes) - unpinned[stage])
                unpinned[stage] += more
                left -= more
    return unpinned
