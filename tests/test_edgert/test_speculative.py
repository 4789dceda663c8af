"""Speculation changes speed, never output: greedy token for token, sampled in distribution."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.engine import Engine, EngineSettings
from edgert.errors import ConfigError
from edgert.sampling import Distribution, Sampler, SamplingParams
from edgert.speculative import Draft, Drafter, ModelDrafter, NgramDrafter
from edgert.verification import TieGuard, residual, verify
from fakes import TEMPLATE, FakeBackend, FakeVocab, hashed_logits

GREEDY = SamplingParams(temperature=0.0)


class WrongDrafter:
    """Drafts that are right at first and wrong from a random place on."""

    free = False
    priors: Mapping[int, float] = {}

    def __init__(self, seed: int) -> None:
        self._random = np.random.default_rng(seed)
        self.n_proposed = 0

    def begin(self, params: SamplingParams) -> None:
        pass

    def draft_class(self, history: list[int]) -> int | None:
        return 0 if history else None

    def propose(self, history: list[int], n: int) -> Draft:
        truth, vocab = list(history), FakeVocab()
        for _ in range(n):
            truth.append(int(np.argmax(hashed_logits(vocab, tuple(truth[-2:]), 0))))
        wrong = int(self._random.integers(0, n + 1))
        token_ids = truth[len(history) :]
        if wrong < n:
            token_ids[wrong] = int(self._random.integers(0, 256))
        self.n_proposed += n
        return Draft(tuple(token_ids))

    def cancel(self) -> None:
        pass

    def close(self) -> None:
        pass


def answer(drafter: Drafter | None, backend: FakeBackend, prompt: str, n: int) -> tuple[int, ...]:
    settings = EngineSettings("fake", chat_template=TEMPLATE)
    engine = Engine(backend, settings, drafter, clock=backend.clock)
    return engine.complete(prompt, sampling=GREEDY, max_tokens=n).token_ids


@pytest.mark.parametrize("seed", range(5))
def test_greedy_output_is_the_same_with_bad_and_good_drafts(seed: int) -> None:
    drafter = WrongDrafter(seed)
    plain = answer(None, FakeBackend(), "abc", 120)
    backend = FakeBackend()
    assert answer(drafter, backend, "abc", 120) == plain
    assert drafter.n_proposed > 0
    assert len(backend.passes) < 80  # it did save passes


@pytest.mark.parametrize("seed", range(4))
def test_greedy_output_is_the_same_where_batches_compute_differently(seed: int) -> None:
    # A logit difference of 1e-2 on a spread of about 6 is 1.7e-3, as f16 weights show.
    plain = answer(None, FakeBackend(seed=0), "abcd", 200)
    noisy = FakeBackend(noise=1e-2)
    assert answer(WrongDrafter(seed), noisy, "abcd", 200) == plain


def test_ngram_drafts_save_passes_on_repeating_text() -> None:
    vocab = FakeVocab()

    def logits(window: tuple[int, ...]) -> np.ndarray:
        row = np.zeros(vocab.n_tokens, np.float32)
        row[97 + (window[-1] - 96) % 7] = 5.0
        return row

    plain = answer(None, FakeBackend(logits=logits), "abcdefgabc", 60)
    backend = FakeBackend(logits=logits)
    assert answer(NgramDrafter(), backend, "abcdefgabc", 60) == plain
    assert len(backend.passes) <= 12


def test_draft_model_that_is_the_model_is_always_right() -> None:
    def sure(window: tuple[int, ...]) -> np.ndarray:
        return 2 * hashed_logits(FakeVocab(), window, 0)

    plain = answer(None, FakeBackend(logits=sure), "abc", 80)
    small, large = FakeBackend(logits=sure), FakeBackend(logits=sure)
    settings = EngineSettings("fake", chat_template=TEMPLATE, draft_max=8)
    engine = Engine(large, settings, ModelDrafter(small, large.vocab), clock=large.clock)
    reply = engine.complete("abc", sampling=GREEDY, max_tokens=80)
    assert reply.token_ids == plain
    assert reply.stats.n_passes < 25
    engine.close()
    assert small.closed


def test_draft_model_keeps_up_over_turns_and_shifts() -> None:
    small, large = FakeBackend(n_ctx=64), FakeBackend(n_ctx=64)
    settings = EngineSettings("fake", chat_template=TEMPLATE, overflow="shift", draft_max=4)
    engine = Engine(large, settings, ModelDrafter(small, large.vocab), clock=large.clock)
    plain = Engine(
        FakeBackend(n_ctx=64), EngineSettings("fake", chat_template=TEMPLATE, overflow="shift")
    )
    for prompt in ("abc", "abcd", "zzz"):
        expected = plain.complete(prompt, sampling=GREEDY, max_tokens=90)
        assert engine.complete(prompt, sampling=GREEDY, max_tokens=90).token_ids == (
            expected.token_ids
        )


def test_draft_model_with_another_vocabulary_is_refused() -> None:
    with pytest.raises(ConfigError, match="14 tokens, the model 267"):
        ModelDrafter(FakeBackend(vocab=FakeVocab(8)), FakeVocab())


# --- sampling: what comes out is distributed as the model's own distribution -----------------

LETTERS = 6  # tokens 0..5; the six control tokens after them are never likely
ROUNDS = 2500


@functools.cache
def model_row(window: tuple[int, ...]) -> np.ndarray:
    return hashed_logits(FakeVocab(LETTERS), window, 4)


@functools.cache
def draft_row(window: tuple[int, ...]) -> np.ndarray:
    """Logits of a draft model that is right often, not always."""
    return (0.7 * model_row(window) + 0.6 * hashed_logits(FakeVocab(LETTERS), window, 5))[:LETTERS]


def chi_square(counts: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * counts.sum()
    kept = expected > 0.5  # cells below together hold next to nothing
    assert counts[~kept].sum() <= 25
    return float((((counts - expected)[kept]) ** 2 / expected[kept]).sum())


def pair_probabilities(params: SamplingParams) -> np.ndarray:
    """Exact probabilities of the two tokens after token 1, from the sampler's distributions."""
    joint = np.zeros((LETTERS + 6, LETTERS + 6))
    for first, p in conditional(params, [1]).items():
        for second, q in conditional(params, [1, first]).items():
            joint[first, second] = p * q
    return joint


def conditional(params: SamplingParams, seen: list[int]) -> dict[int, float]:
    found = Sampler(params, FakeVocab(LETTERS), seen).distribution(model_row(tuple(seen[-2:])))
    return dict(zip(found.token_ids.tolist(), found.probabilities.tolist(), strict=True))


def make_draft(tokens: list[int], random: np.random.Generator, *, drawn: bool) -> Draft:
    token_ids: list[int] = []
    sources: list[Distribution] = []
    for _ in range(2):
        logits = draft_row(tuple([*tokens, *token_ids][-2:]))
        weights = np.exp(logits.astype(float))
        source = Distribution(np.arange(LETTERS, dtype=np.int32), weights / weights.sum())
        choice = random.choice(LETTERS, p=source.probabilities) if drawn else np.argmax(logits)
        token_ids.append(int(choice))
        sources.append(source)
    return Draft(tuple(token_ids), tuple(sources) if drawn else None)


def speculate(params: SamplingParams, random: np.random.Generator, *, drawn: bool) -> list[int]:
    """Generate two tokens after token 1 by drafts and verification."""
    sampler, tokens = Sampler(params, FakeVocab(LETTERS), [1]), [1]
    while len(tokens) < 3:
        draft = make_draft(tokens, random, drawn=drawn)
        known = [*tokens, *draft.token_ids]
        ends = range(len(tokens), len(known) + 1)
        rows = np.array([model_row(tuple(known[:end][-2:])) for end in ends])
        verdict = verify(sampler, rows, draft, lambda _: False)
        tokens += [chosen.token_id for chosen in verdict.chosen]
    sampler.close()
    return tokens[1:3]


PLAIN = SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0)
FILTERED = SamplingParams(temperature=1.0, top_k=4, top_p=0.9, min_p=0.1, repeat_penalty=1.5)


@pytest.mark.parametrize("drawn", [False, True], ids=["certain-drafts", "drawn-drafts"])
@pytest.mark.parametrize("params", [PLAIN, FILTERED], ids=["plain", "filtered-and-penalized"])
def test_rejection_sampling_gives_the_models_distribution(
    params: SamplingParams, drawn: bool
) -> None:
    random = np.random.default_rng(7)
    counts = np.zeros((LETTERS + 6, LETTERS + 6))
    for seed in range(ROUNDS):
        first, second = speculate(replace(params, seed=seed), random, drawn=drawn)
        counts[first, second] += 1
    # at most 35 degrees of freedom: a correct sampler exceeds 66 once in a thousand seeds
    assert chi_square(counts, pair_probabilities(params)) < 66


def test_the_distribution_test_notices_drafts_taken_unverified() -> None:
    random = np.random.default_rng(7)
    counts = np.zeros((LETTERS + 6, LETTERS + 6))
    for _ in range(ROUNDS):
        first, second = make_draft([1], random, drawn=True).token_ids
        counts[first, second] += 1
    assert chi_square(counts, pair_probabilities(PLAIN)) > 200


def test_nothing_is_chosen_after_an_end_token() -> None:
    vocab = FakeVocab(LETTERS)
    rows = np.zeros((3, vocab.n_tokens), np.float32)
    rows[0, 2], rows[1, vocab.eos], rows[2, 3] = 9, 9, 9
    sampler = Sampler(GREEDY, vocab)
    verdict = verify(sampler, rows, Draft((2, vocab.eos)), vocab.is_eog)
    assert [chosen.token_id for chosen in verdict.chosen] == [2, vocab.eos]


def test_residual_is_the_positive_part_of_the_difference() -> None:
    target = Distribution(np.array([3, 1, 2], np.int32), np.array([0.5, 0.3, 0.2]))
    source = Distribution(np.array([1, 3, 9], np.int32), np.array([0.6, 0.1, 0.3]))
    # p - q: token 3: 0.4, token 1: -0.3 -> 0, token 2: 0.2
    left = residual(target, source)
    assert left.probabilities == pytest.approx([0.4 / 0.6, 0.0, 0.2 / 0.6])


def test_tie_guard_closes_when_rechecks_are_bit_identical() -> None:
    guard, row = TieGuard(), np.array([1.0, 0.0, -1.0], np.float32)
    assert guard.width == 0.01
    for _ in range(4):
        guard.observe(row, row)
    assert guard.width == 0.0
    guard.observe(row + np.float32(1e-3), row)
    assert guard.width == pytest.approx(6e-3, rel=1e-3)


# --- prompt lookup -------------------------------------------------------------------------


def brute_force(history: list[int], n: int) -> list[int]:
    for length in range(min(3, len(history)), 0, -1):
        suffix = history[len(history) - length :]
        for end in range(len(history) - 1, length - 1, -1):
            if history[end - length : end] == suffix:
                period = len(history) - end
                return [history[end + i % period] for i in range(n)]
    return []


@settings(max_examples=150)
@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9), st.integers(0, 40))
def test_ngram_lookup_equals_brute_force(history: list[int], n: int, cut: int) -> None:
    drafter = NgramDrafter()
    for length in range(0, len(history), 3):  # grows as a generation does
        drafter.propose(history[:length], 1)
    assert list(drafter.propose(history, n).token_ids) == brute_force(history, n)
    shorter = [*history[:cut], 7, 7]
    assert list(drafter.propose(shorter, n).token_ids) == brute_force(shorter, n)


def test_match_classes_tell_long_matches_from_short_ones() -> None:
    drafter = NgramDrafter()
    assert drafter.draft_class([1, 2, 3]) is None
    assert drafter.draft_class([1, 2, 9, 2]) == 1
    assert drafter.draft_class([1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5]) == 4
    assert drafter.draft_class([*range(20), *range(18)]) == 16


def test_prompt_lookup_gives_what_the_same_seed_gives_without_it() -> None:
    params, backend = SamplingParams(seed=3, temperature=0.2), FakeBackend(order=1)
    plain = Engine(FakeBackend(order=1), EngineSettings("fake"))
    drafting = Engine(backend, EngineSettings("fake"), NgramDrafter(), clock=backend.clock)
    prompt = "one two three one two three one two"
    for _ in range(3):  # the draft lengths learn between generations
        expected = plain.complete(prompt, sampling=params, max_tokens=60)
        found = drafting.complete(prompt, sampling=params, max_tokens=60)
        assert found.token_ids == expected.token_ids
    assert found.stats.n_drafted > 0
