"""Lossless verification: which of the drafted tokens the model itself would have chosen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.sampling import (
    Distribution,
    NoAllowedToken,
    Sampler,
    TokenLogprob,
    token_logprob,
)
from edgert.speculative import Draft

IsEnd = Callable[[int], bool]

_FIRST_WIDTH = 0.01
_LARGEST_WIDTH = 0.05
_ENOUGH_RECHECKS = 4
_SAFETY = 6.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """A token of the answer; `logprob` when it was asked for."""

    token_id: int
    logprob: TokenLogprob | None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one pass gives.

    Attributes:
        chosen: Tokens in order; the last one is not in the KV cache yet, the others are.
        n_accepted: Drafted tokens among them.
        near_tie: The next token is too close to call from a batched pass.
        complete: The grammar allows no further token.
    """

    chosen: tuple[Chosen, ...]
    n_accepted: int
    near_tie: bool = False
    complete: bool = False


class TieGuard:
    """How close two logits of a batched pass may be before it must not decide between them.

    Kernels for several tokens may sum in another order than those for one. A recheck decodes a
    token alone and so shows by how much logits really differ: nothing for the quantized types of
    ggml's CPU backend, about 1e-3 of their spread for f16 and f32. The guard is `_FIRST_WIDTH`
    wide until enough rechecks were seen, then a multiple of the largest difference among them.
    """

    def __init__(self) -> None:
        self._n_observed = 0
        self._largest = 0.0

    @property
    def width(self) -> float:
        """The width as a share of the distance from the mean logit to the largest."""
        if self._n_observed < _ENOUGH_RECHECKS:
            return _FIRST_WIDTH
        return min(_LARGEST_WIDTH, _SAFETY * self._largest)

    def observe(self, batched: NDArray[np.float32], single: NDArray[np.float32]) -> None:
        """Compare (n_vocab,) logits of the same position from both kinds of passes."""
        spread = float(single.max() - single.mean())
        if spread > 0:
            self._n_observed += 1
            self._largest = max(self._largest, float(np.abs(batched - single).max()) / spread)


def verify(
    sampler: Sampler,
    logits: NDArray[np.float32],
    draft: Draft,
    is_end: IsEnd,
    tie_width: float = 0.0,
) -> Verdict:
    """Choose tokens from the logits of [last token, *draft].

    Greedy: a drafted token stands when it is the model's own choice. Where the two best logits
    nearly tie, a batched pass does not decide (see `TieGuard`): the caller decodes that token
    alone.

    Sampled: rejection sampling (Leviathan et al. 2023, section 2.3; Chen et al. 2023). A drafted
    x stands with probability min(1, p(x)/q(x)); otherwise a token is drawn from max(p - q, 0)
    normalised. What comes out is distributed as p, the distribution after all sampling parameters.

    Args:
        sampler: Accepts every chosen token.
        logits: (len(draft) + 1, n_vocab) raw logits.
        draft: The guess; may be empty.
        is_end: Says whether a token ends the generation.
        tie_width: Of a `TieGuard`; unused without a draft.
    """
    chosen: list[Chosen] = []
    width = tie_width if draft.token_ids else None
    for row, guess in enumerate((*draft.token_ids, None)):
        try:
            token_id = _choose(sampler, logits[row], draft, row, width)
        except NoAllowedToken:
            return Verdict(tuple(chosen), min(row, len(chosen)), complete=True)
        if token_id is None:
            return Verdict(tuple(chosen), row, near_tie=True)
        sampler.accept(token_id)
        chosen.append(Chosen(token_id, _logprob(sampler, logits[row], token_id)))
        if token_id != guess or is_end(token_id):
            return Verdict(tuple(chosen), row)
    return Verdict(tuple(chosen), len(draft.token_ids))


def _choose(
    sampler: Sampler,
    logits: NDArray[np.float32],
    draft: Draft,
    row: int,
    tie_width: float | None,
) -> int | None:
    """Return the token for one row, None for a near tie; no `tie_width`, no such thing."""
    if sampler.params.greedy:
        if tie_width is None:
            return sampler.best(logits)
        return sampler.clear_best(logits, tie_width)
    target = sampler.distribution(logits)
    if row == len(draft.token_ids):
        return sampler.draw(target)
    if draft.distributions is None:
        # a certain guess: drawing and comparing is the same rejection sampling, and takes from the
        # generator what a run without speculation takes, so the same seed gives the same answer
        return sampler.draw(target)
    guess, source = draft.token_ids[row], draft.distributions[row]
    if sampler.uniform() * source.of(guess) < target.of(guess):
        return guess
    return sampler.draw(residual(target, source))


def residual(target: Distribution, source: Distribution) -> Distribution:
    """Return max(p - q, 0) normalised."""
    order = np.argsort(source.token_ids)
    at = np.searchsorted(source.token_ids[order], target.token_ids)
    at = np.minimum(at, len(order) - 1)
    same = source.token_ids[order][at] == target.token_ids
    left = target.probabilities - np.where(same, source.probabilities[order][at], 0.0)
    np.maximum(left, 0.0, out=left)
    total = float(left.sum())
    # rounding can leave nothing where p and q are equal; a rejection is impossible there
    return Distribution(target.token_ids, left / total) if total > 0 else target


def _logprob(sampler: Sampler, logits: NDArray[np.float32], token_id: int) -> TokenLogprob | None:
    n_top = sampler.params.logprobs
    return token_logprob(logits, token_id, n_top) if n_top > 0 else None
