"""Runs a calibration text through a model and keeps what its experts' inputs amount to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from edgert.cli.opening import memory_budget, read_text
from edgert.errors import CapacityError, ConfigError, FormatError
from edgert.events import Notice
from edgert.units import format_bytes
from quant.model_spec import read_model_spec
from quant.nested.encoder import moments_stack
from quant.nested.moments import Moments

if TYPE_CHECKING:
    from pathlib import Path

    from edgert.cli.options import ModelFlags
    from edgert.events import Listener
    from edgert.llama.expert_inputs import Ids, Rows
    from edgert.weights.loading import LoadedModel
    from quant.nested.source import ExpertStack
    from quant.tensor_file import TensorFile

LEAST_TOKENS = 2048
_MOST_TOKENS = 1 << 15
_WINDOW = 512
_LOGITS_BYTES = 64 << 20
_MOST_MOMENTS_BYTES = 2 << 30
_LARGEST_INPUT = 1e15  # sums of squares of many of them are still numbers
_PROGRAM_BYTES = 300 << 20  # interpreter, libraries, compute buffers and KV cache, assumed


def gather(
    file: TensorFile,
    stacks: Mapping[str, ExpertStack],
    text_path: str,
    flags: ModelFlags,
    listener: Listener,
) -> dict[str, Moments]:
    """Return the moments of the inputs of every stack, by name.

    Raises:
        ConfigError: the text is too short, with the least number of tokens.
        FormatError: what enters experts is no number, or too large: the model is damaged.
        CapacityError: the model and the moments do not fit in memory.
    """
    from edgert.llama.expert_inputs import run_experts
    from edgert.llama.options import LoadOptions

    text = read_text(text_path)
    spec = read_model_spec(file)
    shared = moments_stack(stacks)
    observed = dict.fromkeys(shared.values())
    share = _MOST_MOMENTS_BYTES // len(observed)
    moments = {
        name: Moments.empty(stacks[name].n_expert, stacks[name].matrix_shape[1], share)
        for name in observed
    }
    n_diagonal = sum(not own.is_full for own in moments.values())
    if n_diagonal:
        listener(
            Notice(
                f"the rows of {n_diagonal} of {len(moments)} kinds of inputs are too long to make "
                "up for errors: only their scales are calibrated"
            )
        )
    n_ctx = flags.ctx_size or min(_WINDOW, spec.n_ctx_train)
    n_batch = flags.batch_size or min(_WINDOW, n_ctx)
    options = LoadOptions(
        model=file.path,
        weight_memory_bytes=_left(flags, sum(own.sums.nbytes for own in moments.values())),
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_logits_max=min(n_batch, max(1, _LOGITS_BYTES // (4 * spec.n_vocab))),
        n_threads=flags.threads,
        n_threads_batch=flags.threads_batch,
    )

    def windows(loaded: LoadedModel) -> Sequence[Sequence[int]]:
        return _windows(loaded, text, text_path, n_ctx)

    takers = {name: _adder(own, file.path) for name, own in moments.items()}
    run_experts(file, options, windows, takers, listener)
    return {name: moments[first] for name, first in shared.items()}


def _adder(moments: Moments, path: Path) -> Callable[[str, Rows, Ids], None]:
    def add(name: str, rows: Rows, experts: Ids) -> None:
        bad = ~(np.abs(rows) <= _LARGEST_INPUT)
        if bad.any():
            raise FormatError(
                f"{rows[bad][0]} enters its experts, wanted numbers up to {_LARGEST_INPUT:g}: "
                "weights before it are damaged",
                path=path,
                tensor=name,
            )
        moments.add(rows, experts)

    return add


def _windows(loaded: LoadedModel, text: str, place: str, n_ctx: int) -> list[list[int]]:
    vocab = loaded.model.vocab
    tokens = vocab.tokenize(text, add_special=False, parse_special=False)[:_MOST_TOKENS]
    if len(tokens) < LEAST_TOKENS:
        raise ConfigError(
            f"{place}: {len(tokens):,} tokens to calibrate with, wanted at least {LEAST_TOKENS:,}",
            hint="name a longer text of the kind that the model will see",
        )
    first = [vocab.bos] if vocab.add_bos and vocab.bos is not None else []
    step = n_ctx - len(first)
    return [first + list(tokens[start : start + step]) for start in range(0, len(tokens), step)]


def _left(flags: ModelFlags, moments_bytes: int) -> int:
    """Return the memory for weights while moments are gathered."""
    budget = memory_budget(flags)
    left = budget - moments_bytes - _PROGRAM_BYTES
    if left <= 0:
        raise CapacityError(
            f"calibration takes {format_bytes(moments_bytes + _PROGRAM_BYTES)} besides the "
            f"weights, {format_bytes(budget)} are allowed",
            needed_bytes=moments_bytes + _PROGRAM_BYTES,
            available_bytes=budget,
            hint="raise --memory, or leave out --calib",
        )
    return left
