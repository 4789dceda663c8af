"""`edgert eval --calibrate-bits`: what widths by routing weight cost in perplexity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.errors import ConfigError
from edgert.experts.qualities import Measured, Qualities, keep_qualities
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.llama.backend import ExpertCounters

_CUTS = (0.0, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85)
LEAST_TEXT_BYTES = 4096

Measure = Callable[[tuple[int, ...], tuple[float, ...]], tuple[float, "ExpertCounters | None"]]


def policies(base: int, top: int) -> Iterator[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Yield the policies to measure, the widest width for all first."""
    yield (top,), ()
    for width in range(top - 1, base - 1, -1):
        yield (width,), ()
    for narrow in range(base, top - 1):
        for wide in {top, min(top, narrow + 2), min(top, narrow + 3)} - {narrow}:
            for cut in _CUTS:
                if cut:
                    yield (narrow, wide), (cut,)


def calibrate(
    measure: Measure, widths: tuple[int, int], model: str, text: str, folder: Path
) -> tuple[Qualities, Path]:
    """Measure every policy on a text and keep the result for `--quality`.

    Args:
        measure: Returns perplexity and what the experts did, for widths and cuts.
        widths: The narrowest and the widest of the file.
        model: Its key.
        text: To measure on.
        folder: Where results are kept.

    Raises:
        ConfigError: the text is too short.
    """
    n_bytes = len(text.encode())
    if n_bytes < LEAST_TEXT_BYTES:
        raise ConfigError(
            f"a text of {n_bytes:,} bytes is too short to calibrate on, wanted {LEAST_TEXT_BYTES:,}"
        )
    found = []
    for bits, cuts in policies(*widths):
        perplexity, counters = measure(bits, cuts)
        used = counters.total.bits_per_weight if counters is not None else None
        found.append(
            Measured(
                widths=bits, cuts=cuts, perplexity=perplexity,
                bits_per_weight=used or float(bits[-1]),
            )
        )  # fmt: skip
    qualities = Qualities(model=model, text_bytes=n_bytes, policies=tuple(found))
    return qualities, keep_qualities(folder, qualities)


def report(qualities: Qualities, path: Path, *, as_json: bool) -> str:
    """Return the policies worth having: each better than every one of fewer bits."""
    if as_json:
        return json.dumps({**qualities.model_dump(), "kept": str(path)})
    lines = [f"measured on {format_bytes(qualities.text_bytes)} of text, kept in {path}"]
    for policy in qualities.worth_having():
        cuts = f"@{','.join(f'{cut:g}' for cut in policy.cuts)}" if policy.cuts else ""
        bits = ",".join(str(width) for width in policy.widths)
        lines.append(
            f"{policy.bits_per_weight:5.2f} bits a weight: perplexity {policy.perplexity:.4f}, "
            f"--quality {qualities.quality(policy):.4f}, --expert-bits {bits}{cuts}"
        )
    return "\n".join(lines)
