"""What a person asks of a plan: what to minimise, under which ceilings, what is permitted."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from edgert.errors import ConfigError
from partition.manifest import RUNTIME_ABILITIES, Ability, CacheType
from partition.problem import METRICS, Metric

ALL_ABILITIES: frozenset[Ability] = RUNTIME_ABILITIES | {
    "pipeline", "tensor_parallel", "accelerator", "edge_cloud", "onnx", "vocabulary_shards",
}  # fmt: skip

LARGEST_CONTEXT = 1 << 24
_UBATCHES = (512, 256, 128, 64, 32)


@dataclass(frozen=True, slots=True)
class Stay:
    """Layers [first, end) that must stay on a host."""

    first: int
    end: int
    host_id: str


@dataclass(frozen=True, slots=True)
class Goal:
    """The request that a plan answers.

    Attributes:
        n_prompt: Tokens of the prompt that TTFT is for; decode sees them and what follows.
        n_ctx: Positions of the KV cache.
        minimise: What to make smallest.
        ceilings: Most of other metrics.
        cache_types: KV types that may be used, in order of preference; all but f16 lose precision.
        ubatches: Tokens computed at once that are tried; none above the prompt.
        abilities: What the runtime may be asked to do.
        may_leave: What may leave the home host; hidden states must be named for a split over hosts.
        stays: Layers that must be on a host.
        tokens_per_pass: Tokens that speculation makes of one pass; 1 without.
        n_drafted: Tokens that one pass verifies beside the last one.
        draft: Where drafts come from.
        ttft_slack: How much slower than the best decode a plan may be for a faster prefill.
    """

    n_prompt: int = 128
    n_ctx: int = 4096
    minimise: Metric = "tpot_s"
    ceilings: Mapping[Metric, float] = field(default_factory=dict)
    cache_types: tuple[CacheType, ...] = ("f16",)
    ubatches: tuple[int, ...] = _UBATCHES
    abilities: frozenset[Ability] = RUNTIME_ABILITIES
    may_leave: tuple[str, ...] = ()
    stays: tuple[Stay, ...] = ()
    tokens_per_pass: float = 1.0
    n_drafted: int = 0
    draft: str = "none"
    ttft_slack: float = 0.02

    @property
    def n_logits_max(self) -> int:
        """Tokens of a batch that want logits: the last one, and all that were drafted."""
        return 1 + self.n_drafted

    def checked(self) -> Goal:
        """Return self after checking every range and contradiction.

        Raises:
            ConfigError: names the field, its value and the rule.
        """
        for name, value, most in (
            ("n_prompt", self.n_prompt, self.n_ctx),
            ("n_ctx", self.n_ctx, LARGEST_CONTEXT),
        ):
            if not 1 <= value <= most:
                raise ConfigError(f"$.goal.{name}: {value}, wanted 1 to {most}")
        if not 1.0 <= self.tokens_per_pass <= self.n_drafted + 1:
            raise ConfigError(
                f"$.goal.tokens_per_pass: {self.tokens_per_pass}, wanted 1 to one more than the "
                f"{self.n_drafted} drafted tokens"
            )
        if self.draft == "none" and self.tokens_per_pass != 1.0:
            raise ConfigError(
                f"$.goal.tokens_per_pass: {self.tokens_per_pass}, wanted 1 without drafts"
            )
        if self.n_drafted >= self.n_ctx:
            raise ConfigError(
                f"$.goal.n_drafted: {self.n_drafted}, a context of {self.n_ctx} positions verifies "
                f"{self.n_ctx - 1} at most"
            )
        for metric, ceiling in self.ceilings.items():
            least_is_fine = metric == "sent_bytes" and ceiling == 0
            if metric not in METRICS or not (ceiling > 0 or least_is_fine):
                raise ConfigError(f"$.goal.ceilings.{metric}: {ceiling}, wanted more than 0")
        for stay in self.stays:
            if not 0 <= stay.first < stay.end:
                raise ConfigError(f"$.goal.stays: layers {stay.first}..{stay.end} are no range")
        self._check_stays()
        return self

    def _check_stays(self) -> None:
        ordered = sorted(self.stays, key=lambda stay: (stay.first, stay.end))
        for one, other in itertools.pairwise(ordered):
            if other.first < one.end and one.host_id != other.host_id:
                raise ConfigError(
                    f"$.goal.stays: layer {other.first} must stay on {one.host_id} and on "
                    f"{other.host_id}",
                    hint="remove one of the two --stay",
                )
