"""What a generation cost: tokens, seconds, bytes read, and how speculation did."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgert.receipt import Receipt

if TYPE_CHECKING:
    from edgert.llama.backend import ExpertCounters


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """One prompt and its answer.

    Attributes:
        n_prompt_tokens: Tokens of the whole prompt.
        n_prefilled_tokens: Those that were computed; the others were cached.
        prefill_s: Seconds until the prompt was processed.
        n_generated_tokens: Tokens of the answer, the end token not counted.
        decode_s: Seconds from the end of prefill to the last token.
        ttft_s: Seconds from the request to the first token.
        bytes_read: Weight bytes read during decode.
        stall_s: Seconds of decode spent waiting for flash.
        n_passes: Passes through the model during decode.
        n_drafted: Tokens proposed by speculation.
        n_accepted: Those that the model confirmed.
        n_rechecked: Passes spent on near ties (see `edgert.verification`).
        resident_weight_bytes: Weight bytes in memory.
        budget_bytes: Bound on the process, None without one.
        streaming: Whether weights moved during decode.
        experts: What routed experts did during decode, where they come and go.
        receipt: Which hosts were used, and what went to them for this reply.
    """

    n_prompt_tokens: int
    n_prefilled_tokens: int
    prefill_s: float
    n_generated_tokens: int
    decode_s: float
    ttft_s: float
    bytes_read: int
    stall_s: float
    n_passes: int
    n_drafted: int
    n_accepted: int
    n_rechecked: int
    resident_weight_bytes: int
    budget_bytes: int | None
    streaming: bool
    experts: ExpertCounters | None = None
    receipt: Receipt | None = None

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed per second, 0 when none were."""
        return self.n_prefilled_tokens / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens per second after the first, which belongs to prefill; 0 when there are none."""
        n_decoded = self.n_generated_tokens - 1
        return n_decoded / self.decode_s if n_decoded > 0 and self.decode_s > 0 else 0.0

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that one pass gives on average; above 1 only with speculation."""
        return (self.n_generated_tokens - 1) / self.n_passes if self.n_passes else 0.0

    @property
    def bytes_read_per_token(self) -> float:
        """Weight bytes read per decoded token."""
        return self.bytes_read / max(1, self.n_generated_tokens - 1)

    @property
    def stall_share(self) -> float:
        """Share of decode spent waiting for flash, 0 to 1."""
        return min(1.0, self.stall_s / self.decode_s) if self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """What an engine did since it was opened; `last` is the newest generation."""

    n_generations: int = 0
    n_prompt_tokens: int = 0
    n_generated_tokens: int = 0
    bytes_read: int = 0
    last: GenerationStats | None = None

    def plus(self, one: GenerationStats) -> Stats:
        """Return the totals after one more generation."""
        return Stats(
            self.n_generations + 1,
            self.n_prompt_tokens + one.n_prompt_tokens,
            self.n_generated_tokens + one.n_generated_tokens,
            self.bytes_read + one.bytes_read,
            one,
        )
