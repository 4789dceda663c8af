"""Choosing the next token: parameters and a seeded sampler over llama.cpp's own samplers."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ConfigError
from edgert.grammar import Grammar, compile_grammar
from edgert.llama.vocab import Vocab
from edgert.sampler_chain import SamplerChain

_LEAST_TEMPERATURE = 0.001
LARGEST_SEED = 2**32 - 1
_LARGEST_LAST_N = 1 << 20
_LARGEST_LOGPROBS = 100
_LEAST_CANDIDATES = 8  # near ties are looked at again


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How to choose tokens; the defaults are llama.cpp's.

    Attributes:
        temperature: 0 to 100; below 0.001 the most likely token is taken.
        top_k: Keep the k most likely tokens; 0 keeps all.
        top_p: Keep the most likely tokens that reach this share; 1 keeps all.
        min_p: Keep tokens at least this fraction as likely as the first; 0 keeps all.
        repeat_penalty: Divides positive and multiplies negative logits of recent tokens; 1 is off.
        repeat_last_n: How many recent tokens that looks at, the prompt's included; 0 is off.
        seed: Same seed, same choices; None draws one. With a draft model only the distribution is
            the same, since how far it drafts depends on time.
        grammar: GBNF text with a rule `root`.
        json_schema: JSON Schema, as text or parsed; excludes `grammar`.
        logprobs: How many alternatives to report per token; 0 reports nothing.
    """

    temperature: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    seed: int | None = None
    grammar: str | None = None
    json_schema: str | Mapping[str, object] | None = None
    logprobs: int = 0

    def checked(self) -> Self:
        """Return self after checking every range.

        Raises:
            ConfigError: a value is out of range; the message names it.
        """
        _check_float("temperature", self.temperature, 0.0, 100.0)
        _check_float("top_p", self.top_p, 0.0, 1.0)
        _check_float("min_p", self.min_p, 0.0, 1.0)
        _check_float("repeat_penalty", self.repeat_penalty, 0.01, 100.0)
        check_int("top_k", self.top_k, 0, 2**31 - 1)
        check_int("repeat_last_n", self.repeat_last_n, 0, _LARGEST_LAST_N)
        check_int("logprobs", self.logprobs, 0, _LARGEST_LOGPROBS)
        if self.seed is not None:
            check_int("seed", self.seed, 0, LARGEST_SEED)
        if self.grammar is not None and self.json_schema is not None:
            raise ConfigError("grammar and json_schema are both given", hint="give one of them")
        return self

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature < _LEAST_TEMPERATURE

    @property
    def n_candidates(self) -> int | None:
        """How many of the largest logits decide everything; None where all may."""
        if self.constrained or self.logprobs or not (self.greedy or self.top_k):
            return None
        demoted = self.repeat_last_n if self.penalized else 0
        return max(_LEAST_CANDIDATES, 1 if self.greedy else self.top_k) + demoted

    @property
    def constrained(self) -> bool:
        """Whether a grammar or a schema limits the output."""
        return self.grammar is not None or self.json_schema is not None

    @property
    def penalized(self) -> bool:
        """Whether recent tokens change the logits."""
        return self.repeat_penalty != 1.0 and self.repeat_last_n > 0

    def unconstrained(self) -> SamplingParams:
        """Return the same without grammar, for a draft model."""
        return replace(self, grammar=None, json_schema=None, logprobs=0)


@dataclass(frozen=True, slots=True)
class Distribution:
    """Tokens that may come next with their probabilities; all others have none.

    Attributes:
        token_ids: (n,) int32, most likely first.
        probabilities: (n,) float64, sums to 1.
    """

    token_ids: NDArray[np.int32]
    probabilities: NDArray[np.float64]

    def of(self, token_id: int) -> float:
        """Return the probability of one token."""
        found = np.flatnonzero(self.token_ids == token_id)
        return float(self.probabilities[found[0]]) if len(found) else 0.0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """The log probability of a chosen token under the model, before any sampling parameter.

    `top` holds the most likely tokens with theirs.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...]


class NoAllowedToken(Exception):
    """The grammar allows no token any more; the text is complete."""


class Sampler:
    """The choices of one generation.

    The order is llama.cpp's: grammar, penalties, top-k, top-p, min-p, temperature.
    The filters run in llama.cpp; the last step, a seeded draw from what they leave, is a NumPy
    PCG64 draw, because speculation must draw from the same distribution in two other ways.

    Args:
        params: Checked here.
        vocab: The model's vocabulary.
        recent: Prompt tokens; the repeat penalty looks at the last of them.
    """

    def __init__(self, params: SamplingParams, vocab: Vocab, recent: Sequence[int] = ()) -> None:
        self.params = params.checked()
        self.seed = secrets.randbits(32) if params.seed is None else params.seed
        self._vocab = vocab
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._grammar: Grammar | None = compile_grammar(params.grammar, params.json_schema, vocab)
        self._chain = SamplerChain(params, vocab.n_tokens)
        self._ids = np.arange(vocab.n_tokens, dtype=np.int32)
        if params.penalized:
            for token_id in recent[-params.repeat_last_n :]:
                self._chain.accept(token_id)

    def choose(self, logits: NDArray[np.float32]) -> int:
        """Choose the next token from (n_vocab,) raw logits. Does not accept it.

        Raises:
            NoAllowedToken: the grammar is complete.
        """
        if self.params.greedy:
            return self.best(logits)
        return self.draw(self.distribution(logits))

    def best(self, logits: NDArray[np.float32]) -> int:
        """Return the most likely token after grammar and penalties; ties go to the lowest id."""
        if self._grammar is None and not self.params.penalized:
            return int(np.argmax(logits))
        token_ids, changed = self._candidates(logits, 2)
        return int(token_ids[changed == changed.max()].min())

    def clear_best(self, logits: NDArray[np.float32], tie_width: float) -> int | None:
        """Return the most likely token, None when the second is nearly as likely.

        "Nearly" is `tie_width` of the distance from the mean logit to the largest, or exactly.
        """
        token_ids, changed = self._ids, logits
        if self._grammar is not None or self.params.penalized:
            token_ids, changed = self._candidates(logits, 2)
        largest = float(changed.max())
        width = tie_width * (largest - float(logits.mean()))
        if np.count_nonzero(changed >= largest - width) > 1:
            return None
        return int(token_ids[np.argmax(changed)])

    def distribution(self, logits: NDArray[np.float32]) -> Distribution:
        """Return the distribution that the next token is drawn from.

        Raises:
            NoAllowedToken: the grammar is complete.
        """
        if self._grammar is None:
            token_ids, left = self._chain.apply(logits)
        else:
            token_ids, left = self._chain.filter(*self._candidates(logits, self.params.top_k))
        weights = np.exp(left.astype(np.float64) - float(left.max()))
        return Distribution(token_ids, weights / weights.sum())

    def draw(self, distribution: Distribution) -> int:
        """Draw a token; one call of the generator, whatever the distribution."""
        cumulative = np.cumsum(distribution.probabilities)
        index = int(np.searchsorted(cumulative, self.uniform() * cumulative[-1], side="right"))
        return int(distribution.token_ids[min(index, len(cumulative) - 1)])

    def uniform(self) -> float:
        """Return a number in [0, 1) of the seeded generator."""
        return float(self._random.random())

    def accept(self, token_id: int) -> None:
        """Note that `token_id` was taken; the penalties and the grammar move on."""
        self._chain.accept(token_id)
        if self._grammar is not None and not self._vocab.is_eog(token_id):
            self._grammar.accept(token_id)

    def close(self) -> None:
        """Free the native samplers."""
        self._chain.close()
        if self._grammar is not None:
            self._grammar.close()

    def _candidates(
        self, logits: NDArray[np.float32], wanted: int
    ) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """Apply penalties and grammar.

        Checking 150,000 tokens against a grammar takes tens of milliseconds, so the most likely
        ones are checked first. When `wanted` > 0 of them are allowed, no other token can be among
        the `wanted` most likely allowed ones, so stopping there changes nothing.
        """
        penalized = self._chain.penalize(logits)
        if self._grammar is None:
            return self._ids, penalized
        n_checked = 256 if wanted > 0 else len(penalized)
        while True:
            token_ids = _most_likely(penalized, n_checked)
            allowed = self._grammar.allowed(token_ids)
            if n_checked >= len(penalized) or int(allowed.sum()) >= wanted > 0:
                break
            n_checked *= 16
        if not allowed.any():
            raise NoAllowedToken
        kept = token_ids[allowed]
        return kept, penalized[kept]


def token_logprob(logits: NDArray[np.float32], token_id: int, n_top: int) -> TokenLogprob:
    """Return the log-softmax of (n_vocab,) raw logits at a token and at the `n_top` likeliest."""
    wide = logits.astype(np.float64)
    largest = float(wide.max())
    log_total = largest + math.log(float(np.exp(wide - largest).sum()))
    top = _most_likely(logits, n_top)
    return TokenLogprob(
        token_id,
        float(wide[token_id]) - log_total,
        tuple((int(index), float(wide[index]) - log_total) for index in top),
    )


def _most_likely(logits: NDArray[np.float32], n: int) -> NDArray[np.int32]:
    """Return the ids of the `n` largest logits, largest first, ties by id."""
    if n >= len(logits):
        return np.argsort(-logits, kind="stable").astype(np.int32)
    part = np.sort(np.argpartition(-logits, n - 1)[:n])
    return part[np.argsort(-logits[part], kind="stable")].astype(np.int32)


def _check_float(name: str, value: object, lowest: float, highest: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, wanted a number")
    if not lowest <= value <= highest:  # also false for NaN
        raise ConfigError(f"{name} is {value}, wanted {lowest:g} to {highest:g}")


def check_int(name: str, value: object, lowest: int, highest: int) -> None:
    """Refuse what is not an integer in [lowest, highest].

    Raises:
        ConfigError: the message names the parameter.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name} is {value!r}, wanted an integer")
    if not lowest <= value <= highest:
        raise ConfigError(f"{name} is {value}, wanted {lowest} to {highest}")
