"""`edgert eval --calibrate-codec`: the loosest bound on hidden states that keeps the perplexity."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.codec_bounds import CodecBound
from edgert.errors import BackendError, ConfigError
from edgert.units import format_bytes
from quant.activations.basis import MOST_WIDTH, Basis, Moments
from quant.activations.codec import decode, encode
from quant.activations.settings import CodecSettings

if TYPE_CHECKING:
    from edgert.llama.tap import Tap

Floats = NDArray[np.float32]

DEFAULT_QUALITY = 0.995
_LEAST_BOUND, _MOST_BOUND = 0.01, 0.64
_PROBES = (0.08, 0.12, 0.17, 0.24)
_LARGEST_CUTBACK, _LEAST_CUTBACK = 0.7, 0.97
# A basis learnt of fewer tokens is one of these tokens, not of the model.
_TOKENS_PER_DIRECTION = 4
_MOST_ALONE = 1024


@dataclass(frozen=True, slots=True)
class Cut:
    """A whole model, with a place where hidden states may be changed.

    Attributes:
        tap: Of the model.
        n_layers: Before the cut.
        n_embd: Width of a hidden state.
        score: Computes the text and returns its perplexity.
    """

    tap: Tap
    n_layers: int
    n_embd: int
    score: Callable[[], float]

    def through(self, change: Callable[[Floats], Floats]) -> float:
        """Return the perplexity with hidden states changed on their way over the cut."""
        name = f"l_out-{self.n_layers - 1}"
        self.tap.replace(name, change)
        try:
            return self.score()
        finally:
            self.tap.release(name)


@dataclass(slots=True)
class Sizes:
    """Puts hidden states through a codec and counts the bytes.

    Attributes:
        settings: The codec.
        batched: Bytes and tokens as they came.
        n_alone: How many of the first are also sent one by one.
        alone: Bytes and tokens of these.
    """

    settings: CodecSettings
    n_alone: int = _MOST_ALONE
    batched: list[int] = field(default_factory=lambda: [0, 0])
    alone: list[int] = field(default_factory=lambda: [0, 0])

    def change(self, hidden: Floats) -> Floats:
        """Return what comes out at the other side."""
        data = encode(hidden, self.settings)
        self.batched[0] += len(data)
        self.batched[1] += len(hidden)
        for token in hidden[: max(0, self.n_alone - self.alone[1])]:
            self.alone[0] += len(encode(token[None], self.settings))
            self.alone[1] += 1
        n_tokens, n_embd = hidden.shape
        return decode(data, n_tokens, n_embd, self.settings.basis)


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What was found.

    Attributes:
        settings: The codec with the loosest bound.
        reference_perplexity: Without a codec.
        perplexity: With it.
        bytes_per_token: Sent one by one.
        bytes_per_batched_token: Sent as the text was computed.
    """

    settings: CodecSettings
    reference_perplexity: float
    perplexity: float
    bytes_per_token: float
    bytes_per_batched_token: float


def calibrate_codec(cut: Cut, quality: float) -> Calibrated:
    """Find the loosest bound that keeps a share of the quality.

    Raises:
        ConfigError: the tightest bound does not keep it, or all of it is to be kept.
        BackendError: the model has no such cut.
    """
    if not 0 < quality < 1:
        raise ConfigError(
            f"--quality {quality:g}: fewer bits keep less than all of it", hint="--quality 0.995"
        )
    reference, basis = learn_basis(cut)

    def rise(bound: float) -> float:
        sizes = Sizes(CodecSettings(bound=bound, basis=basis), n_alone=0)
        return cut.through(sizes.change) / reference - 1

    bound = loosest_bound(rise, 1 / quality - 1)
    sizes = Sizes(CodecSettings(bound=bound, basis=basis))
    found = cut.through(sizes.change)
    return Calibrated(
        settings=sizes.settings,
        reference_perplexity=reference,
        perplexity=found,
        bytes_per_token=sizes.alone[0] / max(1, sizes.alone[1]),
        bytes_per_batched_token=sizes.batched[0] / max(1, sizes.batched[1]),
    )


def learn_basis(cut: Cut) -> tuple[float, Basis | None]:
    """Return the perplexity without a codec, and the basis of what passed, None for too little.

    Raises:
        BackendError: nothing passed.
    """
    moments = Moments(cut.n_embd if cut.n_embd <= MOST_WIDTH else 1)

    def look(hidden: Floats) -> Floats:
        moments.add(hidden if cut.n_embd <= MOST_WIDTH else hidden[:, :1])
        return hidden

    reference = cut.through(look)
    if not moments.n_tokens:
        raise BackendError(f"llama.cpp's graph has no node l_out-{cut.n_layers - 1} to cut after")
    is_enough = moments.n_tokens >= _TOKENS_PER_DIRECTION * cut.n_embd
    return reference, moments.basis() if is_enough and cut.n_embd <= MOST_WIDTH else None


def loosest_bound(rise: Callable[[float], float], most: float) -> float:
    """Return the loosest bound at which the perplexity rises by no more than `most`.

    The rise goes with the square of the error, and what it happens to be on one text with the error
    itself: large errors tell the factor best. What follows from it is measured, and tightened until
    it holds.

    Args:
        rise: Measures the rise at a bound, as a share.
        most: The same.

    Raises:
        ConfigError: the tightest bound is not enough.
    """
    factor = sum(rise(bound) for bound in _PROBES) / sum(bound * bound for bound in _PROBES)
    bound = min(math.sqrt(most / factor), _MOST_BOUND) if factor > 0 else _MOST_BOUND
    while bound >= _LEAST_BOUND:
        found = rise(bound)
        if found <= most:
            return bound
        bound *= max(_LARGEST_CUTBACK, min(math.sqrt(most / found), _LEAST_CUTBACK))
    raise ConfigError(
        f"an error of {_LEAST_BOUND:g} in hidden states is too much for this quality",
        hint="--quality 0.99, or send hidden states as f16",
    )


def report(found: CodecBound, path: Path, *, as_json: bool) -> str:
    """Say what was found and where it is kept."""
    if as_json:
        figures = {"ratio": found.ratio, "perplexity_rise": found.rise, "kept": str(path)}
        return json.dumps({**found.model_dump(), **figures})
    return (
        f"measured on {format_bytes(found.text_bytes)} of text, kept in {path}\n"
        f"bound {found.bound:.4f}{'' if found.basis is None else ' in a basis of its own'}\n"
        f"{found.bytes_per_token:.1f} bytes a token ({found.bytes_per_batched_token:.1f} in a "
        f"batch), {found.ratio:.3f} of f16\n"
        f"perplexity {found.perplexity:.4f}, {100 * found.rise:+.2f} % over "
        f"{found.reference_perplexity:.4f}"
    )
