"""Ways to run a model: settings times placements, each with its stages, tiers and forecast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from devices.topology import Topology
from edgert.errors import CapacityError, PlanError
from partition.build_problem import Built, Overheads, Place, build_problem
from partition.forecast import StageForecast, forecast_stage, misses
from partition.goal import Goal
from partition.language_workload import LanguageWorkload, TensorWork
from partition.manifest import CacheType, TensorShare, Tiers
from partition.popularity import Popularity
from partition.problem import Metric, Placement, Rejection, StageChoice
from partition.runtime_memory import (
    ContextShape,
    buffer_bytes,
    context_bytes,
    scratch_bytes,
    vocabulary_bytes,
)
from partition.search import search
from partition.stage_tiers import (
    StageWeights,
    cached_tiers,
    choose_tiers,
    page_bytes,
    resident_tiers,
    stage_weights,
    staging_bytes,
    window_estimate,
)
from partition.units import LanguageGoal, Unit, UnitChain, Work, language_units

_THREADS = 16  # at most; each has a few hundred KB of attention scratch
_MOST_ROWS_BYTES = 8 << 20  # looked-up rows that are kept, edgert/weights/rows.py
_START_S = 0.3  # headers, vocabulary, context; measured with the embedded model
_REPACK_BYTES_PER_S = 1.9e9  # two threads of ggml's repacking; measured with 3.8 GB


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds for all stages of a candidate."""

    n_ubatch: int
    cache_type: CacheType


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
    workload: LanguageWorkload, topology: Topology, goal: Goal, popularity: Popularity
) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    """Find the best placement for every setting.

    Returns:
        What is possible, in order of the settings, and why the others are not.
    """
    found: list[Candidate] = []
    rejected: list[Rejection] = []
    for setting in settings(goal):
        chain = language_units(workload, language_goal_of(goal, setting), popularity)
        if "expert_cache" not in goal.abilities:
            chain = without_cache(chain)
        if len(topology.hosts) > 1 and "logits" not in goal.may_leave:
            chain = with_head_first(chain)
        overheads = overheads_of(workload, goal, setting)
        built = build_problem(chain, topology, goal, overheads)
        rejected += [reason for reason in built.left_out if reason not in rejected]
        label = f"ubatch {setting.n_ubatch}, {setting.cache_type} KV"
        if not built.places:
            continue
        try:
            placement = search(built.problem)
            found.append(materialise(workload, chain, built, placement, (goal, setting)))
        except (PlanError, CapacityError) as error:
            rejected.append(Rejection(label, error.message))
    return tuple(found), tuple(rejected)


def without_cache(chain: UnitChain) -> UnitChain:
    """Return the chain for a runtime that streams stacks of experts whole."""
    units = tuple(replace(unit, weight_bytes=(unit.total_weight_bytes,)) for unit in chain.units)
    return UnitChain((1.0,), units, chain.activation_bytes)


def with_head_first(chain: UnitChain) -> UnitChain:
    """Return the chain with the output head in its first unit, which stays at home.

    Then logits never leave: the last stage sends its hidden states back to the first one.
    """
    first, head = chain.units[0], chain.units[-1]
    both = replace(
        first,
        name=f"{first.name} and {head.name}",
        weight_bytes=tuple(
            one + other for one, other in zip(first.weight_bytes, head.weight_bytes, strict=True)
        ),
        kept_bytes=first.kept_bytes + head.kept_bytes,
        lookup_bytes=first.lookup_bytes + head.lookup_bytes,
        decode=_together(first.decode, head.decode),
        prefill=_together(first.prefill, head.prefill),
        n_products=first.n_products + head.n_products,
    )
    return UnitChain(chain.reads, (both, *chain.units[1:-1]), chain.activation_bytes[:-1])


def _together(one: Work, other: Work) -> Work:
    """Return the work of two units that are placed as one."""
    types = sorted({*one.flops, *other.flops, *one.read_bytes, *other.read_bytes})
    return replace(
        one,
        flops={t: one.flops.get(t, 0.0) + other.flops.get(t, 0.0) for t in types},
        read_bytes={t: one.read_bytes.get(t, 0.0) + other.read_bytes.get(t, 0.0) for t in types},
        other_flops=one.other_flops + other.other_flops,
    )


def settings(goal: Goal) -> Iterator[Setting]:
    """List micro-batches and cache types to try."""
    sizes = [size for size in goal.ubatches if size <= goal.n_prompt] or [min(goal.ubatches)]
    for cache_type in goal.cache_types:
        for n_ubatch in sizes:
            yield Setting(min(n_ubatch, goal.n_ctx), cache_type)


def overheads_of(workload: LanguageWorkload, goal: Goal, setting: Setting) -> Overheads:
    """Count memory besides weights and cache for a stage that holds the whole model."""
    every = stage_weights(workload, 0, len(workload.run_layers), head=True)
    sizes = [tensor.size_bytes for tensor in every.whole]
    kind = setting.cache_type
    context = ContextShape(goal.n_ctx, setting.n_ubatch, goal.n_logits_max, kind, kind)
    buffers = buffer_bytes(workload, context) + scratch_bytes(workload, context, _THREADS)
    rows = sum(_rows_bytes(tensor, goal.n_ctx) for tensor in every.looked_up)
    return Overheads(
        buffer_bytes=buffers,
        program_bytes=context_bytes(workload, context) + vocabulary_bytes(workload) + rows,
        window_bytes=window_estimate(sorted(sizes)[: -2 or None]) if len(sizes) > 2 else sum(sizes),
        staging_bytes=staging_bytes(every),
    )


def materialise(
    workload: LanguageWorkload,
    chain: UnitChain,
    built: Built,
    placement: Placement,
    ask: tuple[Goal, Setting],
) -> Candidate:
    """Name every tensor of a placement and forecast it.

    Raises:
        CapacityError: the bytes the search found do not hold the tensors as they are cut.
    """
    goal, setting = ask
    stages = [
        _stage(workload, chain, built, (choice, placement), ask) for choice in placement.stages
    ]
    devices = [choice.device for choice in placement.stages]
    problem = built.problem
    hops = [problem.first_hops[devices[0]], problem.last_hops[devices[-1]]]
    hops += [problem.hops[pair] for pair in pairwise(devices)]
    known = [hop for hop in hops if hop is not None]
    return Candidate(
        setting=setting,
        stages=tuple(stages),
        hops_decode_s=sum(hop.decode_s for hop in known),
        hops_prefill_s=sum(hop.prefill_s for hop in known),
        sent_bytes=sum(hop.sent_bytes for hop in known),
        tokens_per_pass=goal.tokens_per_pass,
    )


def language_goal_of(goal: Goal, setting: Setting) -> LanguageGoal:
    """Return what the model's units are counted for."""
    return LanguageGoal(
        goal.n_prompt, goal.n_ctx, setting.n_ubatch, setting.cache_type, setting.cache_type,
        n_seen=goal.n_prompt,
    )  # fmt: skip


def _rows_bytes(tensor: TensorWork, n_ctx: int) -> int:
    """Return the most memory that looked-up rows of a table take: two pages for each token."""
    row_bytes = tensor.size_bytes // max(1, tensor.shape[-1])
    return min(_MOST_ROWS_BYTES, n_ctx * page_bytes(row_bytes))


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
    return _START_S + max(read_s, repack_s)


def _stage(
    workload: LanguageWorkload,
    chain: UnitChain,
    built: Built,
    chosen: tuple[StageChoice, Placement],
    ask: tuple[Goal, Setting],
) -> StagePlan:
    goal, setting = ask
    choice, _ = chosen
    place = built.places[choice.device]
    units = chain.units[choice.first : choice.end]
    n_layers = len(workload.run_layers)
    folded = len(chain.units) == n_layers
    head = choice.first == 0 if folded else choice.end > n_layers
    end_layer = min(choice.end, n_layers)
    weights = stage_weights(workload, choice.first, end_layer, head)
    kv_bytes = sum(unit.kept_bytes for unit in units)
    overheads = overheads_of(workload, goal, setting)
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
        return resident_tiers(weights)
    if len(built.problem.reads) > 1 and any(sum(unit.weight_bytes[1:]) for unit in units):
        return cached_tiers(weights, available)
    return choose_tiers(weights, available)[0]
