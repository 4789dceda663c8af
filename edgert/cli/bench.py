"""`edgert bench`: prefill and decode of random tokens, shaped like llama-bench, with its limits."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from devices.host import cpu_name, peak_group_bytes, peak_resident_bytes
from devices.measure_flash import measure_flash
from edgert.cli import bench_manifest
from edgert.cli.bench_experts import PassLog, routing_trace
from edgert.cli.bench_report import Run, Sample, Setup, Trial, report
from edgert.cli.deploying import open_deployment
from edgert.cli.opening import Recording, Room, open_backend, run_interruptible, trace_path
from edgert.cli.progress import ProgressListener
from edgert.errors import ConfigError, MeasurementError
from edgert.llama.options import LoadOptions
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

if TYPE_CHECKING:
    from edgert.cli.bench_options import BenchFlags, BenchOptions
    from edgert.cli.command import Context
    from edgert.cli.options import ModelFlags
    from edgert.llama.backend import Backend, Counters

Clock = Callable[[], float]


def run(options: BenchOptions, context: Context) -> int:
    """Measure, print the report and return the exit code."""
    with ProgressListener(context, quiet=options.output.json) as progress:
        deployment = open_deployment(options.model, options.deployment, context, progress)
    if deployment is not None:
        return bench_manifest.run(options, context, deployment)
    if options.calibrate:
        raise ConfigError("--calibrate wants a manifest", hint="--manifest FILE")
    bench = options.bench
    kinds = trials(bench)
    room = _room(options.model, kinds)
    form = "json" if options.output.json else bench.output
    with (
        ProgressListener(context, quiet=form != "md") as progress,
        routing_trace(options.routing, context) as routing,
    ):
        started_s = time.perf_counter()
        path, backend = open_backend(
            options.model, context.env, progress, room=room,
            recording=Recording(trace_path(options.trace), routing),
        )  # fmt: skip
        load_s = time.perf_counter() - started_s
        progress.clear()

        def work() -> tuple[list[tuple[Trial, list[Sample]]], Counters]:
            found = [(kind, measure(backend, kind, bench, time.perf_counter)) for kind in kinds]
            return found, backend.counters()

        samples, counters = run_interruptible(backend, work)
        setup = _describe(path, options, counters, load_s)
    runs = [Run(setup, kind, tuple(found)) for kind, found in samples]
    print(report(runs, form), flush=True)
    return 0


def trials(bench: BenchFlags) -> list[Trial]:
    """Return what is to be measured.

    Raises:
        ConfigError: it is nothing, or several texts and no test that continues them.
    """
    if bench.parallel > 1 and not bench.n_gen:
        raise ConfigError(
            f"--parallel {bench.parallel} is for the decode test, and -n is 0",
            hint="-n 128, or leave out --parallel",
        )
    kinds = [Trial(bench.n_prompt, 0)] if bench.n_prompt else []
    kinds += [Trial(0, bench.n_gen, bench.parallel)] if bench.n_gen else []
    if not kinds:
        raise ConfigError("nothing to measure: -p and -n are both 0")
    return kinds


def _room(flags: ModelFlags, kinds: Sequence[Trial]) -> Room:
    """Return the context that every test fits into; all texts of one share its positions."""
    n_ctx = max(kind.n_parallel * (kind.n_prompt + kind.n_gen) for kind in kinds)
    n_sequences = max(kind.n_parallel for kind in kinds)
    if flags.ctx_size is not None and flags.ctx_size < n_ctx:
        raise ConfigError(
            f"context {flags.ctx_size} is too small for a test of {n_ctx} tokens",
            hint=f"-c {n_ctx}, or a smaller -p, -n or --parallel",
        )
    if flags.batch_size is not None and flags.batch_size < n_sequences:
        raise ConfigError(
            f"--parallel {n_sequences} decodes as many tokens at once, "
            f"--batch-size allows {flags.batch_size}",
            hint=f"-b {n_sequences}, or a smaller --parallel",
        )
    return Room(n_ctx, n_sequences)


def measure(backend: Backend, kind: Trial, bench: BenchFlags, clock: Clock) -> list[Sample]:
    """Run one test after a warm-up, as llama-bench does: from an empty context every time."""
    source = random.Random(bench.bench_seed)
    n_vocab = backend.vocab.n_tokens
    n_tokens = kind.n_prompt or kind.n_gen
    texts = [[source.randrange(n_vocab) for _ in range(n_tokens)] for _ in range(kind.n_parallel)]
    if backend.vocab.add_bos and backend.vocab.bos is not None:
        for tokens in texts:
            tokens[0] = backend.vocab.bos
    step = backend.n_batch if kind.n_prompt else 1
    _decode(backend, texts if kind.n_prompt else [tokens[:1] for tokens in texts], step)
    return [_sample(backend, texts, step, clock) for _ in range(bench.repetitions)]


def _sample(backend: Backend, texts: list[list[int]], step: int, clock: Clock) -> Sample:
    log, before = PassLog(backend, clock), backend.counters()
    started_s = clock()
    _decode(backend, texts, step, log)
    duration_s, after = clock() - started_s, backend.counters()
    return Sample(
        n_tokens=sum(map(len, texts)),
        duration_s=duration_s - log.spent_s,
        n_passes=after.n_passes - before.n_passes,
        decode_s=after.decode_s - before.decode_s,
        stall_s=after.stall_s - before.stall_s,
        bytes_read=after.bytes_read - before.bytes_read,
        experts=log.counters(),
        expert_passes=tuple(log.passes),
    )


def _decode(
    backend: Backend, texts: list[list[int]], step: int, log: PassLog | None = None
) -> None:
    """Decode one text `step` tokens at a time, or several together, a token of each at a time."""
    backend.truncate(0)
    if len(texts) > 1:
        every = list(range(len(texts)))
        for position, column in enumerate(zip(*texts, strict=True)):
            backend.decode_sequences(column, [position] * len(texts), every)
            if log is not None:
                log.note()
        return
    (tokens,) = texts
    for start in range(0, len(tokens), step):
        part = tokens[start : start + step]
        is_last = start + step >= len(tokens)
        backend.decode(part, start, 1 if is_last or step == 1 else 0)
        if log is not None:
            log.note()


def _describe(path: Path, options: BenchOptions, counters: Counters, load_s: float) -> Setup:
    flags = options.model
    file = open_tensor_file(path)
    spec = read_model_spec(file)
    load = LoadOptions(
        path,
        n_batch=flags.batch_size or LoadOptions(path).n_batch,
        n_threads=flags.threads,
        n_threads_batch=flags.threads_batch,
    )
    n_threads, n_threads_batch = load.threads()
    flash = None
    if counters.streaming:
        try:
            # After closing the backend: its buffers come out of the same budget.
            flash = measure_flash(path).value
        except MeasurementError:
            flash = None
    return Setup(
        model_filename=str(path),
        model_type=f"{spec.architecture} {spec.name}",
        model_size=file.weight_bytes,
        model_n_params=sum(_n_elements(tensor.shape) for tensor in file.tensors),
        cpu_info=cpu_name(),
        n_batch=load.n_batch,
        n_ubatch=flags.ubatch_size or load.n_batch,
        n_threads=n_threads,
        n_threads_batch=n_threads_batch,
        type_k=flags.cache_type_k,
        type_v=flags.cache_type_v,
        layout=counters.layout,
        streaming=counters.streaming,
        budget_bytes=counters.budget_bytes,
        resident_weight_bytes=counters.resident_weight_bytes,
        pinned_bytes=counters.pinned_bytes,
        load_ms=1e3 * load_s,
        peak_memory_bytes=peak_resident_bytes(),
        peak_group_bytes=peak_group_bytes(),
        flash_bytes_per_s=flash,
    )


def _n_elements(shape: tuple[int, ...]) -> int:
    n_elements = 1
    for length in shape:
        n_elements *= length
    return n_elements
