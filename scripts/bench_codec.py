"""Measure the activation codec: bytes a token against halves, perplexity, microseconds.

Each model is cut after each of `--cuts` layers. The bound is calibrated on one text, what it costs
is measured on another one; tokens are counted and timed one by one, as while decoding. The last
line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.cli.calibrate_codec import DEFAULT_QUALITY, Cut, Sizes, calibrate_codec
from edgert.cli.cut_model import check_cut, open_cut_model
from edgert.cli.eval import measure
from edgert.cli.opening import find_model
from edgert.cli.options import ModelFlags
from edgert.events import ignore
from edgert.llama.backend import Backend
from quant.activations.codec import decode, encode
from quant.activations.settings import CodecSettings
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

_N_TIMED = 500
_MOST_RATIO, _MOST_RISE = 0.2, 0.005


@dataclass(frozen=True, slots=True)
class Line:
    """One model at one cut."""

    model: str
    cut: int
    bound: float
    basis: bool
    bytes_per_token: float
    bytes_per_batched_token: float
    ratio_to_f16: float
    calibration_rise: float
    reference_perplexity: float
    perplexity: float
    perplexity_rise: float
    encode_us: float
    decode_us: float


def measure_cut(
    cut: Cut, texts: tuple[Callable[[], float], Callable[[], float]], model: str, quality: float
) -> Line:
    """Calibrate on the first text, measure on the second."""
    calibrated = calibrate_codec(Cut(cut.tap, cut.n_layers, cut.n_embd, texts[0]), quality)
    seen = Cut(cut.tap, cut.n_layers, cut.n_embd, texts[1])
    kept: list[NDArray[np.float32]] = []

    def keep(hidden: NDArray[np.float32]) -> NDArray[np.float32]:
        kept.append(hidden)
        return hidden

    reference = seen.through(keep)
    sizes = Sizes(calibrated.settings)
    perplexity = seen.through(sizes.change)
    bytes_per_token = sizes.alone[0] / sizes.alone[1]
    encode_s, decode_s = time_tokens(np.concatenate(kept)[:_N_TIMED], calibrated.settings)
    return Line(
        model=model, cut=cut.n_layers, bound=calibrated.settings.bound,
        basis=calibrated.settings.basis is not None,
        bytes_per_token=bytes_per_token,
        bytes_per_batched_token=sizes.batched[0] / sizes.batched[1],
        ratio_to_f16=bytes_per_token / (2 * cut.n_embd),
        calibration_rise=calibrated.perplexity / calibrated.reference_perplexity - 1,
        reference_perplexity=reference, perplexity=perplexity,
        perplexity_rise=perplexity / reference - 1,
        encode_us=1e6 * encode_s, decode_us=1e6 * decode_s,
    )  # fmt: skip


def time_tokens(hidden: NDArray[np.float32], settings: CodecSettings) -> tuple[float, float]:
    """Return the median seconds to write and to read one token."""
    writing, reading = [], []
    for token in hidden:
        started_s = time.perf_counter()
        data = encode(token[None], settings)
        written_s = time.perf_counter()
        decode(data, 1, hidden.shape[1], settings.basis)
        reading.append(time.perf_counter() - written_s)
        writing.append(written_s - started_s)
    return statistics.median(writing), statistics.median(reading)


def lines(options: argparse.Namespace) -> Iterator[Line]:
    """Measure every model at every cut."""
    texts = [path.read_text(encoding="utf-8") for path in (options.calib, options.eval)]
    for name in options.models:
        path = find_model(name, os.environ)
        file = open_tensor_file(path)
        spec = read_model_spec(file)
        flags = ModelFlags(path=str(path), threads=options.threads)
        backend, tap = open_cut_model(file, spec, flags, ignore)

        def score(text: str, backend: Backend = backend) -> float:
            return measure(backend, text, options.chunks, ignore).perplexity

        scores = partial(score, texts[0]), partial(score, texts[1])
        for n_layers in options.cuts or sorted({1, spec.n_layer // 2, spec.n_layer - 1}):
            check_cut(spec, n_layers)
            cut = Cut(tap, n_layers, spec.n_embd, scores[0])
            yield measure_cut(cut, scores, path.stem, options.quality)
        backend.close()


def table(measured: list[Line]) -> Iterator[str]:
    """Write the lines for people."""
    yield (
        "| model | cut | bound | bytes a token | in a batch | of f16 | perplexity | change "
        "| encode, us | decode, us |"
    )
    yield "|---|---|---|---|---|---|---|---|---|---|"
    for line in measured:
        yield (
            f"| {line.model} | {line.cut} | {line.bound:.3f} | {line.bytes_per_token:.1f} | "
            f"{line.bytes_per_batched_token:.1f} | {line.ratio_to_f16:.3f} | "
            f"{line.reference_perplexity:.4f} | {100 * line.perplexity_rise:+.2f} % | "
            f"{line.encode_us:.0f} | {line.decode_us:.0f} |"
        )


def main() -> int:
    """Measure, print the table and the targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="GGUF files, or names of models inside edgert")
    parser.add_argument("--calib", required=True, type=Path, help="text to calibrate on")
    parser.add_argument("--eval", required=True, type=Path, help="held-out text")
    parser.add_argument("--cuts", type=int, nargs="+", help="layers before the cut")
    parser.add_argument("--chunks", type=int, default=60, help="windows of each text")
    parser.add_argument("--quality", type=float, default=DEFAULT_QUALITY)
    parser.add_argument("-t", "--threads", type=int)
    options = parser.parse_args()
    measured = []
    for line in lines(options):
        print(line, file=sys.stderr, flush=True)
        measured.append(line)
    print("\n".join(table(measured)))
    for line in measured:
        holds = line.ratio_to_f16 <= _MOST_RATIO and line.perplexity_rise <= _MOST_RISE
        print(
            f"{'holds' if holds else 'FAILS'}: {line.model} after {line.cut}: "
            f"{line.ratio_to_f16:.3f} of f16, wanted {_MOST_RATIO}; perplexity "
            f"{100 * line.perplexity_rise:+.2f} %, wanted {100 * _MOST_RISE:+.1f} %"
        )
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    print(json.dumps({"machine": machine, "lines": [asdict(line) for line in measured]}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
