"""Drafters: they guess the next tokens so that one pass of the model can confirm several."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ConfigError
from edgert.llama.backend import Backend
from edgert.llama.vocab import Vocab
from edgert.sampling import Distribution, Sampler, SamplingParams
from edgert.token_cache import TokenCache

_LONGEST_NGRAM = 3
_LONGEST_MATCH = 16
_MATCH_PRIORS = {1: 0.25, 2: 0.4, 3: 0.6, 4: 0.7, 8: 0.85, 16: 0.9}  # by length of the match
_LEAST_CONFIDENCE = 0.1


@dataclass(frozen=True, slots=True)
class Draft:
    """Guessed tokens.

    Attributes:
        token_ids: The guess, possibly shorter than asked for.
        distributions: What each token was drawn from; None when it was not drawn but certain.
    """

    token_ids: tuple[int, ...] = ()
    distributions: tuple[Distribution, ...] | None = None


class Drafter(Protocol):
    """Guesses how a token sequence goes on."""

    @property
    def free(self) -> bool:
        """Whether a proposal costs next to nothing, so that unused ones may be scored too."""
        ...

    @property
    def priors(self) -> Mapping[int, float]:
        """Acceptance rates to expect at first, by class."""
        ...

    def begin(self, params: SamplingParams) -> None:
        """Prepare for one generation."""
        ...

    def draft_class(self, history: Sequence[int]) -> int | None:
        """Return which acceptance rate applies to a draft here, None when there is no draft."""
        ...

    def propose(self, history: Sequence[int], n: int) -> Draft:
        """Guess up to `n` tokens after `history`; how many may depend on the past alone."""
        ...

    def cancel(self) -> None:
        """Make a running proposal raise `Cancelled`; callable from any thread."""
        ...

    def close(self) -> None:
        """Free what the drafter holds."""
        ...


class NgramDrafter:
    """Prompt lookup: what followed the newest occurrence of the longest repeated end of the text.

    An index from n-grams to the newest place that continues them is extended as the history
    grows, so a proposal costs a few dictionary look-ups whatever the length of the history.
    """

    free = True
    priors = _MATCH_PRIORS

    def __init__(self) -> None:
        self._indexed: list[int] = []
        self._places: dict[tuple[int, ...], int] = {}

    def begin(self, params: SamplingParams) -> None:
        """Do nothing: the index follows the history by itself."""
        del params

    def draft_class(self, history: Sequence[int]) -> int | None:
        """Return the length of the match, rounded down to 1, 2, 3, 4, 8 or 16."""
        place = self._find(history)
        if place is None:
            return None
        length = _match_length(history, place)
        return max(bound for bound in _MATCH_PRIORS if bound <= length)

    def propose(self, history: Sequence[int], n: int) -> Draft:
        """Copy what followed the match, repeating it where it reaches the end of the history."""
        place = self._find(history)
        if place is None:
            return Draft()
        period = len(history) - place
        return Draft(tuple(history[place + index % period] for index in range(n)))

    def cancel(self) -> None:
        """Do nothing: a proposal takes microseconds."""

    def close(self) -> None:
        """Drop the index."""
        self._indexed, self._places = [], {}

    def _find(self, history: Sequence[int]) -> int | None:
        """Return the place after the newest earlier occurrence of the longest known suffix."""
        self._follow(list(history))
        for length in range(min(_LONGEST_NGRAM, len(history)), 0, -1):
            place = self._places.get(tuple(history[len(history) - length :]))
            if place is not None:
                return place
        return None

    def _follow(self, history: list[int]) -> None:
        """Index every n-gram that a token follows; start over when the history is another one."""
        known = len(self._indexed)
        if self._indexed != history[:known]:
            self.close()
            known = 0
        for end in range(max(1, known), len(history)):
            for length in range(1, min(_LONGEST_NGRAM, end) + 1):
                self._places[tuple(history[end - length : end])] = end
        self._indexed.extend(history[known:])


class ModelDrafter:
    """A small model with the same vocabulary; it keeps its own KV cache in step with the history.

    Args:
        backend: The small model; closed with the drafter.
        vocab: The large model's vocabulary.

    Raises:
        ConfigError: the vocabularies differ.
    """

    free = False
    priors: Mapping[int, float] = {0: 0.7}

    def __init__(self, backend: Backend, vocab: Vocab) -> None:
        check_same_vocab(backend.vocab, vocab)
        self._backend = backend
        self._cache = TokenCache(backend)
        self._sampler = Sampler(SamplingParams(temperature=0.0), backend.vocab)

    def begin(self, params: SamplingParams) -> None:
        """Draft with the same parameters, without grammar and penalty, with a seed of its own."""
        self._sampler.close()
        seed = None if params.seed is None else params.seed ^ 0x5EED5EED
        own = replace(params.unconstrained(), repeat_penalty=1.0, seed=seed)
        self._sampler = Sampler(own, self._backend.vocab)

    def draft_class(self, history: Sequence[int]) -> int | None:
        """Return 0, the only class, while the history fits into the context."""
        return 0 if len(history) < self._backend.n_ctx else None

    def propose(self, history: Sequence[int], n: int) -> Draft:
        """Decode the small model until it ends, is unsure, or `n` tokens are there."""
        room = min(n, self._backend.n_ctx - len(history))
        token_ids: list[int] = []
        distributions: list[Distribution] = []
        logits = self._cache.catch_up(history)[-1]
        while len(token_ids) < room:
            sure = _confidence(logits) >= _LEAST_CONFIDENCE
            if token_ids and not sure:
                break
            token_id, distribution = self._guess(logits)
            token_ids.append(token_id)
            distributions.append(distribution)
            if self._backend.vocab.is_eog(token_id) or len(token_ids) == room:
                break
            logits = self._cache.decode([token_id], 1)[-1]
        drawn = None if self._sampler.params.greedy else tuple(distributions)
        return Draft(tuple(token_ids), drawn)

    def cancel(self) -> None:
        """Make a running proposal raise `Cancelled`."""
        self._backend.cancel()

    def close(self) -> None:
        """Close the small model."""
        self._sampler.close()
        self._backend.close()

    def _guess(self, logits: NDArray[np.float32]) -> tuple[int, Distribution]:
        if self._sampler.params.greedy:
            token_id = self._sampler.best(logits)
            return token_id, Distribution(np.array([token_id], np.int32), np.ones(1))
        distribution = self._sampler.distribution(logits)
        return self._sampler.draw(distribution), distribution


def check_same_vocab(small: Vocab, large: Vocab) -> None:
    """Refuse a draft model whose tokens are not the model's.

    Raises:
        ConfigError: another number of tokens, or a token with other bytes.
    """
    hint = "use a draft model of the same family, or --draft ngram"
    if small.n_tokens != large.n_tokens:
        raise ConfigError(
            f"draft model has {small.n_tokens:,} tokens, the model {large.n_tokens:,}", hint=hint
        )
    for token_id in range(large.n_tokens):
        ours, theirs = large.piece(token_id, True), small.piece(token_id, True)
        if ours != theirs:
            raise ConfigError(
                f"token {token_id} is {theirs!r} in the draft model and {ours!r} in the model",
                hint=hint,
            )


def _confidence(logits: NDArray[np.float32]) -> float:
    """Return the probability of the most likely token."""
    return float(1.0 / np.exp(logits - logits.max()).sum())


def _match_length(history: Sequence[int], place: int) -> int:
    longest = min(place, _LONGEST_MATCH)
    for length in range(1, longest + 1):
        if history[place - length] != history[len(history) - length]:
            return length - 1
    return longest
