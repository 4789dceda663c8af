"""Units: a model cut into the pieces that a search places, with what each of them costs.

Units of language models are made here, those of ONNX graphs in `partition.onnx_units`. Bytes and
operations only; `partition.cost` turns them into seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from partition.language_workload import LanguageWorkload, LayerWorkload
from partition.popularity import Choices, Popularity, distinct_experts, expert_classes
from partition.weight_memory import NO_WEIGHTS, WeightMemory, weight_memory


@dataclass(frozen=True, slots=True)
class Work:
    """What a unit computes in one phase.

    A kernel that multiplies by weights of one type takes about
    max(`flops[type]` / rate, `read_bytes[type]` / bandwidth); attention, which reads the cache and
    no weights, max(`attention_flops` / rate, `attention_bytes` / bandwidth).

    Attributes:
        n_tokens: Tokens of the phase: 1 for decode, the prompt for prefill.
        n_sweeps: How often weights are gone over: once a micro-batch.
        flops: Operations on weights by ggml type (ONNX: element type), all tokens together.
        read_bytes: Weight bytes that take part by the same types, all sweeps together. A sweep
            reads each dense weight once and of the experts those its tokens are expected to want.
        attention_flops: Operations on cached keys and values, all tokens together.
        attention_bytes: Cache bytes read, once a sweep, plus those written.
        other_flops: Operations on no weight at all: activations, norms, softmax.
        handed_bytes: Activations handed to the next unit, all tokens together.
        head_length: Elements of an attention head; 0 without attention.
        sweep_tokens: Tokens of a sweep, the last one may have fewer; 0 is all in one.
    """

    n_tokens: int
    n_sweeps: int
    flops: Mapping[str, float] = field(default_factory=dict)
    read_bytes: Mapping[str, float] = field(default_factory=dict)
    attention_flops: float = 0.0
    attention_bytes: float = 0.0
    other_flops: float = 0.0
    handed_bytes: float = 0.0
    head_length: int = 0
    sweep_tokens: int = 0

    @property
    def sweeps(self) -> tuple[int, ...]:
        """Tokens of each sweep."""
        return tuple(_sweeps(self.n_tokens, self.sweep_tokens or max(1, self.n_tokens)))

    @property
    def total_flops(self) -> float:
        """All operations."""
        return sum(self.flops.values()) + self.attention_flops + self.other_flops


@dataclass(frozen=True, slots=True)
class Unit:
    """What is placed as a whole: a layer of a language model, or a run of ONNX nodes.

    Attributes:
        index: Place in the chain.
        name: For people: `layer 3`, `output`, or the first and last node of a run.
        layer: Layer of the model; None for the output head and for ONNX.
        weight_bytes: By read class, as `UnitChain.reads`. Every byte of it is pinned or streamed.
        kept_bytes: Must be in memory wherever the unit is: KV cache for the context, recurrent
            state, and for ONNX what cannot stream.
        lookup_bytes: Tables of which a token reads single rows, in no read class: they may stay on
            flash, or count as pinned where the runtime keeps whole models in memory.
        decode: One token that sees the whole context.
        prefill: The prompt, from an empty cache.
        n_products: Nodes that multiply by weights, for overhead by node.
        memory: Its weights as memory; of language models.
    """

    index: int
    name: str
    layer: int | None
    weight_bytes: tuple[float, ...]
    kept_bytes: int
    lookup_bytes: int
    decode: Work
    prefill: Work
    n_products: int
    memory: WeightMemory = NO_WEIGHTS

    @property
    def total_weight_bytes(self) -> float:
        """Weights of all read classes, lookups excluded."""
        return sum(self.weight_bytes)


@dataclass(frozen=True, slots=True)
class UnitChain:
    """A model as a chain of units.

    Attributes:
        reads: How often one token reads a byte of each weight class, descending from 1.0 for dense
            weights; the others are classes of experts (`partition.popularity`).
        units: In order of computing. Of a language model: its layers, then the output head.
        activation_bytes: Handed from unit to unit for one token, by unit; the last is what leaves
            the chain (logits of a language model stay where they are: 0).
        choices: By layer, what a router chose of a trace; empty without one.
    """

    reads: tuple[float, ...]
    units: tuple[Unit, ...]
    activation_bytes: tuple[int, ...]
    choices: Choices = ()


@dataclass(frozen=True, slots=True)
class LanguageGoal:
    """What a language model is asked to do.

    Attributes:
        n_prompt: Tokens of the prompt.
        n_ctx: Positions of the cache, all of them seen by the decoded token.
        n_ubatch: Tokens computed at once.
        type_k: ggml type of cached keys.
        type_v: ggml type of cached values.
        n_seen: Positions that the decoded token sees; None is `n_ctx`.
        n_decoded: Tokens of one pass while decoding: drafted ones are verified together.
    """

    n_prompt: int
    n_ctx: int
    n_ubatch: int = 512
    type_k: str = "f16"
    type_v: str = "f16"
    n_seen: int | None = None
    n_decoded: int = 1


def language_units(
    workload: LanguageWorkload, goal: LanguageGoal, popularity: Popularity
) -> UnitChain:
    """Cut a language model into its layers and its output head.

    What the first layer waits for (embedding, its norm) belongs to unit 0. Prediction layers, which
    plain decoding does not run, are left out.

    Raises:
        ConfigError: the routing trace does not fit the model.
        ValueError: cache types that the model's heads do not allow.
    """
    layers = workload.run_layers
    wanted = [_wanted(layer, popularity) for layer in layers]
    sizes = [layer.experts.expert_bytes if layer.experts else 0.0 for layer in layers]
    expert_reads, class_of = expert_classes(
        [(share, size) for row, size in zip(wanted, sizes, strict=True) for share in row]
    )
    classes, units = iter(class_of), []
    for index, (layer, shares, size) in enumerate(zip(layers, wanted, sizes, strict=True)):
        entrance = (workload.entrance,) if index == 0 else ()
        by_class = [0.0] * (1 + len(expert_reads))
        for _ in shares:
            by_class[1 + next(classes)] += size
        part = _Part((*entrance, layer), shares, workload.activation_bytes, goal.n_prompt)
        units.append(_unit(index, f"layer {layer.index}", part, by_class, goal))
    head = _Part((workload.head,), (), 0, min(1, goal.n_prompt))
    units.append(_unit(len(units), "output", head, [0.0] * (1 + len(expert_reads)), goal))
    handed = (*[workload.activation_bytes] * len(layers), 0)
    reads = (1.0 - (1.0 - share) ** goal.n_decoded for share in expert_reads)
    traced = layers if popularity.choices else ()
    choices = tuple(popularity.choices[layer.index or 0] for layer in traced)
    return UnitChain((1.0, *reads), tuple(units), handed, choices)


@dataclass(frozen=True, slots=True)
class _Part:
    """What becomes one unit; `n_prompt` tokens of a prompt go through it."""

    layers: tuple[LayerWorkload, ...]
    wanted: tuple[float, ...]
    handed_bytes: int
    n_prompt: int


def _wanted(layer: LayerWorkload, popularity: Popularity) -> tuple[float, ...]:
    if layer.experts is None or layer.index is None:
        return ()
    return popularity.wanted(layer.index, layer.experts.n_expert, layer.experts.n_used)


def _unit(
    index: int, name: str, part: _Part, by_class: Sequence[float], goal: LanguageGoal
) -> Unit:
    dense_bytes = sum(layer.dense_bytes for layer in part.layers)
    n_seen = goal.n_ctx if goal.n_seen is None else goal.n_seen
    return Unit(
        index=index,
        name=name,
        layer=part.layers[-1].index,
        weight_bytes=(dense_bytes + by_class[0], *by_class[1:]),
        kept_bytes=sum(x.kept_bytes(goal.n_ctx, goal.type_k, goal.type_v) for x in part.layers),
        lookup_bytes=sum(layer.lookup_bytes for layer in part.layers),
        decode=_work(part, goal, [goal.n_decoded], max(0, n_seen - 1)),
        prefill=_work(part, goal, _sweeps(part.n_prompt, goal.n_ubatch), 0),
        n_products=sum(
            tensor.role != "lookup" and len(tensor.shape) > 1
            for layer in part.layers
            for tensor in layer.tensors
        ),
        memory=weight_memory(tensor for layer in part.layers for tensor in layer.tensors),
    )


def _sweeps(n_tokens: int, n_ubatch: int) -> list[int]:
    """Return the tokens of each micro-batch."""
    full, rest = divmod(n_tokens, n_ubatch)
    return [n_ubatch] * full + ([rest] if rest else [])


def _work(part: _Part, goal: LanguageGoal, sweeps: Sequence[int], n_cached: int) -> Work:
    """Add up the micro-batches of a phase that begins with `n_cached` positions."""
    n_tokens = sum(sweeps)
    flops: dict[str, float] = {}
    read: dict[str, float] = {}
    attention_flops, attention_bytes, other_flops = 0.0, 0.0, 0.0
    for layer in part.layers:
        for type_name, n_flops in layer.flops_by_type.items():
            flops[type_name] = flops.get(type_name, 0.0) + n_tokens * n_flops
        for type_name, amount in _read_by_type(layer, part.wanted, sweeps).items():
            read[type_name] = read.get(type_name, 0.0) + amount
        # Four operations update one element of a recurrent state, which takes four bytes.
        other_flops += n_tokens * layer.state_bytes
        attention_bytes += 2 * len(sweeps) * layer.state_bytes
        if layer.attention is not None:
            row = layer.attention.row_bytes(goal.type_k, goal.type_v)
            ends = [n_cached + sum(sweeps[: i + 1]) for i in range(len(sweeps))]
            seen = sum(layer.attention.visible(end) for end in ends)
            attention_flops += layer.attention.prompt_flops(n_tokens, n_cached)
            attention_bytes += row * (seen + n_tokens)
    handed = float(part.handed_bytes * n_tokens)
    attention = (attention_flops, attention_bytes)
    heads = [layer.attention.key_length for layer in part.layers if layer.attention is not None]
    length = max(heads, default=0)
    return Work(
        n_tokens, len(sweeps), flops, read, *attention, other_flops, handed, length,
        max(sweeps, default=0),
    )  # fmt: skip


def _read_by_type(
    layer: LayerWorkload, wanted: Sequence[float], sweeps: Sequence[int]
) -> dict[str, float]:
    read: dict[str, float] = {}
    for tensor in layer.tensors:
        if tensor.role == "every_token":
            amount = read.get(tensor.type_name, 0.0) + len(sweeps) * tensor.size_bytes
            read[tensor.type_name] = amount
    if layer.experts is not None:
        n_experts = sum(distinct_experts(wanted, n_tokens) for n_tokens in sweeps)
        for type_name, size in layer.experts.by_type.items():
            share = n_experts / layer.experts.n_expert
            read[type_name] = read.get(type_name, 0.0) + share * size
    return read
