"""How far a model strays from another on a text: perplexities and Kullback-Leibler divergence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.cli.eval import windows
from edgert.errors import ConfigError
from edgert.events import Listener, PrefillProgress
from edgert.llama.backend import Backend

Sums = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Divergence:
    """A candidate beside its reference; `kl` is in nats a token, of the reference's choice."""

    n_tokens: int
    perplexity: float
    reference_perplexity: float
    kl: float
    kl_stderr: float


def diverge(
    reference: Backend, candidate: Backend, text: str, n_most: int | None, listener: Listener
) -> Divergence:
    """Decode a text with both models, window by window.

    Args:
        reference: The original.
        candidate: With the same vocabulary and context.
        text: As for `edgert eval`.
        n_most: Only so many windows, None for all.
        listener: Told about progress.
    """
    vocab = reference.vocab
    tokens = vocab.tokenize(text, add_special=False, parse_special=False)
    first = [vocab.bos] if vocab.add_bos and vocab.bos is not None else []
    parts = []
    for window in windows(len(tokens), reference.n_ctx - len(first), n_most):
        listener(PrefillProgress(window.start, len(tokens)))
        lead_in = len(first) + (window.n_context or (0 if first else 1))
        part = first + tokens[window.start : window.end]
        parts.append(_window(reference, candidate, part, lead_in))
    listener(PrefillProgress(len(tokens), len(tokens)))
    sums = np.concatenate(parts) if parts else np.empty((0, 3))
    if not len(sums):
        raise ConfigError("the text is too short to score", hint="two tokens are the least")
    of_reference, of_candidate, kl = (float(mean) for mean in sums.mean(axis=0))
    return Divergence(
        n_tokens=len(sums),
        perplexity=math.exp(min(of_candidate, 700.0)),
        reference_perplexity=math.exp(min(of_reference, 700.0)),
        kl=kl,
        kl_stderr=float(sums[:, 2].std() / math.sqrt(len(sums))),
    )


def _window(reference: Backend, candidate: Backend, tokens: Sequence[int], n_lead_in: int) -> Sums:
    """Return the losses of both and the divergence for tokens[n_lead_in:], (n, 3)."""
    reference.truncate(0)
    candidate.truncate(0)
    most = min(reference.n_batch, reference.n_logits_max)
    rows: list[Sums] = []
    position, last = 0, len(tokens) - 1
    while position < last:
        end = min(last, position + most)
        n_logits = min(end - position, max(0, end - (n_lead_in - 1)))
        part = tokens[position:end]
        own = _log_probabilities(reference.decode(part, position, n_logits))
        other = _log_probabilities(candidate.decode(part, position, n_logits))
        targets = np.asarray(tokens[end - n_logits + 1 : end + 1], np.intp)
        index = np.arange(n_logits)
        kl = (np.exp(own) * (own - other)).sum(axis=1, dtype=np.float64)
        rows.append(np.stack([-own[index, targets], -other[index, targets], kl], axis=1))
        position = end
    return np.concatenate(rows) if rows else np.empty((0, 3))


def _log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the logarithms of the softmax of (n, n_vocab), summed up in double precision."""
    highest = logits.max(axis=1, keepdims=True, initial=-math.inf)
    shifted: NDArray[np.float32] = logits - highest
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted
