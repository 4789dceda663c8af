"""Ways to run a model: settings times placements, each with its stages, tiers and forecast."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from devices.topology import Topology
from edgert.errors import CapacityError, PlanError
from partition.build_problem import Built, build_problem
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.manifest import Tiers
from partition.problem import Metric, Placement, Rejection
from partition.search import search
from partition.settings import Prepared, Setting
from partition.stage_load import exceeds
from partition.stage_plan import StagePlan, plan_stage

# Tried in this order when the goal is little memory.
_SPARES = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)


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
        return max(stage.load_s for stage in self.stages)

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
                found.append(_cut(workload, option, built, placement, goal))
            except (PlanError, CapacityError) as error:
                rejected.append(Rejection(_label(option.setting, resident), error.message))
    return tuple(found), tuple(rejected)


def _cut(
    workload: LanguageWorkload,
    prepared: Prepared,
    built: Built,
    placement: Placement,
    goal: Goal,
) -> Candidate:
    """Cut a placement at tensors; where little memory is the goal, with as little as satisfies it.

    The search divides bytes, a plan whole tensors: at the very bytes that meet a ceiling the
    tensors may just miss it.

    Raises:
        CapacityError: tensors do not fit where their bytes did.
    """
    if goal.minimise != "memory_bytes":
        return materialise(workload, prepared, built, placement, goal)
    for spare in _SPARES:
        try:
            found = materialise(workload, prepared, built, placement, goal, spare)
        except CapacityError:
            continue  # the window of whole tensors is larger than that of their bytes
        if not over_ceilings(found, goal):
            return found
    return materialise(workload, prepared, built, placement, goal)


def over_ceilings(candidate: Candidate, goal: Goal) -> list[Metric]:
    """Return the metrics in which a candidate is above what the goal allows."""
    return [m for m, most in goal.ceilings.items() if exceeds(candidate.of(m), most)]


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
    spare: float | None = None,
) -> Candidate:
    """Name every tensor of a placement and forecast it.

    Args:
        workload: The model.
        prepared: Counted for the setting.
        built: The problem that the placement solves.
        placement: Its solution.
        goal: What is asked.
        spare: Memory of a stage beyond what the search gave it, as a share of that; None fills the
            memory of stages that have it to themselves.

    Raises:
        CapacityError: the bytes the search found do not hold the tensors as they are cut.
    """
    stages = [
        plan_stage(workload, prepared, built, (choice, placement), spare)
        for choice in placement.stages
    ]
    _check_pools(stages)
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


def _check_pools(stages: Sequence[StagePlan]) -> None:
    """Hold the peaks of whole tensors against each memory, stages that share it together."""
    peaks: dict[tuple[str, str], int] = {}
    for stage in stages:
        host, pool_id = stage.place.host, stage.place.device.pool_id
        key = (host.host_id, pool_id)
        peaks[key] = peaks.get(key, 0) + stage.peak_bytes
        available = host.pool(pool_id).available_bytes
        if peaks[key] > available:
            raise CapacityError(
                f"whole tensors take {peaks[key]:,} bytes of {host.host_id}'s {pool_id}, "
                f"{available:,} are there",
                needed_bytes=peaks[key],
                available_bytes=available,
            )


def _verb(tiers: Tiers) -> str:
    if tiers.streamed:
        return "streams"
    return "caches experts" if tiers.cached else "resident"
