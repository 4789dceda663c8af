"""Work and memory of a language model, layer by layer: weights, experts, attention, KV cache.

Pure counting from a file's header; nothing here knows a device or a rate. `partition.units` turns
it into what a search places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from math import prod
from typing import Literal, TypeVar

from edgert.errors import FormatError
from partition.layer_state import AttentionShape, attention_shape, recurrent_bytes
from partition.workload import TensorClass, tensor_class
from quant.formats import format_of
from quant.model_spec import ModelSpec
from quant.tensor_file import TensorEntry, TensorFile

Key = TypeVar("Key")
Role = Literal["every_token", "lookup", "experts"]
LayerKind = Literal["attention", "recurrent", "hybrid", "plain"]

_LOOKUPS = frozenset(
    {"token_embd", "per_layer_token_embd", "position_embd", "token_types"}
    | {"ffn_gate_tid2eid", "d2t", "t2d"}
)
# Weights of layers that carry a state from token to token instead of attending.
_RECURRENT = ("ssm_", "time_mix_", "shortconv")
_KEYS = frozenset({"attn_k", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b"})
_ACTIVATION_BYTES = 4  # hidden states are f32
_STACK_DIMENSIONS = 3  # biases of experts have two and stay whole


@dataclass(frozen=True, slots=True)
class TensorWork:
    """One weight tensor and how one token uses it.

    Attributes:
        name: In the file.
        type_name: ggml type, such as `q4_0`.
        shape: ggml's order, rows first; of experts the last dimension counts them.
        size_bytes: In the file.
        kind: What it does.
        role: Read whole by every token; by looked-up rows; or by the experts that a token wants.
        share: Part of it that takes part in one token: 1, 0 for lookups, used/all of experts, also
            of those that the runtime cannot tell apart and uses whole.
    """

    name: str
    type_name: str
    shape: tuple[int, ...]
    size_bytes: int
    kind: TensorClass
    role: Role
    share: Fraction

    @property
    def flops(self) -> int:
        """Operations for one token: two a weight that takes part."""
        return int(2 * prod(self.shape) * self.share)

    @property
    def active_bytes(self) -> int:
        """Bytes that one token reads; the rows of a lookup are not worth counting."""
        return int(self.size_bytes * self.share)


@dataclass(frozen=True, slots=True)
class ExpertStack:
    """The routed experts of one layer.

    Attributes:
        n_expert: Experts in the stack.
        n_used: Experts that one token wants.
        expert_bytes: All tensors of one expert.
        stack_bytes: All experts.
        by_type: Bytes of the stack by ggml type.
    """

    n_expert: int
    n_used: int
    expert_bytes: float
    stack_bytes: int
    by_type: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class LayerWorkload:
    """One layer, or the tensors before the first (`index` None, `entrance`) or after the last.

    Attributes:
        index: Its number.
        tensors: As the file orders them.
        kind: Whether it attends, carries a recurrent state, both, or neither.
        attention: None where it has none.
        state_bytes: Recurrent state of one sequence, independent of the context.
        experts: Routed experts; None for dense layers.
        predicts: A multi-token-prediction layer, which plain decoding does not run.
    """

    index: int | None
    tensors: tuple[TensorWork, ...]
    kind: LayerKind = "plain"
    attention: AttentionShape | None = None
    state_bytes: int = 0
    experts: ExpertStack | None = None
    predicts: bool = False

    @property
    def weight_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)

    @property
    def dense_bytes(self) -> int:
        """Bytes that every token reads: shared experts and routers count, routed experts do not."""
        return sum(t.size_bytes for t in self.tensors if t.role == "every_token")

    @property
    def lookup_bytes(self) -> int:
        """Bytes of tables of which single rows are read."""
        return sum(t.size_bytes for t in self.tensors if t.role == "lookup")

    @property
    def by_class(self) -> dict[TensorClass, int]:
        """Bytes by class."""
        return _totals((t.kind, t.size_bytes) for t in self.tensors)

    @property
    def by_type(self) -> dict[str, int]:
        """Bytes by ggml type."""
        return _totals((t.type_name, t.size_bytes) for t in self.tensors)

    @property
    def flops_by_type(self) -> dict[str, int]:
        """Operations on weights for one token by ggml type; types without any are left out."""
        return _totals((t.type_name, t.flops) for t in self.tensors if t.flops)

    @property
    def active_by_type(self) -> dict[str, int]:
        """Bytes that one token reads by ggml type; types without any are left out."""
        return _totals((t.type_name, t.active_bytes) for t in self.tensors if t.active_bytes)

    def kept_bytes(self, n_ctx: int, type_k: str = "f16", type_v: str = "f16") -> int:
        """Return KV cache for `n_ctx` positions plus recurrent state."""
        if self.attention is None:
            return self.state_bytes
        return self.attention.cache_bytes(n_ctx, type_k, type_v) + self.state_bytes


@dataclass(frozen=True, slots=True)
class LanguageWorkload:
    """A language model as work: `entrance`, then `layers` in order, then `head`.

    Attributes:
        spec: Its shape.
        layers: All layers, prediction layers included.
        entrance: Embedding and what else the first layer waits for. A tied embedding is here as a
            lookup too, with its bytes; `weight_bytes` counts it once.
        head: Final norm and output product; of a tied model the product with the embedding.
        metadata: Of the file, for what needs more than the spec.
    """

    spec: ModelSpec
    layers: tuple[LayerWorkload, ...]
    entrance: LayerWorkload
    head: LayerWorkload
    metadata: Mapping[str, object] = field(repr=False, compare=False)

    @property
    def run_layers(self) -> tuple[LayerWorkload, ...]:
        """Layers that plain decoding runs."""
        return tuple(layer for layer in self.layers if not layer.predicts)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors of the file."""
        return self.spec.weight_bytes

    @property
    def activation_bytes(self) -> int:
        """Bytes of one token's hidden state, what one layer hands to the next."""
        return _ACTIVATION_BYTES * self.spec.n_embd

    def kept_bytes(self, n_ctx: int, type_k: str = "f16", type_v: str = "f16") -> int:
        """Return KV cache and recurrent states of all layers that run."""
        return sum(layer.kept_bytes(n_ctx, type_k, type_v) for layer in self.run_layers)


def describe_language(file: TensorFile, spec: ModelSpec) -> LanguageWorkload:
    """Count what every layer of a language model holds and computes.

    Raises:
        FormatError: the model has no layers named `blk.N` (encoder-decoder and audio models).
    """
    by_layer: dict[int | None, list[TensorEntry]] = {}
    for entry in file.tensors:
        by_layer.setdefault(entry.layer_index, []).append(entry)
    if by_layer.keys() <= {None}:
        raise FormatError(
            f"no tensor of a layer (blk.N.) in a {spec.architecture} model",
            path=file.path,
            hint="encoder-decoder models are not supported",
        )
    n_predict = file.metadata.get(f"{spec.architecture}.nextn_predict_layers")
    n_run = spec.n_layer - (n_predict if isinstance(n_predict, int) else 0)
    outside = by_layer.get(None, [])
    after = [e for e in outside if _part(e.name).startswith(("output", "cls"))]
    before = [e for e in outside if e not in after]
    head = [_tensor_work(entry, spec) for entry in after]
    if spec.tied_embeddings and "token_embd.weight" in file.by_name:
        head.append(_tensor_work(file.by_name["token_embd.weight"], spec, role="every_token"))
    layers = tuple(
        _layer(index, by_layer.get(index, []), file, spec, index >= n_run)
        for index in range(spec.n_layer)
    )
    entrance = LayerWorkload(None, tuple(_tensor_work(entry, spec) for entry in before))
    return LanguageWorkload(spec, layers, entrance, LayerWorkload(None, tuple(head)), file.metadata)


def _layer(
    index: int, entries: list[TensorEntry], file: TensorFile, spec: ModelSpec, predicts: bool
) -> LayerWorkload:
    parts = {_part(entry.name) for entry in entries}
    attention = attention_shape(file.metadata, spec, index)
    state_bytes = 0
    if any(part.startswith(_RECURRENT) for part in parts):
        state_bytes = recurrent_bytes(file.metadata, spec)
        if not parts & _KEYS:  # linear attention: heads in the metadata, no cache
            attention = None
        kind: LayerKind = "recurrent" if attention is None else "hybrid"
    else:
        kind = "plain" if attention is None else "attention"
    tensors = tuple(_tensor_work(entry, spec) for entry in entries)
    return LayerWorkload(
        index, tensors, kind, attention, state_bytes, _stack(tensors, spec), predicts
    )


def _tensor_work(entry: TensorEntry, spec: ModelSpec, role: Role | None = None) -> TensorWork:
    kind = tensor_class(entry.name)
    share = Fraction(1)
    if role is None:
        role = "every_token"
        if _part(entry.name) in _LOOKUPS:
            role, share = "lookup", Fraction(0)
        elif kind == "experts" and len(entry.shape) == _STACK_DIMENSIONS and spec.n_expert:
            n_stack = entry.shape[-1]
            share = Fraction(min(spec.n_expert_used, n_stack), n_stack)
            if spec.choices_are_told:
                role = "experts"
    type_name = format_of(entry.ggml_type).name
    return TensorWork(entry.name, type_name, entry.shape, entry.size_bytes, kind, role, share)


def _stack(tensors: Iterable[TensorWork], spec: ModelSpec) -> ExpertStack | None:
    routed = [tensor for tensor in tensors if tensor.role == "experts"]
    if not routed:
        return None
    stack_bytes = sum(tensor.size_bytes for tensor in routed)
    return ExpertStack(
        spec.n_expert,
        spec.n_expert_used,
        stack_bytes / spec.n_expert,
        stack_bytes,
        _totals((tensor.type_name, tensor.size_bytes) for tensor in routed),
    )


def _part(name: str) -> str:
    """Return a tensor's name without layer and suffix: `blk.3.attn_q.weight` is `attn_q`."""
    return name.split(".")[2] if name.startswith("blk.") else name.split(".")[0]


def _totals(pairs: Iterable[tuple[Key, int]]) -> dict[Key, int]:
    totals: dict[Key, int] = {}
    for key, amount in pairs:
        totals[key] = totals.get(key, 0) + amount
    return totals
