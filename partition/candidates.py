"""Ways to run a model: settings times placements, each with its stages, tiers and forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from devices.topology import Topology
from edgert.errors import CapacityError, PlanError
from partition.build_problem import Built, Place, build_problem
from partition.forecast import StageForecast, forecast_stage, misses
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.manifest import TensorShare, Tiers
from partition.problem import Metric, Placement, Rejection, StageChoice
from partition.search import search
from partition.settings import Prepared, Setting
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


@dataclass(frozen=True, slots=True)
class Candidate:
    """One complete way to run the model.

    Attributes:
        setting: Micro-batch and KV types.
        stages: In order of the chain; or, in parallel, by their shares, home first.
        hops_decode_s: Handing over, or the exchanges of parallel stages, one pass.
        hops_prefill_s: The same for the prompt.
        sent_bytes: Over links, one pass.
        tokens_per_pass: Tokens that a pass makes.
        parallel: Whether the stages share every layer instead of following each other.
        head_decode_s: While parallel stages without output head wait for it, one pass.
        head_prefill_s: The same for the prompt.
    """

    setting: Setting
    stages: tuple[StagePlan, ...]
    hops_decode_s: float
    hops_prefill_s: float
    sent_bytes: float
    tokens_per_pass: float
    parallel: bool = False
    head_decode_s: float = 0.0
    head_prefill_s: float = 0.0

    @property
    def tpot_s(self) -> float:
        """Seconds a token."""
        passes = [stage.forecast.decode.steady_s for stage in self.stages]
        together_s = self._together_s(passes, self.head_decode_s)
        return (together_s + self.hops_decode_s) / self.tokens_per_pass

    @property
    def ttft_s(self) -> float:
        """Seconds from the prompt to the first token."""
        prefills = [stage.forecast.prefill_s for stage in self.stages]
        return self._together_s(prefills, self.head_prefill_s) + self.hops_prefill_s

    def _together_s(self, seconds: Sequence[float], head_s: float) -> float:
        """Add up stages that follow each other; parallel ones wait for the slowest."""
        if not self.parallel:
            return sum(seconds)
        pairs = zip(self.stages, seconds, strict=True)
        return max(one_s if stage.head else one_s + head_s for stage, one_s in pairs)

    @property
    def load_s(self) -> float:
        """Seconds of reading before the prompt; hosts load at the same time."""
        return max(_load_s(stage) for stage in self.stages)

    @property
    def energy_j(self) -> float:
        """Energy of a token, of devices whose power is known."""
        return (
            sum(
                stage.forecast.decode.steady_s * stage.place.device.power_w.value
                for stage in self.stages
                if stage.place.device.power_w is not None
            )
            / self.tokens_per_pass
        )

    @property
    def peak_bytes(self) -> int:
        """Most memory of all stages together."""
        return sum(stage.peak_bytes for stage in self.stages)

    def of(self, metric: Metric) -> float:
        """Return one metric."""
        match metric:
            case "tpot_s":
                return self.tpot_s
            case "ttft_s":
                return self.ttft_s
            case "memory_bytes":
                return float(self.peak_bytes)
            case "energy_j":
                return self.energy_j
            case "sent_bytes":
                return self.sent_bytes / self.tokens_per_pass

    @property
    def heads(self) -> int:
        """Stages with an output head; several share the vocabulary."""
        return sum(stage.head for stage in self.stages)

    @property
    def name(self) -> str:
        """Name it for people: `host/cpu streams, ubatch 128, f16 cache`."""
        parts = []
        for stage in self.stages:
            layers = f" layers {stage.first_layer}..{stage.end_layer}"
            if stage.share is not None:
                share = stage.share
                layers = f" groups {share.first_group}..{share.end_group} of {share.n_groups}"
                layers += " and of the vocabulary" if self.heads > 1 else ""
            verb = _verb(stage.tiers)
            parts.append(f"{stage.place.name}{layers if len(self.stages) > 1 else ''} {verb}")
        return f"{', '.join(parts)}, ubatch {self.setting.n_ubatch}, {self.setting.cache_type} KV"


def candidates(
    workload: LanguageWorkload, topology: Topology, goal: Goal, prepared: Sequence[Prepared]
) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    """Find the best placement for every setting.

    Returns:
        What is possible, in order of the settings, and why the others are not.
    """
    found: list[Candidate] = []
    rejected: list[Rejection] = []
    for option in prepared:
        for resident in (False, True) if _n_devices(topology) > 1 else (False,):
            built = build_problem(option.chain, topology, goal, option.overheads, resident=resident)
            rejected += [reason for reason in built.left_out if reason not in rejected]
            if not built.places:
                continue
            try:
                placement = search(built.problem)
                found.append(materialise(workload, option, built, placement, goal))
            except (PlanError, CapacityError) as error:
                rejected.append(Rejection(_label(option.setting, resident), error.message))
    return tuple(found), tuple(rejected)


def _n_devices(topology: Topology) -> int:
    """Count devices; a single one that holds everything is among the baselines anyway."""
    return sum(len(host.devices) for host in topology.hosts)


def _label(setting: Setting, resident: bool) -> str:
    where = ", all in memory" if resident else ""
    return f"ubatch {setting.n_ubatch}, {setting.cache_type} KV{where}"


def materialise(
    workload: LanguageWorkload,
    prepared: Prepared,
    built: Built,
    placement: Placement,
    goal: Goal,
) -> Candidate:
    """Name every tensor of a placement and forecast it.

    Raises:
        CapacityError: the bytes the search found do not hold the tensors as they are cut.
    """
    stages = [_stage(workload, prepared, built, (choice, placement)) for choice in placement.stages]
    devices = [choice.device for choice in placement.stages]
    problem = built.problem
    hops = [problem.first_hops[devices[0]], problem.last_hops[devices[-1]]]
    hops += [problem.hops[pair] for pair in pairwise(devices)]
    known = [hop for hop in hops if hop is not None]
    return Candidate(
        setting=prepared.setting,
        stages=tuple(stages),
        hops_decode_s=sum(hop.decode_s for hop in known),
        hops_prefill_s=sum(hop.prefill_s for hop in known),
        sent_bytes=sum(hop.sent_bytes for hop in known),
        tokens_per_pass=goal.tokens_per_pass,
    )


def _verb(tiers: Tiers) -> str:
    if tiers.streamed:
        return "streams"
    return "caches experts" if tiers.cached else "resident"


def _load_s(stage: StagePlan) -> float:
    """Return the seconds of reading, or of repacking where that is slower."""
    flash = stage.place.host.flash
    read_s = stage.forecast.load_bytes / flash.streaming.value if flash is not None else 0.0
    repack_s = 0.0
    if stage.tiers.layout == "repacked":
        repack_s = stage.forecast.load_bytes / _REPACK_BYTES_PER_S
    return _START_S + stage.kv_bytes / _CLEAR_BYTES_PER_S + max(read_s, repack_s)


def _stage(
    workload: LanguageWorkload,
    prepared: Prepared,
    built: Built,
    chosen: tuple[StageChoice, Placement],
) -> StagePlan:
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
    tiers = _tiers(weights, chosen, built, fixed_bytes + kv_bytes, units)
    return StagePlan(
        place=place, first_layer=choice.first, end_layer=end_layer, head=head, weights=weights,
        tiers=tiers, kv_bytes=kv_bytes, fixed_bytes=fixed_bytes,
        buffer_bytes=overheads.buffer_bytes,
        forecast=forecast_stage(place, units, weights, tiers, misses(chain.reads, units, tiers)),
    )  # fmt: skip


def _tiers(
    weights: StageWeights,
    chosen: tuple[StageChoice, Placement],
    built: Built,
    other_bytes: int,
    units: Sequence[Unit],
) -> Tiers:
    """Pin everything where the search did; else what the search gave this stage, cut at tensors."""
    choice, placement = chosen
    devices = built.problem.devices
    option = devices[choice.device]
    alone = sum(devices[stage.device].pool == option.pool for stage in placement.stages) == 1
    available = int(choice.pinned_bytes + option.window_bytes)
    if alone:
        available = int(built.problem.pool_bytes[option.pool]) - other_bytes
    everything = choice.pinned_bytes >= sum(unit.total_weight_bytes for unit in units)
    # Repacking also needs looked-up tables whole, and staging areas while loading.
    if everything and (not alone or weights.every_bytes + staging_bytes(weights) <= available):
        return resident_tiers(weights, repacked=built.places[choice.device].device.kind == "cpu")
    if len(built.problem.reads) > 1 and any(sum(unit.weight_bytes[1:]) for unit in units):
        return cached_tiers(weights, available)
    return choose_tiers(weights, available)[0]
