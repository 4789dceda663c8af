"""Loads a model without its weights and learns from its graph which ones it uses."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from dataclasses import dataclass

from edgert.llama.context import LlamaContext
from edgert.llama.interrupts import interrupts_deferred
from edgert.llama.lib import LlamaLibrary
from edgert.llama.model import LlamaModel
from edgert.llama.options import LoadOptions
from edgert.llama.part_graph import PartRun
from edgert.llama.tap import Tap
from edgert.weights.budget import Footprint, footprint
from edgert.weights.memory import cover_twin
from edgert.weights.uses import WeightUse, record_uses
from quant.tensor_file import TensorFile

_LOADING = threading.Lock()


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model whose weights are absent, with a tapped context.

    Attributes:
        model: The model.
        context: Its context, which calls `tap`.
        tap: Without an observer yet.
        uses: Every weight the graphs use, by name.
        before: This process before the context existed.
        after: And right after.
    """

    model: LlamaModel
    context: LlamaContext
    tap: Tap
    uses: dict[str, WeightUse]
    before: Footprint
    after: Footprint


def load_absent(
    library: LlamaLibrary,
    file: TensorFile,
    options: LoadOptions,
    stack: ExitStack,
    part: PartRun | None = None,
) -> LoadedModel:
    """Load everything but the weights; what was made is freed by `stack`.

    Args:
        library: The checked libraries.
        file: The validated model.
        options: For its context.
        stack: Frees it.
        part: How it is run if it is a part of a model.

    Raises:
        CapacityError: the KV cache or the compute buffers cannot be allocated.
        BackendError: llama.cpp refuses the model.
    """
    # One at a time: a twin of another thread must not be covered while llama.cpp still reads it,
    # and what a context takes is told from what the process has before and after it.
    with _LOADING, interrupts_deferred(lambda: None):
        model = LlamaModel(library, file)
        stack.callback(model.close)
        cover_twin(library.libc)
        model.forget_files()
        tap = Tap(library)
        before = footprint()
        context = LlamaContext(model, options, tap.callback)
        stack.callback(context.close)
        after = footprint()
        names = frozenset(entry.name for entry in file.tensors)
        uses = record_uses(context, tap, names, part)
    return LoadedModel(model, context, tap, uses, before, after)
