"""`edgert eval`: windows that score every token once, losses that are right."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgert.cli.eval import measure, windows
from edgert.errors import ConfigError
from edgert.events import ignore
from fakes import FakeBackend


@given(st.integers(0, 300), st.integers(2, 40))
def test_windows_score_every_token_once_and_in_order(n_tokens: int, length: int) -> None:
    scored: list[int] = []
    for window in windows(n_tokens, length):
        assert 0 < window.end - window.start <= length
        scored += range(window.start + window.n_context, window.end)
    assert scored == list(range(n_tokens))


def test_later_windows_lead_in_with_half_a_window() -> None:
    assert [w.n_context for w in windows(100, 10)][:3] == [0, 5, 5]
    assert len(list(windows(100, 10, n_most=2))) == 2


def uniform(window: tuple[int, ...]) -> NDArray[np.float32]:
    del window
    return np.full(FakeBackend().vocab.n_tokens, 3.5, np.float32)


def test_uniform_model_scores_the_logarithm_of_its_vocabulary() -> None:
    backend = FakeBackend(n_ctx=16, n_batch=8, n_logits_max=8, logits=uniform)
    score = measure(backend, "x" * 50, None, ignore)
    n_vocab = backend.vocab.n_tokens
    assert (score.n_tokens, score.n_bytes) == (50, 50)
    assert score.nats_per_token == pytest.approx(math.log(n_vocab))
    assert score.perplexity == pytest.approx(n_vocab)
    assert score.bits_per_byte == pytest.approx(math.log2(n_vocab))


def test_model_that_knows_the_text_scores_almost_nothing() -> None:
    def sure(window: tuple[int, ...]) -> NDArray[np.float32]:
        logits = np.zeros(FakeBackend().vocab.n_tokens, np.float32)
        logits[ord("b") if window[-1] == ord("a") else ord("a")] = 50.0
        return logits

    backend = FakeBackend(n_ctx=16, n_batch=4, n_logits_max=4, logits=sure)
    assert measure(backend, "ab" * 20, None, ignore).nats_per_token < 1e-9
    assert measure(backend, "ba" * 20, None, ignore).nats_per_token > 0.1  # the first is wrong


def test_score_does_not_depend_on_the_batch() -> None:
    text = "the quick brown fox " * 3
    scores = [
        measure(FakeBackend(n_ctx=32, n_batch=n, n_logits_max=n), text, None, ignore).perplexity
        for n in (3, 8, 17)
    ]
    assert scores[0] == pytest.approx(scores[1]) == pytest.approx(scores[2])


def test_without_bos_the_first_token_is_not_scored() -> None:
    backend = FakeBackend(n_ctx=16, n_batch=8, n_logits_max=8, logits=uniform)
    backend.vocab.add_bos = False
    score = measure(backend, "x" * 20, None, ignore)
    assert (score.n_tokens, score.n_bytes) == (19, 19)
    with pytest.raises(ConfigError):
        measure(backend, "x", None, ignore)
