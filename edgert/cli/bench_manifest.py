"""`edgert bench --manifest`: what the plan predicted and what was measured, side by side."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING

from devices.host import peak_group_bytes, peak_resident_bytes
from edgert.cli.bench_experts import PassLog, Row, in_words, routing_trace, summary
from edgert.cli.opening import run_interruptible, trace_path
from edgert.cli.progress import ProgressListener
from edgert.errors import ConfigError
from edgert.observer import UNOBSERVED
from edgert.receipt import Receipt, as_row
from edgert.trace_file import record_to
from edgert.units import format_bytes
from partition.manifest import Manifest

if TYPE_CHECKING:
    from edgert.cli.bench_options import BenchOptions
    from edgert.cli.command import Context
    from edgert.deployment import Deployment
    from edgert.llama.backend import Backend

Clock = Callable[[], float]

_DEFAULT_TOKENS = 16
_DECIDED = {
    "n_prompt": "--n-prompt", "repetitions": "--repetitions", "parallel": "--parallel",
    "bench_seed": "--seed",
}  # fmt: skip
# Powers of tokens per pass that turn a prediction into one for a pass of a single token.
_SINGLE = {"tpot_ms": 1, "decode_tok_s": -1, "bytes_read_per_token": 1}
_WARM_UP = 2  # tokens whose reads began while nothing was computed


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of a manifest, under the keys of its predictions.

    Attributes:
        load_ms: From opening to ready.
        ttft_ms: The prompt, the first that the process computes.
        tpot_ms: Median of single tokens after the prompt.
        decode_tok_s: Its inverse.
        peak_memory_bytes: Of the control group where one limits it, else of the process.
        bytes_read_per_token: Weights read by a decoded token.
        bytes_sent_per_token: To other hosts and back, headers of frames counted.
    """

    load_ms: float
    ttft_ms: float
    tpot_ms: float
    decode_tok_s: float
    peak_memory_bytes: float
    bytes_read_per_token: float
    bytes_sent_per_token: float = 0.0


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure: predicted, its range, measured."""

    key: str
    predicted: float
    low: float
    high: float
    measured: float

    @property
    def within(self) -> bool:
        """Whether the measurement is in the predicted range; nothing to compare counts as yes."""
        return self.low <= self.measured <= self.high or self.predicted == self.measured == 0

    @property
    def error(self) -> float:
        """Measured over predicted, less one; 0 where nothing was predicted."""
        return self.measured / self.predicted - 1 if self.predicted else 0.0


def run(options: BenchOptions, context: Context, deployment: Deployment) -> int:
    """Execute the manifest, print both sides, correct the profile when asked; 0."""
    for name, flag in _DECIDED.items():
        if context.origins.get(name, "default") == "flag":
            raise ConfigError(f"{flag} is given, and the manifest decides it", hint="leave it out")
    if options.bench.output == "csv":
        raise ConfigError("-o csv: a manifest is compared as md or json", hint="-o json")
    as_json = options.output.json or options.bench.output in ("json", "jsonl")
    recorder = None if (trace := trace_path(options.trace)) is None else record_to(trace)
    n_tokens = _n_tokens(options, deployment.manifest, context)
    with (
        ProgressListener(context, quiet=as_json) as progress,
        routing_trace(options.routing, context) as routing,
    ):
        started_s = time.perf_counter()
        observer = recorder or UNOBSERVED
        backend = deployment.open(progress, observer=observer, routing=routing)
        load_s = time.perf_counter() - started_s
        progress.clear()
        measured, experts = run_interruptible(
            backend, lambda: measure(backend, deployment.manifest, n_tokens, load_s)
        )
    if deployment.manifest.run.draft != "none" and not as_json:
        context.say(
            "note: the plan speculates; single tokens are measured, and its prediction is of a "
            "pass that verifies drafts"
        )
    limited = peak_group_bytes() is not None
    found = compare(deployment.manifest, measured, limited=limited)
    if not limited and not as_json:
        context.say(
            "note: no control group limits this process: its peak leaves out the program's files "
            "in the page cache, which the prediction counts"
        )
    if as_json:
        print(json.dumps(as_record(deployment.manifest, measured, found) | experts))
    else:
        words = in_words(experts)
        print("\n".join([*_table(found), *([] if words is None else ["", words])]))
    for item in found:
        if not item.within:
            context.say(
                f"note: {item.key} is outside its range: {item.measured:.4g} measured, "
                f"{item.low:.4g} to {item.high:.4g} predicted"
            )
    if options.calibrate:
        from edgert.cli.calibrating import calibrate

        calibrate(deployment, measured, context)
    return 0


def measure(
    backend: Backend,
    manifest: Manifest,
    n_tokens: int,
    load_s: float,
    clock: Clock = time.perf_counter,
) -> tuple[Measured, Row]:
    """Run the prompt that the plan was for, then single tokens after it.

    Returns:
        What the manifest predicts, and what experts did during the single tokens.
    """
    source = random.Random(1)
    n_vocab = backend.vocab.n_tokens
    n_prompt = manifest.goal.n_prompt
    prompt = [source.randrange(n_vocab) for _ in range(n_prompt)]
    started_s = clock()
    for start in range(0, n_prompt, backend.n_batch):
        part = prompt[start : start + backend.n_batch]
        backend.decode(part, start, 1)
    ttft_s = clock() - started_s
    seconds: list[float] = []
    before, log = backend.counters(), PassLog(backend, clock)
    for index in range(n_tokens):
        started_s = clock()
        backend.decode([source.randrange(n_vocab)], n_prompt + index, 1)
        seconds.append(clock() - started_s)
        log.note()
    after, experts = backend.counters(), log.counters()
    receipt = (after.receipt or Receipt()).since(before.receipt)
    steady = seconds[_WARM_UP:] or seconds
    tpot_s = median(steady)
    found = Measured(
        load_ms=1e3 * load_s,
        ttft_ms=1e3 * ttft_s,
        tpot_ms=1e3 * tpot_s,
        decode_tok_s=1 / tpot_s,
        peak_memory_bytes=float(peak_group_bytes() or peak_resident_bytes()),
        bytes_read_per_token=(after.bytes_read - before.bytes_read) / n_tokens,
        bytes_sent_per_token=(receipt.sent_bytes + receipt.received_bytes) / n_tokens,
    )
    counters = [] if experts is None else [experts]
    row = summary(counters, log.passes, n_tokens, sum(seconds))
    return found, row | {"receipt": as_row(receipt)}


def compare(
    manifest: Manifest, measured: Measured, *, limited: bool = True
) -> tuple[Comparison, ...]:
    """Pair every prediction with its measurement.

    Args:
        manifest: What predicts; single tokens are measured, so speculation is taken out again.
        measured: One run.
        limited: Whether a control group counted the memory; what a process counts of itself leaves
            out cached files, so only its upper bound is held against it.
    """
    found = []
    for key in Measured.__slots__:
        prediction = getattr(manifest.predicted, key)
        scale = manifest.run.tokens_per_pass ** _SINGLE.get(key, 0)
        value, low, high = (
            scale * bound for bound in (prediction.value, prediction.low, prediction.high)
        )
        if key == "peak_memory_bytes" and not limited:
            low = 0.0
        found.append(Comparison(key, value, low, high, getattr(measured, key)))
    return tuple(found)


def as_record(
    manifest: Manifest, measured: Measured, found: Sequence[Comparison]
) -> dict[str, object]:
    """Return both sides under the same keys, as `edgert bench --json` prints them."""
    return {
        **{key: getattr(measured, key) for key in Measured.__slots__},
        "predicted": {
            item.key: {"value": item.predicted, "low": item.low, "high": item.high}
            for item in found
        },
        "outside": [item.key for item in found if not item.within],
        "model": manifest.model.name,
        "n_prompt": manifest.goal.n_prompt,
        "n_ctx": manifest.run.n_ctx,
        "n_ubatch": manifest.run.n_ubatch,
    }


def _n_tokens(options: BenchOptions, manifest: Manifest, context: Context) -> int:
    room = manifest.run.n_ctx - manifest.goal.n_prompt
    if room < 1:
        raise ConfigError("the context has no room for a token after the prompt of the plan")
    chosen = context.origins.get("n_gen", "default") != "default"
    return min(room, max(1, options.bench.n_gen) if chosen else _DEFAULT_TOKENS)


def _table(found: Sequence[Comparison]) -> list[str]:
    lines = ["| | predicted | range | measured | |", "| --- | --: | --: | --: | --: |"]
    for item in found:
        show = format_bytes if "bytes" in item.key else _number
        low_high = f"{show(item.low)} to {show(item.high)}"
        low_high = f"at most {show(item.high)}" if item.low == 0 < item.high else low_high
        mark = f"{100 * item.error:+.1f} %" + ("" if item.within else " outside")
        lines.append(
            f"| {item.key} | {show(item.predicted)} | {low_high} | {show(item.measured)} | {mark} |"
        )
    return lines


def _number(value: float) -> str:
    return f"{value:.4g}"
