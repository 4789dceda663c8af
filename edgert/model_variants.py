"""Whether two files are one model in two precisions: layers of both can follow each other."""

from __future__ import annotations

import hashlib

from edgert.errors import FormatError
from quant.metadata import ArrayField
from quant.model_spec import read_model_spec
from quant.tensor_file import TensorFile

_TOKENIZER = ("model", "pre", "tokens", "token_type", "merges")
_HINT = "name files that were quantized from the same model"


def check_same_model(model: TensorFile, variant: TensorFile) -> None:
    """Compare what layers and tokens of two files have in common.

    Raises:
        FormatError: architecture, layers, width, vocabulary or tokenizer differ; names both values.
    """
    one, other = read_model_spec(model), read_model_spec(variant)
    for what, wanted, saw in (
        ("architecture", one.architecture, other.architecture),
        ("layers", one.n_layer, other.n_layer),
        ("width of hidden states", one.n_embd, other.n_embd),
        ("tokens in the vocabulary", one.n_vocab, other.n_vocab),
        ("sha256 of the tokenizer", tokenizer_sha256(model), tokenizer_sha256(variant)),
    ):
        if saw != wanted:
            raise FormatError(
                f"{what}: {saw}, wanted {wanted} as {model.path.name} has",
                path=variant.path,
                hint=_HINT,
            )


def tokenizer_sha256(file: TensorFile) -> str:
    """Hash what decides which ids a text has."""
    digest = hashlib.sha256()
    for name in _TOKENIZER:
        value = file.metadata.get(f"tokenizer.ggml.{name}")
        content = value.read_bytes() if isinstance(value, ArrayField) else repr(value).encode()
        digest.update(f"{name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()
