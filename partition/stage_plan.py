"""One stage of a candidate, down to the tensor: where its weights live, what it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from partition.build_problem import Built, Place
from partition.forecast import StageForecast, forecast_stage, misses
from partition.language_workload import LanguageWorkload
from partition.manifest import TensorShare, Tiers
from partition.problem import Placement, StageChoice
from partition.settings import Prepared
from partition.stage_tiers import (
    StageWeights,
    cached_tiers,
    choose_tiers,
    resident_tiers,
    stage_weights,
    staging_bytes,
)
from partition.units import Unit

_START_S = 0.08  # headers, vocabulary, context
_CLEAR_BYTES_PER_S = 0.6e9  # the KV cache is cleared page by page; measured with 2 GB
_REPACK_BYTES_PER_S = 1.9e9  # two threads of ggml's repacking; measured with 3.8 GB


@dataclass(frozen=True, slots=True)
class StagePlan:
    """Layers [first_layer, end_layer) on a device, down to the tensor.

    Attributes:
        place: Where.
        first_layer: First layer.
        end_layer: One past the last.
        head: Whether the output head is here.
        weights: Its tensors in order of use.
        tiers: Where each of them lives.
        kv_bytes: Its part of the KV cache.
        fixed_bytes: Program, compute buffers, vocabulary.
        buffer_bytes: The compute buffers among them.
        forecast: Seconds and bytes.
        share: Its part of every layer, which other hosts compute with it; None for all of it.
    """

    place: Place
    first_layer: int
    end_layer: int
    head: bool
    weights: StageWeights
    tiers: Tiers
    kv_bytes: int
    fixed_bytes: int
    buffer_bytes: int
    forecast: StageForecast
    share: TensorShare | None = None

    @property
    def load_s(self) -> float:
        """Seconds before the first prompt: clearing the cache, reading, or repacking if slower."""
        flash = self.place.host.flash
        read_s = self.forecast.load_bytes / flash.streaming.value if flash is not None else 0.0
        repacked = self.tiers.layout == "repacked"
        repack_s = self.forecast.load_bytes / _REPACK_BYTES_PER_S if repacked else 0.0
        return _START_S + self.kv_bytes / _CLEAR_BYTES_PER_S + max(read_s, repack_s)

    @property
    def peak_bytes(self) -> int:
        """Most memory of the stage, loading included."""
        loading = staging_bytes(self.weights) if self.tiers.layout == "repacked" else 0
        # Repacking ends before the compute buffers are touched.
        later = max(self.buffer_bytes, loading)
        return (
            self.fixed_bytes
            - self.buffer_bytes
            + later
            + self.kv_bytes
            + (self.forecast.held_bytes)
        )


def plan_stage(
    workload: LanguageWorkload,
    prepared: Prepared,
    built: Built,
    chosen: tuple[StageChoice, Placement],
    spare: float | None,
) -> StagePlan:
    """Cut one stage of a placement at tensors and forecast it; `spare` as in `materialise`.

    Raises:
        CapacityError: its tensors do not fit where their bytes did.
    """
    chain, overheads = prepared.chain, prepared.overheads
    choice, _ = chosen
    place = built.places[choice.device]
    units = chain.units[choice.first : choice.end]
    n_layers = len(workload.run_layers)
    folded = len(chain.units) == n_layers
    head = choice.first == 0 if folded else choice.end > n_layers
    end_layer = min(choice.end, n_layers)
    weights = stage_weights(workload, choice.first, end_layer, head)
    kv_bytes = sum(unit.kept_bytes for unit in units)
    fixed_bytes = overheads.buffer_bytes + overheads.program_bytes
    fixed_bytes += int(place.host.process_bytes.value) if place.device.kind == "cpu" else 0
    room = _room(chosen, built, fixed_bytes + kv_bytes, spare)
    tiers = _tiers(weights, chosen, built, room, units)
    return StagePlan(
        place=place, first_layer=choice.first, end_layer=end_layer, head=head, weights=weights,
        tiers=tiers, kv_bytes=kv_bytes, fixed_bytes=fixed_bytes,
        buffer_bytes=overheads.buffer_bytes,
        forecast=forecast_stage(place, units, weights, tiers, misses(chain.reads, units, tiers)),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Room:
    """Memory for weights, and whether the stage has its memory to itself."""

    available_bytes: int
    alone: bool


def _room(
    chosen: tuple[StageChoice, Placement], built: Built, other_bytes: int, spare: float | None
) -> _Room:
    choice, placement = chosen
    devices, option = built.problem.devices, built.problem.devices[choice.device]
    alone = sum(devices[stage.device].pool == option.pool for stage in placement.stages) == 1
    most = int(built.problem.pool_bytes[option.pool]) - other_bytes
    if alone and spare is None:
        return _Room(most, alone)
    given = int((choice.pinned_bytes + option.window_bytes) * (1 + (spare or 0.0)))
    return _Room(min(given, most) if alone else given, alone)


def _tiers(
    weights: StageWeights,
    chosen: tuple[StageChoice, Placement],
    built: Built,
    room: _Room,
    units: Sequence[Unit],
) -> Tiers:
    """Pin everything where the search did; else what the search gave this stage, cut at tensors."""
    choice, _ = chosen
    everything = choice.pinned_bytes >= sum(unit.total_weight_bytes for unit in units)
    # Repacking also needs looked-up tables whole, and staging areas while loading.
    whole_bytes = weights.every_bytes + staging_bytes(weights)
    if everything and (not room.alone or whole_bytes <= room.available_bytes):
        return resident_tiers(weights, repacked=built.places[choice.device].device.kind == "cpu")
    if len(built.problem.reads) > 1 and any(sum(unit.weight_bytes[1:]) for unit in units):
        return cached_tiers(weights, room.available_bytes)
    return choose_tiers(weights, room.available_bytes)[0]
