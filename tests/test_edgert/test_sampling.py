"""Sampling parameters, distributions by hand, reproducible draws, log probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgert.errors import ConfigError
from edgert.sampling import Sampler, SamplingParams, token_logprob
from fakes import FakeVocab

VOCAB = FakeVocab(6)  # 12 tokens
NO_FILTER = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def logits_of(*probabilities: float) -> np.ndarray:
    """Logits of the first tokens with these probabilities; the others next to impossible."""
    row = np.full(VOCAB.n_tokens, -50.0, np.float32)
    row[: len(probabilities)] = np.log(probabilities)
    return row


def kept(params: SamplingParams, row: np.ndarray, recent: tuple[int, ...] = ()) -> dict[int, float]:
    found = Sampler(params, VOCAB, recent).distribution(row)
    return dict(zip(found.token_ids.tolist(), found.probabilities.tolist(), strict=True))


ROW = logits_of(0.4, 0.3, 0.2, 0.1)


def test_top_k_keeps_the_k_likeliest_and_renormalises() -> None:
    params = SamplingParams(temperature=1.0, top_k=2, top_p=1.0, min_p=0.0)
    assert kept(params, ROW) == pytest.approx({0: 0.4 / 0.7, 1: 0.3 / 0.7}, rel=1e-5)


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    params = SamplingParams(temperature=1.0, top_k=0, top_p=0.65, min_p=0.0)
    # 0.4 < 0.65, 0.4 + 0.3 >= 0.65
    assert kept(params, ROW) == pytest.approx({0: 0.4 / 0.7, 1: 0.3 / 0.7}, rel=1e-5)


def test_min_p_is_relative_to_the_likeliest() -> None:
    params = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.45)
    # 0.45 * 0.4 = 0.18: 0.4, 0.3 and 0.2 stay
    assert set(kept(params, ROW)) == {0, 1, 2}


def test_temperature_two_is_the_square_root_of_probabilities() -> None:
    params = SamplingParams(temperature=2.0, **NO_FILTER)
    total = sum(math.sqrt(p) for p in (0.4, 0.3, 0.2, 0.1))
    assert kept(params, ROW)[2] == pytest.approx(math.sqrt(0.2) / total, rel=1e-4)


def test_repeat_penalty_multiplies_negative_logits_of_recent_tokens() -> None:
    params = SamplingParams(temperature=1.0, repeat_penalty=2.0, repeat_last_n=2, **NO_FILTER)
    # tokens 0 and 1 are the last two of the prompt: p -> p^2, as log p < 0
    weights = {0: 0.4**2, 1: 0.3**2, 2: 0.2, 3: 0.1}
    found = kept(params, ROW, (3, 0, 1))
    total = sum(weights.values())
    for token, weight in weights.items():
        assert found[token] == pytest.approx(weight / total, rel=1e-4)


def test_greedy_takes_the_largest_and_the_lowest_id_of_equals() -> None:
    row = np.array([0.0, 3.0, 3.0, 1.0] + [0.0] * 8, np.float32)
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.0, repeat_penalty=1.1),
    ):
        assert Sampler(params, VOCAB).choose(row) == 1


def test_greedy_with_penalty_avoids_what_was_just_said() -> None:
    row = np.array([2.0, 1.9] + [0.0] * 10, np.float32)
    sampler = Sampler(SamplingParams(temperature=0.0, repeat_penalty=1.2), VOCAB)
    assert sampler.choose(row) == 0
    sampler.accept(0)
    assert sampler.choose(row) == 1


def test_same_seed_gives_the_same_draws_and_the_right_frequencies() -> None:
    params = SamplingParams(temperature=1.0, seed=9, **NO_FILTER)
    one, two = Sampler(params, VOCAB), Sampler(params, VOCAB)
    draws = [one.choose(ROW) for _ in range(4000)]
    assert draws == [two.choose(ROW) for _ in range(4000)]
    shares = np.bincount(draws, minlength=4)[:4] / 4000
    # standard error of a share is at most sqrt(0.24 / 4000) = 0.0077
    assert shares == pytest.approx([0.4, 0.3, 0.2, 0.1], abs=0.03)


def test_clear_best_says_nothing_when_two_nearly_tie() -> None:
    sampler = Sampler(SamplingParams(temperature=0.0), VOCAB)
    row = np.array([10.0, 9.95] + [0.0] * 10, np.float32)
    # mean 1.66, spread 8.34: the gap of 0.05 is 0.6 % of it
    assert sampler.clear_best(row, 0.01) is None
    assert sampler.clear_best(row, 0.001) == 0
    row[1] = 10.0
    assert sampler.clear_best(row, 0.0) is None


def test_log_probabilities_are_the_log_softmax_of_raw_logits() -> None:
    found = token_logprob(ROW + np.float32(3.0), 2, 2)
    assert found.logprob == pytest.approx(math.log(0.2), abs=1e-5)
    assert [token for token, _ in found.top] == [0, 1]
    assert found.top[1][1] == pytest.approx(math.log(0.3), abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("inf")),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.01),
        ("min_p", -0.01),
        ("repeat_penalty", 0.0),
        ("repeat_last_n", -1),
        ("seed", 2**32),
        ("seed", True),
        ("logprobs", 101),
    ],
)
def test_parameters_out_of_range_are_named(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name):
        SamplingParams(**{name: value}).checked()  # type: ignore[arg-type]


def test_grammar_and_schema_together_are_refused() -> None:
    with pytest.raises(ConfigError, match="both"):
        SamplingParams(grammar='root ::= "a"', json_schema="{}").checked()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.9, top_k=5),
        SamplingParams(temperature=0.9, top_k=3, repeat_penalty=1.5, repeat_last_n=4),
    ],
)
def test_the_likeliest_candidates_decide_as_the_whole_row_does(params: SamplingParams) -> None:
    vocab = FakeVocab(200)
    row = np.random.default_rng(1).standard_normal(vocab.n_tokens).astype(np.float32)
    recent = tuple(int(i) for i in np.argsort(row)[-4:])
    n = params.n_candidates
    assert n is not None
    some = np.full_like(row, -np.inf)
    largest = np.argsort(row)[-n:]
    some[largest] = row[largest]
    one, other = Sampler(params, vocab, recent), Sampler(params, vocab, recent)
    assert one.best(some) == other.best(row)
    if params.greedy:
        return
    whole, found = other.distribution(row), one.distribution(some)
    assert found.token_ids.tolist() == whole.token_ids.tolist()
    assert found.probabilities.tobytes() == whole.probabilities.tobytes()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=0),
        SamplingParams(logprobs=2),
        SamplingParams(grammar='root ::= "a"'),
    ],
)
def test_some_parameters_look_at_every_logit(params: SamplingParams) -> None:
    assert params.n_candidates is None
