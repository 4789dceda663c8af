"""A whole model that computes as if it were cut, for measuring what a codec at the cut costs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.cli.calibrate_codec import DEFAULT_QUALITY, Cut, calibrate_codec
from edgert.cli.opening import embedded_model, memory_budget, model_path, run_interruptible
from edgert.codec_bounds import CodecBound, keep_bound
from edgert.config import directories
from edgert.errors import CapacityError, ConfigError
from edgert.units import format_bytes
from edgert.weights.packed import model_key
from quant.model_spec import ModelSpec, read_model_spec
from quant.tensor_file import TensorFile, open_tensor_file

if TYPE_CHECKING:
    from edgert.cli.options import EvalOptions, ModelFlags
    from edgert.events import Listener
    from edgert.llama.backend import Backend
    from edgert.llama.tap import Tap

LEAST_TEXT_BYTES = 4096
_LOGITS_BYTES = 64 << 20
_PROGRAM_BYTES = 300 << 20  # interpreter, libraries, compute buffers and KV cache, assumed
_WINDOW = 512

Score = Callable[["Backend"], float]


def calibrate_cut(
    options: EvalOptions, text: str, env: Mapping[str, str], listener: Listener, score: Score
) -> tuple[CodecBound, Path]:
    """Find the loosest bound that keeps the quality at `options.cut`, and keep it.

    Args:
        options: They name the model, the cut and the quality.
        text: To calibrate on.
        env: Environment variables.
        listener: Told about progress.
        score: Returns the perplexity of the text.

    Raises:
        ConfigError: the text is too short, or the model has no such cut.
    """
    n_bytes, cut = len(text.encode()), options.cut or 0
    if n_bytes < LEAST_TEXT_BYTES:
        raise ConfigError(
            f"a text of {n_bytes:,} bytes is too short to calibrate on, wanted {LEAST_TEXT_BYTES:,}"
        )
    quality = DEFAULT_QUALITY if options.model.quality is None else options.model.quality
    file = open_tensor_file(model_path(options.model, env) or embedded_model())
    spec = read_model_spec(file)
    check_cut(spec, cut)
    backend, tap = open_cut_model(file, spec, options.model, listener)
    place = Cut(tap, cut, spec.n_embd, lambda: score(backend))
    found = run_interruptible(backend, lambda: calibrate_codec(place, quality))
    basis = found.settings.basis
    bound = CodecBound(
        model=model_key(file), cut=cut, bound=found.settings.bound, quality=quality,
        basis=None if basis is None else basis.digest.hex(),
        text_bytes=n_bytes,
        reference_perplexity=found.reference_perplexity,
        perplexity=found.perplexity,
        bytes_per_token=found.bytes_per_token,
        bytes_per_batched_token=found.bytes_per_batched_token,
        f16_bytes=2 * spec.n_embd,
    )  # fmt: skip
    return bound, keep_bound(directories(env).cache / "codecs", bound, basis)


def check_cut(spec: ModelSpec, cut: int) -> None:
    """Raise ConfigError unless there are layers on both sides."""
    if not 1 <= cut < spec.n_layer:
        raise ConfigError(
            f"a model of {spec.n_layer} layers cannot be cut after {cut}",
            hint=f"--cut 1 to {spec.n_layer - 1}",
        )


def open_cut_model(
    file: TensorFile, spec: ModelSpec, flags: ModelFlags, listener: Listener
) -> tuple[Backend, Tap]:
    """Open a model for scoring, with its tap."""
    from edgert.llama.options import LoadOptions
    from edgert.llama.tapped import open_tapped

    left = memory_budget(flags) - _PROGRAM_BYTES
    if left <= 0:
        raise CapacityError(
            f"{format_bytes(left + _PROGRAM_BYTES)} are allowed, {format_bytes(_PROGRAM_BYTES)} "
            "are taken besides the weights",
            needed_bytes=_PROGRAM_BYTES,
            available_bytes=left + _PROGRAM_BYTES,
            hint="raise --memory",
        )
    n_ctx = flags.ctx_size or min(_WINDOW, spec.n_ctx_train)
    n_batch = min(flags.batch_size or _WINDOW, n_ctx)
    options = LoadOptions(
        model=file.path, weight_memory_bytes=left, n_ctx=n_ctx, n_batch=n_batch,
        n_logits_max=min(n_batch, max(1, _LOGITS_BYTES // (4 * spec.n_vocab))),
        n_ubatch=flags.ubatch_size,
        n_threads=flags.threads,
        n_threads_batch=flags.threads_batch,
        type_k=flags.cache_type_k,
        type_v=flags.cache_type_v,
    )  # fmt: skip
    return open_tapped(options, file, listener)
