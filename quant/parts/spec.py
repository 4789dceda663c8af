"""What a part has of a model, and how its tensors are called there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

EMBEDDING, OUTPUT, OUTPUT_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
OUTPUT_BIAS = "output.bias"

# A head alone has the simplest graph; every verified one ends in the same norm and product.
_EXIT_ARCHITECTURE = "llama"
# llama.cpp wants as many query rows as columns in qwen2, which a share has not. This one's graph
# computes the same in the same order, without that rule.
_SHARE_ARCHITECTURES = {"qwen2": "seed_oss"}
_SHARE_NAMES = {"qwen2": {"ffn_norm.weight": "post_attention_norm.weight"}}

_LAYER = re.compile(r"blk\.(\d{1,5})\.(.+)")


@dataclass(frozen=True, slots=True)
class Share:
    """Groups `[first_group, end_group)` of `n_groups` of KV heads, and as much of the FFN."""

    first_group: int
    end_group: int
    n_groups: int


@dataclass(frozen=True, slots=True)
class HeadRows:
    """The logits of tokens `[first, end)`."""

    first: int
    end: int


Head = Literal["none", "whole"] | HeadRows


@dataclass(frozen=True, slots=True)
class PartSpec:
    """What a part has.

    Attributes:
        first_layer: First of its layers, in the model's numbers.
        end_layer: One past the last; as `first_layer` for an end without layers.
        embedding: Whether tokens enter: it has their embeddings and the tokenizer. Hidden states
            enter every other part.
        head: Of final norm and output product.
        share: Of every layer; None for all of it.
    """

    first_layer: int
    end_layer: int
    embedding: bool
    head: Head
    share: Share | None = None

    @property
    def n_layer(self) -> int:
        """How many layers it has of the model."""
        return self.end_layer - self.first_layer

    @property
    def is_entrance(self) -> bool:
        """Whether it is embeddings and tokenizer alone, which llama.cpp opens for the latter."""
        return self.n_layer == 0 and self.head == "none"

    @property
    def is_exit(self) -> bool:
        """Whether it is the head alone, behind a layer of zeros that changes nothing."""
        return self.n_layer == 0 and self.head != "none"

    def describe(self) -> str:
        """Say in words what it has."""
        words = [f"layers {self.first_layer} to {self.end_layer}"] if self.n_layer else []
        if self.share is not None:
            share = self.share
            words.append(f"groups {share.first_group} to {share.end_group} of {share.n_groups}")
        if self.embedding:
            words.append("embeddings")
        if isinstance(self.head, HeadRows):
            words.append(f"logits {self.head.first} to {self.head.end}")
        elif self.head == "whole":
            words.append("head")
        return ", ".join(words)


@dataclass(frozen=True, slots=True)
class Names:
    """Names of a part's tensors against those of the whole model.

    llama.cpp wants embeddings and a norm in every model. Where no tokens enter, the matrix of the
    output takes the embeddings' place, as in a model whose two are one; where there is no output
    either, `token_embd.weight` and `output_norm.weight` are zeros that nobody reads.

    Attributes:
        spec: What the part has.
        tied: Whether the whole model has one matrix for both.
        architecture: Of the whole model.
    """

    spec: PartSpec
    tied: bool
    architecture: str

    @property
    def part_architecture(self) -> str:
        """The architecture that llama.cpp is told."""
        if self.spec.is_exit:
            return _EXIT_ARCHITECTURE
        if self.spec.share is None:
            return self.architecture
        return _SHARE_ARCHITECTURES.get(self.architecture, self.architecture)

    def part_name(self, whole_name: str) -> str | None:
        """Return what a tensor of the whole model is called in the part, None if it has none."""
        spec = self.spec
        layer = _LAYER.fullmatch(whole_name)
        if layer is not None:
            number = int(layer[1])
            if not spec.first_layer <= number < spec.end_layer:
                return None
            renamed = self._of_layers().get(layer[2], layer[2])
            return f"blk.{number - spec.first_layer}.{renamed}"
        if whole_name == EMBEDDING:
            return EMBEDDING if spec.embedding or (self.tied and spec.head != "none") else None
        if whole_name == OUTPUT:
            if spec.head == "none":
                return None
            return OUTPUT if spec.embedding else EMBEDDING
        if whole_name in (OUTPUT_NORM, OUTPUT_BIAS):
            return None if spec.head == "none" else whole_name
        return whole_name if spec.n_layer else None

    def whole_name(self, part_name: str) -> str | None:
        """Return what a tensor of the part is called in the whole model, None for zeros."""
        spec = self.spec
        layer = _LAYER.fullmatch(part_name)
        if layer is not None:
            number = int(layer[1]) + spec.first_layer
            if number >= spec.end_layer:
                return None
            names = {own: whole for whole, own in self._of_layers().items()}
            return f"blk.{number}.{names.get(layer[2], layer[2])}"
        if part_name == EMBEDDING and not spec.embedding:
            if spec.head == "none":
                return None
            return EMBEDDING if self.tied else OUTPUT
        if part_name == OUTPUT_NORM and spec.head == "none":
            return None
        return part_name

    def _of_layers(self) -> Mapping[str, str]:
        """Return the part's names of what the model calls otherwise, without the layer."""
        return {} if self.spec.share is None else _SHARE_NAMES.get(self.architecture, {})
