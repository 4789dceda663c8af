"""An independent brute force for the planner's search: own placements, own simplex, own sums.

Nothing here calls the searches or their scoring. A stage's bytes are variables by weight class, so
what is pinned first is found out, not assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise, permutations, product
from math import inf

import numpy as np
from numpy.typing import NDArray

from partition.problem import METRICS, Metric, Placement, Problem, Score

Floats = NDArray[np.float64]


def simplex(costs: Floats, rows: Floats, most: Floats) -> float | None:
    """Least costs @ x under rows @ x <= most, x >= 0, by Bland's rule; None if there is no x."""
    m, n = rows.shape
    table = np.zeros((m + 1, n + m + 2))
    table[:m, :n], table[:m, n : n + m], table[:m, -1] = rows, np.eye(m), most
    table[:m, n + m] = -1.0  # the artificial variable of the first phase
    basis = list(range(n, n + m))
    if most.min() < 0:
        table[m, n + m] = 1.0
        _pivot(table, basis, int(most.argmin()), n + m)
        _run(table, basis, n + m + 1)
        if table[m, -1] < -1e-9:
            return None
        if n + m in basis:
            row = basis.index(n + m)
            _pivot(table, basis, row, int(np.abs(table[row, : n + m]).argmax()))
    table[m] = 0.0
    table[m, :n] = costs
    for row, column in enumerate(basis):
        table[m] -= table[m, column] * table[row]
    _run(table, basis, n + m)
    return float(-table[m, -1])


def _run(table: Floats, basis: list[int], n_columns: int) -> None:
    while True:
        entering = np.flatnonzero(table[-1, :n_columns] < -1e-11)
        if not entering.size:
            return
        column = int(entering[0])
        ratios = np.full(len(basis), inf)
        positive = table[:-1, column] > 1e-11
        ratios[positive] = table[:-1, -1][positive] / table[:-1, column][positive]
        tied = np.flatnonzero(ratios <= ratios.min() + 1e-13)
        _pivot(table, basis, min(tied, key=lambda row: basis[row]), column)


def _pivot(table: Floats, basis: list[int], row: int, column: int) -> None:
    table[row] /= table[row, column]
    others = np.arange(len(table)) != row
    table[others] -= np.outer(table[others, column], table[row])
    basis[row] = column


def placements(problem: Problem) -> Iterator[tuple[tuple[int, int, int], ...]]:
    """Every chain of stages (device, first, end) that links and constraints allow."""
    for n_stages in range(1, len(problem.devices) + 1):
        for cuts in combinations(range(1, problem.n_units), n_stages - 1):
            edges = (0, *cuts, problem.n_units)
            for devices in permutations(range(len(problem.devices)), n_stages):
                stages = tuple((device, edges[i], edges[i + 1]) for i, device in enumerate(devices))
                if None not in _hops(problem, devices) and all(
                    None not in problem.devices[device].units[first:end]
                    for device, first, end in stages
                ):
                    yield stages


def _hops(problem: Problem, devices: Sequence[int]) -> list:
    inner = [problem.hops.get(pair) for pair in pairwise(devices)]
    return [problem.first_hops[devices[0]], *inner, problem.last_hops[devices[-1]]]


def best_value(problem: Problem) -> float | None:
    """The least value of the objective, None where nothing is possible."""
    best = inf
    for stages in placements(problem):
        choices = [
            (False,) if not problem.devices[device].flash_bytes_per_s else (False, True)
            for device, _, _ in stages
        ]
        for streams in product(*choices):
            if _at_least(problem, stages) < best:
                best = min(best, _least(problem, stages, streams))
    return None if best == inf else best


def _at_least(problem: Problem, stages: Sequence[tuple[int, int, int]]) -> float:
    """A bound without any memory: only for skipping what cannot be better."""
    if problem.objective == "memory_bytes":
        return -inf
    compute = {"tpot_s": 0.0, "ttft_s": 0.0, "energy_j": 0.0, "sent_bytes": -1.0}
    for device, first, end in stages:
        option = problem.devices[device]
        decode = sum(unit.decode_s for unit in option.units[first:end])
        compute["tpot_s"] += decode
        compute["ttft_s"] += sum(unit.prefill_s for unit in option.units[first:end])
        compute["energy_j"] += option.power_w * decode
    return compute[problem.objective]


def _least(
    problem: Problem, stages: Sequence[tuple[int, int, int]], streams: Sequence[bool]
) -> float:
    """One linear programme: variables unpinned by stage and class, then decode and prefill."""
    n_stages, n_classes = len(stages), len(problem.reads)
    scale = max(1.0, *problem.pool_bytes)  # bytes are counted in this
    n = n_stages * (n_classes + 2)
    metrics = {metric: np.zeros(n + 1) for metric in METRICS}  # the last entry is a constant
    pools = {pool: np.zeros(n + 1) for pool in range(len(problem.pool_bytes))}
    rows: list[Floats] = []
    for k, ((device, first, end), streaming) in enumerate(zip(stages, streams, strict=True)):
        option = problem.devices[device]
        units = option.units[first:end]
        weights = np.sum([unit.weight_bytes for unit in units], axis=0) / scale
        inside = slice(k * n_classes, (k + 1) * n_classes)
        decode, prefill = n_stages * n_classes + 2 * k, n_stages * n_classes + 2 * k + 1
        rows += [
            _row(n, {k * n_classes + c: 1.0}, weights[c] if streaming else 0.0)
            for c in range(n_classes)
        ]
        rows.append(_row(n, {decode: -1.0}, -sum(unit.decode_s for unit in units)))
        rows.append(_row(n, {prefill: -1.0}, -sum(unit.prefill_s for unit in units)))
        if streaming:
            a_token = _row(n, {decode: -1.0}, 0.0)
            a_token[inside] = np.array(problem.reads) * scale / option.flash_bytes_per_s
            a_prompt = _row(n, {prefill: -1.0}, 0.0)
            a_prompt[inside] = option.n_sweeps * scale / option.flash_bytes_per_s
            rows += [a_token, a_prompt]
        memory = _row(n, {}, option.fixed_bytes / scale + weights.sum())
        memory[-1] += sum(unit.kept_bytes for unit in units) / scale
        memory[-1] += option.window_bytes / scale if streaming else 0.0
        memory[inside] = -1.0
        pools[option.pool] += memory
        metrics["memory_bytes"] += memory * scale
        metrics["tpot_s"][decode] = 1.0
        metrics["ttft_s"][prefill] = 1.0
        metrics["energy_j"][decode] = option.power_w
    for hop in _hops(problem, [device for device, _, _ in stages]):
        metrics["tpot_s"][-1] += hop.decode_s
        metrics["ttft_s"][-1] += hop.prefill_s
        metrics["sent_bytes"][-1] += hop.sent_bytes
    for pool, row in pools.items():
        rows.append(_at_most(row, problem.pool_bytes[pool] / scale))
    for metric, ceiling in problem.ceilings.items():
        size = max(np.abs(metrics[metric]).max(), 1e-30)
        rows.append(_at_most(metrics[metric] / size, ceiling / size))
    table = np.array(rows)
    wanted = metrics[problem.objective]
    found = simplex(wanted[:-1], table[:, :-1], table[:, -1])
    return inf if found is None else found + float(wanted[-1])


def _row(n: int, entries: dict[int, float], last: float) -> Floats:
    row = np.zeros(n + 1)
    for column, value in entries.items():
        row[column] = value
    row[-1] = last
    return row


def _at_most(expression: Floats, limit: float) -> Floats:
    row = expression.copy()
    row[-1] = limit - expression[-1]
    return row


def recount(problem: Problem, placement: Placement) -> tuple[Score, list[float]]:
    """The score of a placement from its stages alone, and the bytes taken of each pool."""
    values: dict[Metric, float] = dict.fromkeys(METRICS, 0.0)
    pools = [0.0] * len(problem.pool_bytes)
    for stage in placement.stages:
        option = problem.devices[stage.device]
        units = option.units[stage.first : stage.end]
        pinned, a_token, unpinned = stage.pinned_bytes, 0.0, 0.0
        for c, read in enumerate(problem.reads):
            weight = sum(unit.weight_bytes[c] for unit in units)
            here = min(weight, pinned)
            pinned -= here
            unpinned += weight - here
            a_token += read * (weight - here)
        memory = option.fixed_bytes + sum(unit.kept_bytes for unit in units) + stage.pinned_bytes
        rate = option.flash_bytes_per_s or inf
        if unpinned > 1e-9 * stage.pinned_bytes:
            memory += option.window_bytes
        decode = max(sum(unit.decode_s for unit in units), a_token / rate)
        values["tpot_s"] += decode
        values["ttft_s"] += max(
            sum(unit.prefill_s for unit in units), option.n_sweeps * unpinned / rate
        )
        values["energy_j"] += option.power_w * decode
        values["memory_bytes"] += memory
        pools[option.pool] += memory
    for hop in _hops(problem, [stage.device for stage in placement.stages]):
        values["tpot_s"] += hop.decode_s
        values["ttft_s"] += hop.prefill_s
        values["sent_bytes"] += hop.sent_bytes
    return Score(**values), pools
