"""Every stage a chain could have, with the few pin choices among which an optimum always is.

Metrics are piecewise linear in what a stage leaves unpinned, so it is enough to look where their
slope changes, wherever a stage may have its memory for itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from partition.problem import DeviceOption, Problem, UnitCost
from partition.stage_load import TIE

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class StageTable:
    """Stages by device, first unit, end and pin choice.

    Attributes:
        possible: (n_devices, n_units + 1, n_units + 1, n_choices); where False the rest is 0.
        metrics: (n_metrics, *possible.shape), in the order of METRICS.
    """

    possible: NDArray[np.bool_]
    metrics: Floats


def stage_table(problem: Problem, capacities: Sequence[float] = ()) -> StageTable:
    """List the stages.

    Args:
        problem: What is asked.
        capacities: Most bytes of a stage on each device; the whole memory by default, which is a
            relaxation where others share it.
    """
    most = capacities or [problem.pool_bytes[device.pool] for device in problem.devices]
    columns = [
        _of_device(device, problem.reads, capacity)
        for device, capacity in zip(problem.devices, most, strict=True)
    ]
    possible = np.array([column[0] for column in columns])
    decode_s, prefill_s, memory_bytes = (
        np.where(possible, np.array([column[index] for column in columns]), 0.0)
        for index in (1, 2, 3)
    )
    power_w = np.array([device.power_w for device in problem.devices])
    energy_j = decode_s * power_w[:, None, None, None]
    sent_bytes = np.zeros_like(decode_s)
    return StageTable(possible, np.array((decode_s, prefill_s, memory_bytes, energy_j, sent_bytes)))


def _of_device(
    device: DeviceOption, reads: tuple[float, ...], capacity: float
) -> tuple[NDArray[np.bool_], Floats, Floats, Floats]:
    """Return possible, decode, prefill and memory, each (n_units + 1, n_units + 1, n_choices)."""
    nothing = UnitCost((0.0,) * len(reads), 0.0, 0.0, 0.0)
    units = [unit or nothing for unit in device.units]
    allowed = _between(np.array([[unit is None for unit in device.units]], dtype=float))[0] == 0
    first, end = np.indices(allowed.shape)
    allowed &= first < end
    # (n_classes, first, end), least read first
    weights = _between(np.array([unit.weight_bytes for unit in units]).T[::-1])
    kept, computed, prefilled = _between(
        np.array([(unit.kept_bytes, unit.decode_s, unit.prefill_s) for unit in units]).T
    )
    whole = weights.sum(axis=0)
    base = device.fixed_bytes + kept + whole
    fits = allowed & (base <= capacity * (1 + TIE))
    pinned = (fits[..., None], computed[..., None], prefilled[..., None], base[..., None])
    rate = device.flash_bytes_per_s or 1.0
    least = np.maximum(0.0, base + device.window_bytes - capacity)
    streams = allowed & (whole > 0) & (least <= whole * (1 + TIE) + TIE)
    streams &= bool(device.flash_bytes_per_s)
    least = np.minimum(least, whole)
    unpinned = _turning_points(weights, reads[::-1], computed * rate)
    swept = prefilled * rate / device.n_sweeps if device.n_sweeps else whole
    unpinned = np.concatenate((unpinned, [least, np.minimum(swept, whole)]))
    unpinned = np.clip(np.moveaxis(unpinned, 0, -1), least[..., None], whole[..., None])
    a_token = _token_bytes(weights, reads[::-1], unpinned)
    streamed = (
        np.broadcast_to(streams[..., None], unpinned.shape),
        np.maximum(computed[..., None], a_token / rate),
        np.maximum(prefilled[..., None], device.n_sweeps * unpinned / rate),
        base[..., None] + device.window_bytes - unpinned,
    )
    return _beside(pinned, streamed)


def _beside(
    pinned: tuple[NDArray[np.bool_], Floats, Floats, Floats],
    streamed: tuple[NDArray[np.bool_], Floats, Floats, Floats],
) -> tuple[NDArray[np.bool_], Floats, Floats, Floats]:
    return (
        np.concatenate((pinned[0], streamed[0]), axis=-1),
        np.concatenate((pinned[1], streamed[1]), axis=-1),
        np.concatenate((pinned[2], streamed[2]), axis=-1),
        np.concatenate((pinned[3], streamed[3]), axis=-1),
    )


def _between(values: Floats) -> Floats:
    """Sum (..., n_units) over every range: (..., first, end)."""
    sums = np.concatenate((np.zeros((*values.shape[:-1], 1)), values.cumsum(axis=-1)), axis=-1)
    difference: Floats = sums[..., None, :] - sums[..., :, None]
    return difference


def _turning_points(weights: Floats, reads: tuple[float, ...], hidden: Floats) -> Floats:
    """Return the ends of the classes, and where streaming a token stops hiding behind computing.

    Args:
        weights: (n_classes, first, end), least read first.
        reads: In the same order.
        hidden: (first, end), bytes a token may read for free.
    """
    ends = weights.cumsum(axis=0)
    free = np.zeros_like(hidden)
    before = np.zeros_like(hidden)
    for weight, read in zip(weights, reads, strict=True):
        room = (hidden - before) / read if read > 0 else weight
        free += np.clip(room, 0.0, weight)
        before = before + read * weight
    return np.concatenate((ends, free[None]))


def _token_bytes(weights: Floats, reads: tuple[float, ...], unpinned: Floats) -> Floats:
    """Return what a token streams, shaped as `unpinned` (first, end, n_choices)."""
    streamed = np.zeros_like(unpinned)
    start = np.zeros_like(weights[0])[..., None]
    for weight, read in zip(weights[..., None], reads, strict=True):
        streamed += read * np.clip(unpinned - start, 0.0, weight)
        start = start + weight
    return streamed
