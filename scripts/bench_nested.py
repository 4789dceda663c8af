"""Compare ways to nest the widths of experts: noise, perplexity and divergence at each width.

Every way is computed as halves of what its codes mean, so that only the weights differ.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np
from gguf.quants import dequantize, quantize
from numpy.typing import NDArray

from edgert.cli.divergence import Divergence
from edgert.cli.nested_eval import LOGITS_BYTES, Comparison, write_values
from edgert.cli.nested_inputs import gather
from edgert.cli.opening import open_backend
from edgert.cli.options import ModelFlags
from edgert.events import ignore
from edgert.llama.backend import Backend
from quant.nested.code import NestedMatrix
from quant.nested.encoder import ModelEncoder
from quant.nested.moments import Moments
from quant.nested.source import ExpertStack, TensorReader, expert_stacks
from quant.tensor_file import open_tensor_file

Floats = NDArray[np.float32]
Values = Callable[[str, int, int], Floats]  # stack, expert, width

BASE, TOP = 2, 8
DEDICATED = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}
SIGN_GROUP = 128
MOST_BITS = 8.7
MOST_OVER_DEDICATED = 0.003
LEAST_RECOVERED = 0.3


@dataclass(frozen=True, slots=True)
class Line:
    """One way at one width."""

    way: str
    width: int
    bits_per_weight: float
    snr_db: float
    score: Divergence


class Remembering:
    """A backend that computes logits of the same tokens once."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._before: tuple[int, ...] = ()
        self._logits: dict[tuple[tuple[int, ...], int], NDArray[np.float32]] = {}

    def __getattr__(self, name: str) -> object:
        return getattr(self._backend, name)

    def truncate(self, n_positions: int) -> None:
        """Forget positions."""
        self._before = self._before[:n_positions]

    def decode(
        self, tokens: Sequence[int], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        """Return the logits of the last tokens after those before."""
        start = len(self._before)
        self._before = (*self._before[:first_position], *tokens)
        key = (self._before, n_logits)
        if key not in self._logits:
            if start != first_position:
                raise ValueError(f"position {first_position} after {start}")
            self._backend.truncate(0)
            most = self._backend.n_batch
            for part in range(0, start, most):
                end = min(start, part + most)
                self._backend.decode(self._before[part:end], part, 0)
            self._logits[key] = self._backend.decode(tokens, first_position, n_logits).copy()
        return self._logits[key]


class Experts:
    """The experts of a model, their weights and their codes."""

    def __init__(self, reader: TensorReader, moments: Mapping[str, Moments]) -> None:
        self.reader = reader
        self.stacks = expert_stacks(reader.file)
        self._encoders = {
            False: ModelEncoder(reader, (BASE, TOP)),
            True: ModelEncoder(reader, (BASE, TOP), moments),
        }
        self._matrices: dict[tuple[str, int, bool], NestedMatrix] = {}

    @property
    def names(self) -> Iterator[tuple[str, int]]:
        """Every expert of every stack."""
        for name, stack in self.stacks.items():
            yield from ((name, expert) for expert in range(stack.n_expert))

    def weights(self, name: str, expert: int) -> Floats:
        """Return an expert as the source has it."""
        return self.reader.weights(self.stacks[name], expert)

    def nested(self, name: str, expert: int, *, calibrated: bool) -> NestedMatrix:
        """Return the code of an expert, made once with those of its stack."""
        key = (name, expert, calibrated)
        if key not in self._matrices:
            stack: ExpertStack = self.stacks[name]
            encode = self._encoders[calibrated].encode
            every = range(stack.n_expert)
            self._matrices |= {(name, e, calibrated): encode(stack, e) for e in every}
        return self._matrices[key]

    def values(self, name: str, expert: int, width: int, *, calibrated: bool) -> Floats:
        """Return what a width means, with its gain."""
        matrix = self.nested(name, expert, calibrated=calibrated)
        return matrix.values(width, self._encoders[calibrated].gains(name)[width - BASE])

    def snr_db(self, values: Values, width: int) -> float:
        """Return signal to noise over the weights of all experts."""
        noise = whole = 0.0
        for name, expert in self.names:
            weights = self.weights(name, expert)
            noise += float(((values(name, expert, width) - weights) ** 2).sum())
            whole += float((weights**2).sum())
        return 10 * float(np.log10(whole / noise))


def sliced(weights: Floats, width: int) -> Floats:
    """Keep the upper bits of q8_0's integers: every value at the lower end of its cell."""
    blocks = quantize(weights, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 34)
    d = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = blocks[:, 2:].view(np.int8) >> np.int8(8 - width) << np.int8(8 - width)
    values: Floats = (d * codes.astype(np.float32)).reshape(weights.shape)
    return values


def sign_planes(weights: Floats, width: int) -> Floats:
    """Code a base of two bits and then signs of what is left, with a scale each (arXiv 2504.15299).

    Scales are least squares of the weights: half-precision, one a group and plane.
    """
    groups = weights.reshape(-1, min(SIGN_GROUP, weights.shape[1]))
    least, most = groups.min(axis=1, keepdims=True), groups.max(axis=1, keepdims=True)
    step = np.maximum((most - least) / 3, np.float32(1e-12)).astype(np.float16).astype(np.float32)
    offset = least.astype(np.float16).astype(np.float32)
    values = offset + step * np.clip(np.rint((groups - offset) / step), 0, 3)
    for _ in range(BASE, width):
        rest = groups - values
        scale = np.abs(rest).mean(axis=1, keepdims=True).astype(np.float16).astype(np.float32)
        values = values + scale * np.where(rest < 0, np.float32(-1), np.float32(1))
    return np.asarray(values.reshape(weights.shape), np.float32)


def dedicated(weights: Floats, width: int) -> Floats:
    """Return what ggml's own type of this width makes of weights."""
    kind = gguf.GGMLQuantizationType[DEDICATED[width]]
    values: Floats = dequantize(quantize(weights, kind), kind)
    return values


def ways(experts: Experts) -> dict[str, tuple[Values, Callable[[int], float]]]:
    """Return what each way makes of an expert, and its bits a weight."""
    sign_bits = 16 / SIGN_GROUP
    return {
        "dedicated": (lambda n, e, b: dedicated(experts.weights(n, e), b), lambda b: b + 0.5),
        "midpoint": (
            lambda n, e, b: experts.values(n, e, b, calibrated=False), lambda b: b + 0.5,
        ),
        "calibrated": (
            lambda n, e, b: experts.values(n, e, b, calibrated=True), lambda b: b + 0.5,
        ),
        "sliced": (lambda n, e, b: sliced(experts.weights(n, e), b), lambda b: b + 0.5),
        "sign planes": (
            lambda n, e, b: sign_planes(experts.weights(n, e), b),
            lambda b: b + sign_bits * (b - BASE + 2),
        ),
    }  # fmt: skip


def measure(
    experts: Experts, flags: ModelFlags, options: argparse.Namespace, text: str
) -> Iterator[Line]:
    _, backend = open_backend(flags, os.environ, ignore, logits_bytes=LOGITS_BYTES)
    reference = Remembering(backend)
    comparison = Comparison(
        reference,  # type: ignore[arg-type]
        flags, os.environ, text, options.chunks, ignore,
    )  # fmt: skip
    shapes = {name: stack.entry.shape for name, stack in experts.stacks.items()}
    for way, (values, bits) in ways(experts).items():
        for width in options.widths:
            if way == "dedicated" and width not in DEDICATED:
                continue

            def of_expert(
                name: str, expert: int, values: Values = values, width: int = width
            ) -> Floats:
                return values(name, expert, width)

            with tempfile.TemporaryDirectory(prefix="bench-nested-") as folder:
                path = Path(folder) / "plain.gguf"
                write_values(path, experts.reader, shapes, of_expert)
                score = comparison.against(path)
            yield Line(way, width, bits(width), experts.snr_db(values, width), score)
    backend.close()


def judge(lines: list[Line]) -> list[dict[str, object]]:
    """Return each target with what was seen and whether it holds."""

    @cache
    def loss(way: str, width: int) -> float | None:
        for line in lines:
            if (line.way, line.width) == (way, width):
                return line.score.perplexity / line.score.reference_perplexity - 1
        return None

    targets: list[dict[str, object]] = []

    def add(name: str, saw: float, wanted: float, holds: bool) -> None:
        targets.append({"target": name, "saw": saw, "wanted": wanted, "holds": holds})

    for way in ("midpoint", "calibrated"):
        for width, kind in DEDICATED.items():
            own, other = loss(way, width), loss("dedicated", width)
            if own is not None and other is not None:
                over = (1 + own) / (1 + other) - 1
                name = f"{way}, {width} bits: perplexity over {kind}"
                add(name, over, MOST_OVER_DEDICATED, over <= MOST_OVER_DEDICATED)
                if (way, width) == ("calibrated", 4):
                    add(f"{name}, below it", over, 0.0, over < 0)
    for width in (2, 3):
        plain, own = loss("midpoint", width), loss("calibrated", width)
        if plain and own is not None:
            recovered = 1 - own / plain
            name = f"calibrated, {width} bits: recovered of the loss"
            add(name, recovered, LEAST_RECOVERED, recovered >= LEAST_RECOVERED)
    bits = TOP + 0.5
    add("bits a weight of the file's experts", bits, MOST_BITS, bits <= MOST_BITS)
    return targets


def table(lines: list[Line]) -> Iterator[str]:
    yield "| way | bits | bits a weight | SNR, dB | perplexity | change | divergence, nats |"
    yield "|---|---|---|---|---|---|---|"
    for line in lines:
        score = line.score
        change = 100 * (score.perplexity / score.reference_perplexity - 1)
        yield (
            f"| {line.way} | {line.width} | {line.bits_per_weight:.2f} | {line.snr_db:.1f} | "
            f"{score.perplexity:.4f} | {change:+.3f} % | {score.kl:.6f} ± {score.kl_stderr:.6f} |"
        )


def main() -> int:
    """Measure, print the table and the targets."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="a GGUF with experts, best of F16")
    parser.add_argument("--calib", required=True, help="text to calibrate on")
    parser.add_argument("--eval", required=True, type=Path, help="held-out text")
    parser.add_argument("--chunks", type=int, help="only the first windows of the text")
    parser.add_argument("--widths", type=int, nargs="+", default=[2, 3, 4, 5, 6, 7, 8])
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("-o", "--output", choices=("md", "json"), default="md")
    options = parser.parse_args()
    flags = ModelFlags(path=str(options.model), threads=options.threads)
    file = open_tensor_file(options.model)
    moments = gather(file, expert_stacks(file), options.calib, flags, ignore)
    with TensorReader(file) as reader:
        lines = []
        text = options.eval.read_text(encoding="utf-8")
        for line in measure(Experts(reader, moments), flags, options, text):
            print(f"{line.way} {line.width}: {line.score}", file=sys.stderr, flush=True)
            lines.append(line)
    targets = judge(lines)
    if options.output == "json":
        print(json.dumps({"lines": [asdict(line) for line in lines], "targets": targets}))
        return 0
    print("\n".join(table(lines)))
    for target in targets:
        print(
            f"{'holds' if target['holds'] else 'FAILS'}: {target['target']}: "
            f"{target['saw']:+.4f}, wanted {target['wanted']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
