"""One stage of a candidate, down to the tensor: where its weights live, what it takes."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from edgert.errors import CapacityError
from partition.build_problem import Built, Place
from partition.cached_tiers import CachedStage, cached_stage, expert_stacks, without_experts
from partition.expert_misses import misses
from partition.forecast import REPACK_BYTES_PER_S, StageForecast, forecast_stage
from partition.language_workload import LanguageWorkload
from partition.manifest import NESTED_PREFIX, TensorShare, Tiers
from partition.problem import TIE_SHARE, Placement, StageChoice
from partition.settings import Prepared
from partition.stage_tiers import (
    StageWeights,
    choose_tiers,
    resident_tiers,
    stage_weights,
    staging_bytes,
)

_START_S = 0.08  # headers, vocabulary, context
_CLEAR_BYTES_PER_S = 0.6e9  # the KV cache is cleared page by page; measured with 2 GB
_REPACKERS = 2


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
        working_bytes: What working with a cache of experts takes besides it.
        host_bytes: Of `fixed_bytes`, what is in its host's memory instead of the device's own.
        share: Its part of every layer, which other hosts compute with it; None for all of it.
        source: Name of the file that its weights are of, where there are several.
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
    host_bytes: int = 0
    working_bytes: int = 0
    source: str = ""

    @property
    def load_s(self) -> float:
        """Seconds before the first prompt: clearing the cache, reading, or repacking if slower."""
        flash = self.place.host.flash
        read_s = self.forecast.load_bytes / flash.streaming.value if flash is not None else 0.0
        repacked = self.tiers.layout == "repacked"
        rate = _REPACKERS * REPACK_BYTES_PER_S
        repack_s = self.forecast.load_bytes / rate if repacked else 0.0
        return _START_S + self.kv_bytes / _CLEAR_BYTES_PER_S + max(read_s, repack_s)

    @property
    def is_nested(self) -> bool:
        """Whether experts of it are nested."""
        return any(tensor.type_name.startswith(NESTED_PREFIX) for tensor in self.weights.whole)

    @property
    def cache_bytes(self) -> int:
        """Memory of the cache of experts, 0 without one."""
        return self.tiers.experts.cache_bytes if self.tiers.experts is not None else 0

    @property
    def staging_bytes(self) -> int:
        """What repacking takes while what stays is loaded."""
        kept = without_experts(self.weights) if self.tiers.cached else self.weights
        return staging_bytes(kept) if self.tiers.layout == "repacked" else 0

    @property
    def peak_bytes(self) -> int:
        """Most memory of the stage, loading included."""
        # Repacking ends before the compute buffers are touched and experts come.
        later = self.buffer_bytes + self.cache_bytes + self.working_bytes
        later = max(later, self.staging_bytes)
        held_bytes = self.forecast.held_bytes - self.cache_bytes
        return self.fixed_bytes - self.buffer_bytes + later + self.kv_bytes + held_bytes


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
    choice, placement = chosen
    place = built.places[choice.device]
    units = chain.units[choice.first : choice.end]
    n_layers = len(workload.run_layers)
    folded = len(chain.units) == n_layers
    head = choice.first == 0 if folded else choice.end > n_layers
    end_layer = min(choice.end, n_layers)
    weights = stage_weights(workload, choice.first, end_layer, head)
    kv_bytes = sum(unit.kept_bytes for unit in units)
    program_bytes = _program_bytes(built, placement, choice, overheads.program_bytes)
    host_bytes = program_bytes if place.elsewhere else 0
    fixed_bytes = overheads.buffer_bytes + program_bytes
    room = _room(chosen, built, fixed_bytes - host_bytes + kv_bytes, spare)
    tiers, working_bytes = _tiers(weights, chosen, built, room, overheads.n_tokens)
    missed = misses(chain, units, weights, tiers)
    return StagePlan(
        place=place, first_layer=choice.first, end_layer=end_layer, head=head, weights=weights,
        tiers=tiers, kv_bytes=kv_bytes, fixed_bytes=fixed_bytes,
        buffer_bytes=overheads.buffer_bytes,
        forecast=forecast_stage(place, units, weights, tiers, missed),
        host_bytes=host_bytes, working_bytes=working_bytes,
    )  # fmt: skip


def _program_bytes(
    built: Built, placement: Placement, choice: StageChoice, context_bytes: int
) -> int:
    """Return what a stage takes for the program itself, which a host runs once.

    The process is counted with the first stage on the host's processor, else with its first one;
    what a context takes with every stage in that memory.
    """
    place = built.places[choice.device]
    same = [
        stage for stage in placement.stages
        if built.places[stage.device].host.host_id == place.host.host_id
    ]  # fmt: skip
    on_processor = [stage for stage in same if not built.places[stage.device].elsewhere]
    if choice is (on_processor or same)[0]:
        return context_bytes + int(place.host.process_bytes.value)
    return 0 if place.elsewhere else context_bytes


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
    given = ceil(_given_bytes(choice, built) * (1 + (spare or 0.0)))
    return _Room(min(given, most) if alone else given, alone)


def _given_bytes(choice: StageChoice, built: Built) -> float:
    """Return what the search gave the weights of a stage, with the window if any stream."""
    memory = built.memory[choice.first : choice.end]
    held = choice.pinned_bytes + sum(built.window.floor_bytes(unit) for unit in memory)
    return held + (0 if _everything(choice, built) else built.window.n_bytes)


def _everything(choice: StageChoice, built: Built) -> bool:
    """Whether the search pinned all weights of a stage."""
    units = built.problem.devices[choice.device].units[choice.first : choice.end]
    free_bytes = sum(sum(unit.weight_bytes) for unit in units if unit is not None)
    return choice.pinned_bytes >= free_bytes * (1 - TIE_SHARE)


def _tiers(
    weights: StageWeights,
    chosen: tuple[StageChoice, Placement],
    built: Built,
    room: _Room,
    n_tokens: int,
) -> tuple[Tiers, int]:
    """Pin everything where the search did; else what the search gave this stage, cut at tensors.

    Returns:
        Where each weight lives, and what working with a cache takes besides it.

    Raises:
        CapacityError: the tensors do not fit, or would have to stream where nothing can.
    """
    choice, _ = chosen
    option, device = built.problem.devices[choice.device], built.places[choice.device].device
    # Repacking also needs looked-up tables whole, and staging areas while loading.
    whole_bytes = weights.every_bytes + staging_bytes(weights)
    fits = room.alone and whole_bytes <= room.available_bytes
    if _everything(choice, built) and (built.resident or fits):
        return resident_tiers(weights, repacked=device.kind == "cpu"), 0
    if len(built.problem.reads) > 1 and expert_stacks(weights):
        repacks = device.kind == "cpu"
        found = cached_stage(weights, room.available_bytes, n_tokens, repacks=repacks)
    else:
        found = CachedStage(choose_tiers(weights, room.available_bytes)[0], 0)
    tiers = found.tiers
    if (tiers.streamed or tiers.cached) and option.flash_bytes_per_s is None:
        raise CapacityError(
            f"weights take {weights.whole_bytes:,} bytes, {max(0, room.available_bytes):,} are "
            f"left for them on {option.name}, and nothing can stream there",
            needed_bytes=weights.whole_bytes,
            available_bytes=room.available_bytes,
        )
    return tiers, found.working_bytes
