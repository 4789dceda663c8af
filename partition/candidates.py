"""A complete way to run a model: its stages with their tiers, and what it costs by every metric."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

from partition.goal import Goal
from partition.manifest import Codec
from partition.nested_widths import width_words
from partition.problem import Metric
from partition.settings import Setting
from partition.stage_load import exceeds
from partition.stage_plan import StagePlan


@dataclass(frozen=True, slots=True)
class Split:
    """How hidden states get over the one cut between edge and cloud.

    Attributes:
        codec: How they are written.
        bound: Of the codec adaptive.
    """

    codec: Codec
    bound: float | None = None


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
        gap: By which share the metric of the goal could be lower at most: the search stopped early.
        split: Where the stages are one front and one back; None for any other way.
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
    gap: float = 0.0
    split: Split | None = None

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
        """Energy of a token; infinite where the power of a device is not known."""
        energy_j = 0.0
        for stage in self.stages:
            power = stage.place.device.power_w
            energy_j += stage.forecast.decode.steady_s * (inf if power is None else power.value)
        return energy_j / self.tokens_per_pass

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
            layers += f" of {stage.source}" if stage.source else ""
            verb = _verb(stage)
            parts.append(f"{stage.place.name}{layers if len(self.stages) > 1 else ''} {verb}")
        parts += [f"{self.split.codec} between them"] if self.split is not None else []
        return f"{', '.join(parts)}, ubatch {self.setting.n_ubatch}, {self.setting.cache_type} KV"


def over_ceilings(candidate: Candidate, goal: Goal) -> list[Metric]:
    """Return the metrics in which a candidate is above what the goal allows."""
    return [m for m, most in goal.ceilings.items() if exceeds(candidate.of(m), most)]


def _verb(stage: StagePlan) -> str:
    tiers = stage.tiers
    if not tiers.cached or tiers.experts is None:
        return "streams" if tiers.streamed else "resident"
    verb = "streams and caches experts" if tiers.streamed else "caches experts"
    bits = width_words(tiers.experts.bits, tiers.experts.cuts)
    return f"{verb} in {bits} bits" if stage.is_nested else verb
