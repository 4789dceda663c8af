"""What a model with nested experts predicts at each width, beside the model it was made of."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.cli.divergence import Divergence, diverge
from edgert.cli.opening import open_backend, read_text, run_interruptible
from edgert.errors import ConfigError
from quant.nested.code import Floats, decode
from quant.nested.file import NestedModel
from quant.nested.source import TensorReader
from quant.nested.writer import write_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgert.cli.command import Context
    from edgert.cli.options import ModelFlags
    from edgert.events import Listener

_LOGITS_BYTES = 64 << 20


def evaluate_widths(
    model: NestedModel,
    flags: ModelFlags,
    text_path: str,
    chunks: int | None,
    context: Context,
    listener: Listener,
) -> dict[int, Divergence]:
    """Return perplexity and divergence at every width; `flags` name the source.

    The experts of one width after the other are written as halves into a temporary folder.
    """
    text = read_text(text_path)
    if not text:
        raise ConfigError(f"{text_path}: the text is empty")
    shapes = {name: tensor.entry.shape for name, tensor in model.tensors.items()}
    results = {}
    with TensorReader(model.file) as reader:
        for width in range(model.base, model.top + 1):

            def values(name: str, expert: int, width: int = width) -> Floats:
                layout = model.tensor(name).layout
                return decode(model.read(name, expert, width), layout, width)

            with tempfile.TemporaryDirectory(prefix="edgert-nested-") as folder:
                path = Path(folder) / f"{width}-bits.gguf"
                write_values(path, reader, shapes, values)
                results[width] = compare(path, flags, text, chunks, context, listener)
    return results


def write_values(
    path: Path,
    reader: TensorReader,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str, int], Floats],
) -> None:
    """Write the model of `reader` with these weights in place of its experts."""
    with path.open("wb") as stream:
        write_plain(stream, reader, shapes, values)


def compare(
    path: Path,
    flags: ModelFlags,
    text: str,
    chunks: int | None,
    context: Context,
    listener: Listener,
) -> Divergence:
    """Run two models over a text: the one of `flags` and the one at `path`."""
    _, reference = open_backend(flags, context.env, listener, logits_bytes=_LOGITS_BYTES)
    try:
        candidate_flags = replace(flags, path=None, model=str(path))
        _, candidate = open_backend(
            candidate_flags, context.env, listener, logits_bytes=_LOGITS_BYTES
        )
        return run_interruptible(
            candidate, lambda: diverge(reference, candidate, text, chunks, listener)
        )
    finally:
        reference.close()
