"""What a model with nested experts predicts at each width, beside the model it was made of."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.atomic_file import write_error
from edgert.cli.divergence import Divergence, diverge
from edgert.cli.opening import open_backend, read_text, run_interruptible
from edgert.errors import ConfigError
from quant.nested.code import Floats, decode
from quant.nested.file import NestedModel
from quant.nested.source import TensorReader
from quant.nested.writer import write_plain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from edgert.cli.options import ModelFlags
    from edgert.events import Listener
    from edgert.llama.backend import Backend

LOGITS_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Comparison:
    """A reference that is open, and what others are to be compared with it on.

    Attributes:
        reference: The original.
        flags: How it was opened; candidates are opened alike.
        env: Environment variables.
        text: What both predict.
        chunks: Only so many windows of it, None for all.
        listener: Told about progress.
    """

    reference: Backend
    flags: ModelFlags
    env: Mapping[str, str]
    text: str
    chunks: int | None
    listener: Listener

    def against(self, path: Path) -> Divergence:
        """Return how far the model at `path` strays."""
        flags = replace(self.flags, path=None, model=str(path))
        _, candidate = open_backend(flags, self.env, self.listener, logits_bytes=LOGITS_BYTES)
        return run_interruptible(
            candidate,
            lambda: diverge(self.reference, candidate, self.text, self.chunks, self.listener),
        )


def evaluate_widths(
    model: NestedModel,
    flags: ModelFlags,
    evaluated: tuple[str, int | None],
    env: Mapping[str, str],
    listener: Listener,
) -> dict[int, Divergence]:
    """Return perplexity and divergence at every width.

    The experts of one width after the other are written as halves into a temporary folder.

    Args:
        model: Where the codes are.
        flags: They name the source.
        evaluated: File of the text, and how many windows of it, None for all.
        env: Environment variables.
        listener: Told about progress.
    """
    text = read_text(evaluated[0])
    if not text:
        raise ConfigError(f"{evaluated[0]}: the text is empty")
    shapes = {name: tensor.entry.shape for name, tensor in model.tensors.items()}
    results = {}
    _, reference = open_backend(flags, env, listener, logits_bytes=LOGITS_BYTES)
    comparison = Comparison(reference, flags, env, text, evaluated[1], listener)
    try:
        with TensorReader(model.file) as reader:
            for width in range(model.base, model.top + 1):

                def values(name: str, expert: int, width: int = width) -> Floats:
                    tensor = model.tensor(name)
                    prefix = model.read(name, expert, width)
                    return decode(prefix, tensor.layout, width, tensor.gain(width))

                with tempfile.TemporaryDirectory(prefix="edgert-nested-") as folder:
                    path = Path(folder) / f"{width}-bits.gguf"
                    write_values(path, reader, shapes, values)
                    results[width] = comparison.against(path)
    finally:
        reference.close()
    return results


def write_values(
    path: Path,
    reader: TensorReader,
    shapes: Mapping[str, tuple[int, ...]],
    values: Callable[[str, int], Floats],
) -> None:
    """Write the model of `reader` with these weights in place of its experts.

    Raises:
        CapacityError: the disk is full.
        ConfigError: the file cannot be written.
    """
    try:
        with path.open("wb") as stream:
            write_plain(stream, reader, shapes, values)
    except OSError as error:
        raise write_error(path, error) from error
