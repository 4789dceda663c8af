"""Proves a nested model's planes by their hashes: once for a file, and remembered."""

from __future__ import annotations

from pathlib import Path

from edgert.atomic_file import write_file
from edgert.errors import ConfigError
from edgert.events import Listener, Notice
from edgert.units import format_bytes
from edgert.weights.packed import model_key
from quant.nested.file import read_nested
from quant.tensor_file import TensorFile


def prove_nested(file: TensorFile, folder: Path, listener: Listener) -> None:
    """Compare every nested tensor with its hash, unless this very file was proved before.

    Args:
        file: The validated model; nothing happens if it is not nested.
        folder: Where it is remembered that a file was proved, by its header, length and age.
        listener: Told that it takes a while.

    Raises:
        FormatError: planes are damaged, reordered or another model's; names the tensor.
    """
    nested = read_nested(file)
    if nested is None:
        return
    proof = folder / f"{model_key(file)[:32]}.proved"
    if proof.exists():
        return
    size = format_bytes(sum(tensor.entry.size_bytes for tensor in nested.tensors.values()))
    listener(Notice(f"checking {size} of planes against their hashes, once"))
    for name in nested.tensors:
        nested.verify(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(proof, b"", replace=True)
    except (OSError, ConfigError) as error:
        listener(Notice(f"cannot remember that they are right: {error}"))
