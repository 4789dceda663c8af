"""A part file that is there: what it has, checked against its tensors, and the names in it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from edgert.errors import FormatError
from quant.metadata import ArrayField, ValueType
from quant.parts.keys import KEY, VERSION
from quant.parts.plan import N_ZERO_ROWS
from quant.parts.spec import (
    EMBEDDING,
    OUTPUT,
    OUTPUT_BIAS,
    OUTPUT_NORM,
    Head,
    HeadRows,
    Names,
    PartSpec,
    Share,
)
from quant.tensor_file import TensorFile

_HINT = "make it again with edgert pack"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_N_BOUNDS, _N_SHARE = 2, 3


@dataclass(frozen=True, slots=True)
class Part:
    """What a part file has.

    Attributes:
        file: The file.
        spec: What of the model.
        names: Its tensors' names against the model's.
        source_sha256: Identity of the model's files, see `quant.parts.write.source_identity`.
        n_layer: Of the whole model.
        n_vocab: Of the whole model.
    """

    file: TensorFile
    spec: PartSpec
    names: Names
    source_sha256: str
    n_layer: int
    n_vocab: int

    def part_name(self, whole_name: str) -> str | None:
        """Return what a tensor of the whole model is called here, None if it is not here."""
        name = self.names.part_name(whole_name)
        return name if name in self.file.by_name else None

    def whole_name(self, part_name: str) -> str | None:
        """Return what a tensor of the file is called in the whole model, None for zeros."""
        return self.names.whole_name(part_name)

    @property
    def zeros(self) -> frozenset[str]:
        """Tensors that belong to no tensor of the model."""
        return frozenset(name for name in self.file.by_name if self.whole_name(name) is None)

    def check_source(self, source_sha256: str) -> None:
        """Compare the model that the part was made of with another; FormatError names both."""
        if self.source_sha256 != source_sha256:
            raise FormatError(
                f"made of the model {self.source_sha256[:16]}..., wanted {source_sha256[:16]}...",
                path=self.file.path,
                hint=_HINT,
            )


def read_part(file: TensorFile) -> Part | None:
    """Return what a file has if it is a part, None for a whole model.

    Raises:
        FormatError: keys and tensors contradict each other, or the version is another.
    """
    if not any(key.startswith(KEY) for key in file.metadata):
        return None
    keys = _Keys(file)
    version = keys.number("version")
    if version != VERSION:
        keys.fail("version", f"is {version}, wanted {VERSION}")
    source = keys.text("source")
    if not _SHA256.fullmatch(source):
        keys.fail("source", f"is {source[:80]!r}, wanted a sha256")
    n_layer, n_vocab = keys.number("n_layer"), keys.number("n_vocab")
    spec = _read_spec(keys, n_layer, n_vocab)
    names = Names(spec, keys.flag("tied"), keys.text("architecture"))
    part = Part(file, spec, names, source, n_layer, n_vocab)
    _check_model(keys, part)
    _check_tensors(keys, part)
    return part


def _read_spec(keys: _Keys, n_layer: int, n_vocab: int) -> PartSpec:
    first_layer, end_layer = keys.numbers("layers", _N_BOUNDS)
    if not first_layer <= end_layer <= n_layer:
        keys.fail("layers", f"is {first_layer} to {end_layer} of {n_layer}")
    share = None
    if f"{KEY}share" in keys.file.metadata:
        share = Share(*keys.numbers("share", _N_SHARE))
        if not share.first_group < share.end_group <= share.n_groups or first_layer == end_layer:
            keys.fail("share", f"is {share.first_group} to {share.end_group} of {share.n_groups}")
    embedding = keys.flag("embedding")
    spec = PartSpec(first_layer, end_layer, embedding, _read_head(keys, n_vocab), share)
    if isinstance(spec.head, HeadRows) and embedding:
        keys.fail("embedding", "is true, and the head has some rows only")
    if spec.n_layer == 0 and embedding == (spec.head != "none"):
        keys.fail("layers", "is empty, and it is not either the embeddings or the head")
    return spec


def _read_head(keys: _Keys, n_vocab: int) -> Head:
    head = keys.text("head")
    if head == "none":
        return "none"
    if head == "whole":
        return "whole"
    if head != "rows":
        keys.fail("head", f"is {head[:80]!r}, wanted none, whole or rows")
    first, end = keys.numbers("head_rows", _N_BOUNDS)
    if not first < end <= n_vocab:
        keys.fail("head_rows", f"is {first} to {end} of {n_vocab}")
    return HeadRows(first, end)


def _check_model(keys: _Keys, part: Part) -> None:
    """Compare with what llama.cpp will read."""
    spec, metadata = part.spec, part.file.metadata
    architecture = part.names.part_architecture
    if metadata.get("general.architecture") != architecture:
        whole = part.names.architecture[:80]
        keys.fail("architecture", f"is {whole!r}, general.architecture says otherwise")
    n_layer = part.n_layer if spec.is_entrance else max(1, spec.n_layer)
    if metadata.get(f"{architecture}.block_count") != n_layer:
        keys.fail("layers", f"has {n_layer} layers, {architecture}.block_count says otherwise")
    if spec.embedding == (metadata.get("tokenizer.ggml.model") == "none"):
        keys.fail("embedding", f"is {str(spec.embedding).lower()}, the tokenizer says otherwise")


def _check_tensors(keys: _Keys, part: Part) -> None:
    spec, by_name = part.spec, part.file.by_name
    layers = {entry.layer_index for entry in part.file.tensors} - {None}
    n_layer = 1 if spec.is_exit else spec.n_layer
    if layers != set(range(n_layer)):
        keys.fail("layers", f"has {n_layer} layers, the tensors are of {len(layers)}")
    wanted = {EMBEDDING} if spec.is_entrance else {EMBEDDING, OUTPUT_NORM}
    if spec.embedding and spec.head != "none" and not part.names.tied:
        wanted.add(OUTPUT)
    ends = {name for name in by_name if part.file.by_name[name].layer_index is None}
    if not wanted <= ends or (OUTPUT in ends) != (OUTPUT in wanted):
        keys.fail("head", f"and embedding want {', '.join(sorted(wanted))}")
    if OUTPUT_BIAS in ends and spec.head == "none":
        keys.fail("head", f"is none, and there is {OUTPUT_BIAS}")
    n_rows = _n_rows(part)
    for name in (EMBEDDING, OUTPUT):
        if name in ends and by_name[name].shape[-1] != n_rows:
            keys.fail("head", f"wants {n_rows} rows of {name}, it has {by_name[name].shape[-1]}")


def _n_rows(part: Part) -> int:
    """Return the rows that embeddings and output have."""
    head = part.spec.head
    if isinstance(head, HeadRows):
        return head.end - head.first
    return N_ZERO_ROWS if head == "none" and not part.spec.embedding else part.n_vocab


class _Keys:
    """Typed access to the keys of a part."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file

    def number(self, key: str) -> int:
        value = self.file.metadata.get(KEY + key)
        if self.file.value_types.get(KEY + key) is not ValueType.UINT32:
            self.fail(key, "is missing or no uint32")
        return value if isinstance(value, int) else 0

    def numbers(self, key: str, n_numbers: int) -> tuple[int, ...]:
        value = self.file.metadata.get(KEY + key)
        if not isinstance(value, ArrayField) or value.element_type is not ValueType.UINT32:
            self.fail(key, "is missing or no array of uint32")
        if value.count != n_numbers:
            self.fail(key, f"has {value.count} elements, wanted {n_numbers}")
        return tuple(int(number) for number in value.read())

    def text(self, key: str) -> str:
        value = self.file.metadata.get(KEY + key)
        if not isinstance(value, str):
            self.fail(key, "is missing or no string")
        return value

    def flag(self, key: str) -> bool:
        value = self.file.metadata.get(KEY + key)
        if not isinstance(value, bool):
            self.fail(key, "is missing or no boolean")
        return value

    def fail(self, key: str, message: str) -> NoReturn:
        raise FormatError(f"key {KEY}{key} {message}", path=self.file.path, hint=_HINT)
