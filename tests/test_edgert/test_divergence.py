"""How far a model strays from another: zero from itself, and as worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.cli.divergence import diverge
from edgert.cli.eval import measure
from edgert.errors import ConfigError
from edgert.events import ignore
from fakes import FakeBackend

N_VOCAB = FakeBackend().vocab.n_tokens


def uniform(window: tuple[int, ...]) -> NDArray[np.float32]:
    del window
    return np.zeros(N_VOCAB, np.float32)


def favouring(window: tuple[int, ...]) -> NDArray[np.float32]:
    """The letter a with probability one half, the others alike."""
    del window
    logits = np.zeros(N_VOCAB, np.float32)
    logits[ord("a")] = math.log(N_VOCAB - 1)
    return logits


def test_model_does_not_stray_from_itself() -> None:
    text = "some text, more than a window holds"
    score = diverge(FakeBackend(n_ctx=16), FakeBackend(n_ctx=16), text, None, ignore)
    assert score.kl == score.kl_stderr == 0.0
    assert score.perplexity == score.reference_perplexity
    alone = measure(FakeBackend(n_ctx=16), text, None, ignore)
    assert score.perplexity == pytest.approx(alone.perplexity)
    assert score.n_tokens == alone.n_tokens


def test_divergence_is_of_the_references_choice() -> None:
    reference, candidate = FakeBackend(logits=favouring), FakeBackend(logits=uniform)
    score = diverge(reference, candidate, "a" * 20, None, ignore)
    half = 0.5 * math.log(0.5 * N_VOCAB)
    others = 0.5 * math.log(0.5 / (N_VOCAB - 1) * N_VOCAB)
    assert score.kl == pytest.approx(half + others)
    assert score.reference_perplexity == pytest.approx(2.0)
    assert score.perplexity == pytest.approx(N_VOCAB)


def test_text_without_tokens_to_score_is_refused() -> None:
    with pytest.raises(ConfigError, match="too short"):
        diverge(FakeBackend(), FakeBackend(), "", None, ignore)
