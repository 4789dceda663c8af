"""`edgert eval`: perplexity and bits per byte of a text, every token scored once."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.cli.calibrate_bits import calibrate, report
from edgert.cli.opening import model_path, open_backend, read_text, run_interruptible
from edgert.cli.progress import ProgressListener
from edgert.config import directories
from edgert.errors import ConfigError
from edgert.events import PrefillProgress
from edgert.weights.packed import model_key
from quant.nested.file import read_nested
from quant.tensor_file import open_tensor_file

if TYPE_CHECKING:
    from collections.abc import Sequence

    from edgert.cli.command import Context
    from edgert.cli.options import EvalOptions
    from edgert.events import Listener
    from edgert.llama.backend import Backend, ExpertCounters

    Found = tuple[float, ExpertCounters | None]

Losses = NDArray[np.float64]

_LOGITS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Score:
    """How well a model predicts a text."""

    model: str
    text: str
    n_ctx: int
    n_tokens: int
    n_bytes: int
    nats_per_token: float
    nats_per_token_stderr: float
    perplexity: float
    bits_per_byte: float
    tokens_per_s: float


@dataclass(frozen=True, slots=True)
class Window:
    """A stretch of tokens decoded from an empty context; those before `n_context` only lead in."""

    start: int
    end: int
    n_context: int


def run(options: EvalOptions, context: Context) -> int:
    """Print the score and return the exit code."""
    model, text_path = options.model, options.text
    if text_path is None and model.model is not None:
        model, text_path = replace(model, path=None), model.path
    if text_path is None:
        raise ConfigError("no text named", hint="edgert eval model.gguf text.txt")
    text = read_text(text_path)
    if not text:
        raise ConfigError(f"{text_path}: the text is empty")
    as_json = options.output.json or options.eval_output == "json"
    if options.calibrate_codec or options.cut is not None:
        return _calibrate_codec(replace(options, model=model), text, context, as_json=as_json)
    if options.calibrate_bits:
        return _calibrate(replace(options, model=model), text, context, as_json=as_json)
    with ProgressListener(context, quiet=as_json) as progress:
        path, backend = open_backend(
            model, context.env, progress,
            logits_bytes=_LOGITS_BYTES,
        )  # fmt: skip
        score = run_interruptible(backend, lambda: measure(backend, text, options.chunks, progress))
    score = replace(score, model=str(path), text=text_path)
    print(json.dumps(asdict(score)) if as_json else _words(score))
    return 0


def _calibrate(options: EvalOptions, text: str, context: Context, *, as_json: bool) -> int:
    """Measure a nested model in many widths and keep what each costs."""
    path = model_path(options.model, context.env)
    nested = None if path is None else read_nested(open_tensor_file(path))
    if path is None or nested is None:
        raise ConfigError(
            "--calibrate-bits wants a nested model",
            hint="edgert quantize MODEL --nested 2..8 -o NESTED.gguf",
        )
    with ProgressListener(context, quiet=as_json) as progress:

        def score(bits: tuple[int, ...], cuts: tuple[float, ...]) -> Found:
            asked = f"{','.join(map(str, bits))}{'@' if cuts else ''}{','.join(map(str, cuts))}"
            model = replace(options.model, expert_bits=asked, quality=None)
            _, backend = open_backend(model, context.env, progress, logits_bytes=_LOGITS_BYTES)

            def work() -> Found:
                found = measure(backend, text, options.chunks, progress)
                return found.perplexity, backend.counters().experts

            return run_interruptible(backend, work)

        folder = directories(context.env).cache / "experts"
        key = model_key(nested.file)
        qualities, kept = calibrate(score, (nested.base, nested.top), key, text, folder)
    print(report(qualities, kept, as_json=as_json))
    return 0


def _calibrate_codec(options: EvalOptions, text: str, context: Context, *, as_json: bool) -> int:
    """Find the loosest bound on hidden states at a cut, and keep it."""
    from edgert.cli.calibrate_codec import report as report_codec
    from edgert.cli.cut_model import calibrate_cut

    if options.calibrate_bits or not options.calibrate_codec or options.cut is None:
        raise ConfigError(
            "--calibrate-codec and --cut go together, and without --calibrate-bits",
            hint="edgert eval MODEL TEXT --calibrate-codec --cut 4",
        )
    with ProgressListener(context, quiet=as_json) as progress:

        def score(backend: Backend) -> float:
            return measure(backend, text, options.chunks, progress).perplexity

        found, path = calibrate_cut(options, text, context.env, progress, score)
    print(report_codec(found, path, as_json=as_json))
    return 0


def windows(n_tokens: int, length: int, n_most: int | None = None) -> Iterator[Window]:
    """Cut a text into windows that overlap by half, so that every token is scored once.

    Args:
        n_tokens: Tokens of the text.
        length: Most tokens of a window, 2 or more.
        n_most: Stop after so many windows.
    """
    n_context = length // 2
    start, scored, n_made = 0, 0, 0
    while scored < n_tokens and (n_most is None or n_made < n_most):
        end = min(start + length, n_tokens)
        yield Window(start, end, scored - start)
        start, scored, n_made = end - n_context, end, n_made + 1


def measure(backend: Backend, text: str, n_most: int | None, listener: Listener) -> Score:
    """Score `text`; the first token has nothing before it unless the model starts with BOS."""
    vocab = backend.vocab
    tokens = vocab.tokenize(text, add_special=False, parse_special=False)
    first = [vocab.bos] if vocab.add_bos and vocab.bos is not None else []
    length = backend.n_ctx - len(first)
    started_s = time.perf_counter()
    losses: list[Losses] = []
    n_bytes = 0
    for window in windows(len(tokens), length, n_most):
        lead_in = window.n_context or (0 if first else 1)
        listener(PrefillProgress(window.start, len(tokens)))
        part = first + tokens[window.start : window.end]
        losses.append(_losses(backend, part, len(first) + lead_in))
        scored = tokens[window.start + lead_in : window.end]
        n_bytes += sum(len(vocab.piece(token)) for token in scored)
    listener(PrefillProgress(len(tokens), len(tokens)))
    nats = np.concatenate(losses) if losses else np.empty(0)
    if nats.size == 0:
        raise ConfigError("the text is too short to score", hint="two tokens are the least")
    if nats.size == len(tokens):
        n_bytes = len(text.encode())
    mean = float(nats.mean())
    return Score(
        model="", text="", n_ctx=backend.n_ctx, n_tokens=nats.size, n_bytes=n_bytes,
        nats_per_token=mean,
        nats_per_token_stderr=float(nats.std() / math.sqrt(nats.size)),
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=float(nats.sum()) / math.log(2) / max(1, n_bytes),
        tokens_per_s=nats.size / max(1e-9, time.perf_counter() - started_s),
    )  # fmt: skip


def _losses(backend: Backend, tokens: Sequence[int], n_lead_in: int) -> Losses:
    """Return -log p of tokens[n_lead_in:], in nats."""
    backend.truncate(0)
    most = min(backend.n_batch, backend.n_logits_max)
    wanted: list[Losses] = []
    position = 0
    last = len(tokens) - 1  # nothing follows the last token, so it is not decoded
    while position < last:
        end = min(last, position + most)
        n_logits = min(end - position, max(0, end - (n_lead_in - 1)))
        logits = backend.decode(tokens[position:end], position, n_logits)
        targets = np.asarray(tokens[end - n_logits + 1 : end + 1], dtype=np.intp)
        if n_logits:
            wanted.append(_negative_log_probability(logits, targets))
        position = end
    return np.concatenate(wanted) if wanted else np.empty(0)


def _negative_log_probability(
    logits: NDArray[np.float32],
    targets: NDArray[np.intp],
) -> Losses:
    """Log-softmax of (n, n_vocab) at (n,) targets, negated."""
    highest = logits.max(axis=1, keepdims=True)
    total = np.exp((logits - highest).astype(np.float64)).sum(axis=1)
    chosen = logits[np.arange(len(targets)), targets].astype(np.float64)
    result: Losses = np.log(total) + highest[:, 0] - chosen
    return result


def _words(score: Score) -> str:
    return (
        f"{score.n_tokens:,} tokens, {score.n_bytes:,} bytes, context {score.n_ctx:,}\n"
        f"perplexity {score.perplexity:.4f}\n"
        f"bits per byte {score.bits_per_byte:.4f}\n"
        f"nats per token {score.nats_per_token:.4f} +- {score.nats_per_token_stderr:.4f}"
    )
