"""One generation: prefill, then passes that give one or more tokens each, until the end."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from edgert.errors import Cancelled, CapacityError, LinkError
from edgert.events import Listener, Notice, PrefillProgress
from edgert.llama.backend import Counters
from edgert.receipt import Receipt
from edgert.replies import Chunk, FinishReason
from edgert.sampling import Sampler, SamplingParams
from edgert.speculation import Speculation
from edgert.speculative import Draft
from edgert.stats import GenerationStats
from edgert.stops import TextStream
from edgert.token_cache import TokenCache
from edgert.verification import Verdict, verify

Overflow = Literal["error", "shift"]
Clock = Callable[[], float]

_HINT = "ask again: what was said is kept, and other hosts are asked anew"


@dataclass(frozen=True, slots=True)
class Request:
    """What to generate.

    Attributes:
        token_ids: The prompt, at least one token.
        params: How to choose tokens.
        max_tokens: Upper bound of the answer, None up to the context.
        stops: Strings that end the answer.
        n_keep: Leading tokens that a context shift keeps: BOS and the system prompt.
    """

    token_ids: tuple[int, ...]
    params: SamplingParams
    max_tokens: int | None
    stops: tuple[str, ...]
    n_keep: int


@dataclass(slots=True)
class _Tally:
    """Counts and moments of a generation; moments are of its clock."""

    start_s: float
    n_prompt_tokens: int
    n_prefilled_tokens: int = 0
    prefilled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float | None = None
    n_generated_tokens: int = 0
    n_passes: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    n_rechecked: int = 0
    counters: Counters | None = field(default=None)
    receipt: Receipt | None = None


class Generation:
    """Runs one request on a cache; `cancel` may be called from any thread.

    Args:
        cache: Left equal to the backend's KV cache whatever happens.
        request: What to generate.
        speculation: Drafts, None without.
        overflow: What to do when the context is full.
        listener: Gets prefill progress and notices.
        clock: Gives seconds; a parameter so that tests need no real time.
    """

    def __init__(
        self,
        cache: TokenCache,
        request: Request,
        speculation: Speculation | None,
        overflow: Overflow,
        listener: Listener,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._cache = cache
        self._backend = cache.backend
        self._request = request
        self._speculation = speculation
        self._overflow = overflow
        self._listener = listener
        self._cancelled = False
        self._guard = threading.RLock()  # a signal handler may cancel while this thread has it
        self._active = False
        self._text = TextStream(request.stops)
        self._finish: FinishReason | None = None
        self._last_token = 0
        self._said = ""
        self._tally = _Tally(self._clock(), len(request.token_ids))

    def cancel(self) -> None:
        """End the generation within one layer, or at its first step when it has not begun."""
        self._cancelled = True
        with self._guard:
            if self._active:
                self._backend.cancel()
                if self._speculation is not None:
                    self._speculation.cancel()

    def run(self) -> Iterator[Chunk]:
        """Yield chunks; the last one carries the finish reason."""
        vocab = self._backend.vocab
        self._tally.start_s = self._clock()
        self._tally.receipt = self._backend.counters().receipt
        prompt = fit_prompt(self._request, self._backend.n_ctx, self._overflow, self._listener)
        sampler = Sampler(self._request.params, vocab, prompt)
        with self._guard:
            self._active = True
        try:
            # Drafts are verified by how much whole rows differ.
            drafted = self._speculation is not None
            self._backend.expect(None if drafted else self._request.params.n_candidates)
            if self._speculation is not None:
                self._speculation.begin(self._request.params)
            verdict = self._prefill(prompt, sampler)
            while True:
                chunk = self._absorb(verdict)
                yield chunk
                if chunk.finish_reason is not None:
                    break
                verdict = self._pass(sampler)
        except Cancelled:
            yield self._last_chunk("cancelled")
        except LinkError as error:
            raise self._cut_off(error) from error
        finally:
            with self._guard:
                self._active = False
            sampler.close()
            # also after an error or an abandoned stream: what is cached is what is listed
            self._cache.rewind(len(self._cache.token_ids))

    def stats(self) -> GenerationStats:
        """Return what it cost so far."""
        tally, now = self._tally, self._backend.counters()
        begun = tally.counters or now
        prefilled_s = tally.prefilled_s or self._clock()
        first_s = tally.first_token_s or prefilled_s
        return GenerationStats(
            n_prompt_tokens=tally.n_prompt_tokens,
            n_prefilled_tokens=tally.n_prefilled_tokens,
            prefill_s=prefilled_s - tally.start_s,
            n_generated_tokens=tally.n_generated_tokens,
            decode_s=max(0.0, (tally.last_token_s or prefilled_s) - prefilled_s),
            ttft_s=first_s - tally.start_s,
            bytes_read=now.bytes_read - begun.bytes_read,
            stall_s=now.stall_s - begun.stall_s,
            n_passes=tally.n_passes,
            n_drafted=tally.n_drafted,
            n_accepted=tally.n_accepted,
            n_rechecked=tally.n_rechecked,
            resident_weight_bytes=now.resident_weight_bytes,
            budget_bytes=now.budget_bytes,
            streaming=now.streaming,
            experts=None if now.experts is None else now.experts.since(begun.experts),
            receipt=None if now.receipt is None else now.receipt.since(tally.receipt),
        )

    def _prefill(self, prompt: tuple[int, ...], sampler: Sampler) -> Verdict:
        self._raise_if_cancelled()
        n_cached = self._cache.shared(prompt)
        try:
            try:
                logits = self._cache.catch_up(prompt, self._progress)
            except Cancelled:
                self._raise_if_cancelled()
                # a cancellation that came too late for the generation before this one
                logits = self._cache.catch_up(prompt, self._progress)
        finally:  # when cancelled, what was computed until then
            self._tally.n_prefilled_tokens = max(0, len(self._cache.token_ids) - n_cached)
            self._tally.prefilled_s = self._clock()
            self._tally.counters = self._backend.counters()
        return verify(sampler, logits, Draft(), self._backend.vocab.is_eog)

    def _progress(self, done_tokens: int, total_tokens: int) -> None:
        self._listener(PrefillProgress(done_tokens, total_tokens))
        self._raise_if_cancelled()

    def _absorb(self, verdict: Verdict) -> Chunk:
        """Turn chosen tokens into text; sets the finish reason."""
        tally, vocab, text, taken = self._tally, self._backend.vocab, "", 0
        tally.last_token_s = self._clock()
        tally.first_token_s = tally.first_token_s or tally.last_token_s
        for chosen in verdict.chosen:
            if vocab.is_eog(chosen.token_id):
                self._finish = "stop"
                break
            taken += 1
            tally.n_generated_tokens += 1
            text += self._text.feed(vocab.piece(chosen.token_id))
            self._last_token = chosen.token_id
            if self._text.stopped:
                self._finish = "stop"
                break
            if tally.n_generated_tokens == self._request.max_tokens:
                self._finish = "length"
                break
        if self._finish is None and verdict.complete:
            self._finish = "stop"
        if self._finish is None and self._is_full() and self._overflow == "error":
            self._finish = "length"
        if self._finish is not None:
            text += self._text.finish()
        self._said += text
        kept = verdict.chosen[:taken]
        wanted = self._request.params.logprobs > 0
        logprobs = tuple(one.logprob for one in kept if one.logprob is not None)
        token_ids = tuple(one.token_id for one in kept)
        return Chunk(text, token_ids, logprobs if wanted else None, self._finish)

    def _pass(self, sampler: Sampler) -> Verdict:
        """Decode the last token with a draft and choose what follows."""
        self._raise_if_cancelled()
        if self._is_full():
            self._shift()
        cache, tally = self._cache, self._tally
        n_cached = len(cache.token_ids)
        draft = self._draft()
        start_s = self._clock()
        logits = cache.decode([self._last_token, *draft.token_ids], 1 + len(draft.token_ids))
        pass_s = self._clock() - start_s
        ties = self._speculation.ties.width if self._speculation is not None else 0.0
        verdict = verify(sampler, logits, draft, self._backend.vocab.is_eog, ties)
        batched = np.array(logits[verdict.n_accepted]) if verdict.near_tie else None
        cache.rewind(n_cached + 1 + verdict.n_accepted)
        tally.n_passes += 1
        tally.n_drafted += len(draft.token_ids)
        tally.n_accepted += verdict.n_accepted
        if batched is not None:
            verdict = self._recheck(sampler, verdict, batched)
        if self._speculation is not None:
            n_verified = verdict.n_accepted if batched is not None else len(draft.token_ids)
            first = verdict.chosen[0].token_id if verdict.chosen else None
            self._speculation.observe(pass_s, n_verified, verdict.n_accepted, first)
        return verdict

    def _draft(self) -> Draft:
        if self._speculation is not None and not self._cache.can_rewind:
            self._listener(Notice("speculation is off: this model cannot forget single tokens"))
            self._speculation = None
        if self._speculation is None:
            return Draft()
        tally, limit = self._tally, self._request.max_tokens
        room = self._backend.n_ctx - len(self._cache.token_ids) - 1
        room = min(room, self._backend.n_batch - 1, self._backend.n_logits_max - 1)
        if limit is not None:
            room = min(room, limit - tally.n_generated_tokens - 1)
        return self._speculation.draft([*self._cache.token_ids, self._last_token], room)

    def _recheck(self, sampler: Sampler, verdict: Verdict, batched: NDArray[np.float32]) -> Verdict:
        """Decode the last confirmed token alone, as a run without speculation does."""
        cache = self._cache
        last = cache.token_ids[-1]
        cache.rewind(len(cache.token_ids) - 1)
        logits = cache.decode([last], 1)
        if self._speculation is not None:
            self._speculation.ties.observe(batched, logits[-1])
        self._tally.n_passes += 1
        self._tally.n_rechecked += 1
        again = verify(sampler, logits, Draft(), self._backend.vocab.is_eog)
        return Verdict(verdict.chosen + again.chosen, verdict.n_accepted, complete=again.complete)

    def _is_full(self) -> bool:
        return len(self._cache.token_ids) >= self._backend.n_ctx

    def _shift(self) -> None:
        keep, discard = shift_sizes(self._request.n_keep, self._backend.n_ctx)
        self._cache.shift(keep, discard)
        self._listener(
            Notice(f"the context of {self._backend.n_ctx} tokens is full: dropped {discard}")
        )

    def _last_chunk(self, reason: FinishReason) -> Chunk:
        self._finish = reason
        return Chunk(self._text.finish(), (), None, reason)

    def _cut_off(self, error: LinkError) -> LinkError:
        """Return the error of a link that ended the reply, with the text so far."""
        n_tokens = self._tally.n_generated_tokens
        found = type(error)(f"{error.message}, after {n_tokens} tokens of the reply",
                            hint=error.hint or _HINT)  # fmt: skip
        found.said = self._said + self._text.finish()
        return found

    def _raise_if_cancelled(self) -> None:
        if self._cancelled:
            raise Cancelled("generation cancelled")


def shift_sizes(n_keep: int, n_ctx: int) -> tuple[int, int]:
    """Return how many leading tokens stay and how many after them go: half of the rest."""
    keep = min(n_keep, n_ctx // 2)
    return keep, max(1, (n_ctx - keep) // 2)


def fit_prompt(
    request: Request, n_ctx: int, overflow: Overflow, listener: Listener
) -> tuple[int, ...]:
    """Return a prompt that leaves room for one token.

    With "shift", whole steps of `shift_sizes` are dropped: the same steps that a running generation
    drops, so that a growing conversation still finds its beginning in the cache.

    Raises:
        CapacityError: the prompt is too long and `overflow` is "error".
    """
    prompt, most = request.token_ids, n_ctx - 1
    if len(prompt) <= most:
        return prompt
    keep, discard = shift_sizes(request.n_keep, n_ctx)
    if overflow == "error":
        raise CapacityError(
            f"the prompt has {len(prompt):,} tokens, the context holds {most:,} and the answer",
            hint=f"use --ctx-size {len(prompt) + 512}, a shorter prompt, or --overflow shift",
        )
    n_steps = -(-(len(prompt) - most) // discard)
    listener(
        Notice(f"the prompt has {len(prompt)} tokens: dropped {n_steps * discard} after {keep}")
    )
    return prompt[:keep] + prompt[keep + n_steps * discard :]
