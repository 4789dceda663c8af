"""What a generation gives: chunks of a stream, or one reply."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from edgert.receipt import Receipt
from edgert.sampling import TokenLogprob
from edgert.stats import GenerationStats

FinishReason = Literal["stop", "length", "cancelled"]
Logprobs = tuple[TokenLogprob, ...] | None


@dataclass(frozen=True, slots=True)
class Chunk:
    """Text that one pass added.

    Attributes:
        text: May be empty while a character or a possible stop string is incomplete.
        token_ids: Tokens of the pass; their text may come with a later chunk.
        logprobs: One per token when asked for, else None.
        finish_reason: Set in the last chunk: "stop" is an end token, a stop string or a complete
            grammar; "length" is `max_tokens` or the end of the context.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: Logprobs
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole answer; the fields are those of `Chunk`, put together."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    stats: GenerationStats
    logprobs: Logprobs = None

    @property
    def receipt(self) -> Receipt:
        """Which hosts made it, and the bytes that went to them and came back."""
        return self.stats.receipt or Receipt()


def collect(chunks: Sequence[Chunk], stats: GenerationStats) -> Reply:
    """Put the chunks of an exhausted stream together."""
    last = chunks[-1].finish_reason
    if last is None:
        raise ValueError("the stream is not exhausted")
    logprobs = [chunk.logprobs for chunk in chunks if chunk.logprobs is not None]
    return Reply(
        text="".join(chunk.text for chunk in chunks),
        token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
        finish_reason=last,
        stats=stats,
        logprobs=tuple(one for each in logprobs for one in each) if logprobs else None,
    )
