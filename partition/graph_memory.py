"""Size of llama.cpp's compute buffer, from what is alive at the same time in its graph.

The graph allocator is replayed on the tensors of a transformer layer in the order in which
llama.cpp computes them. Graphs like llama's and qwen3moe's come out exactly; of other architectures
the same layer with their widths is an estimate, and gets a margin.

Source: `ggml_gallocr_allocate_node` and `ggml_dyn_tallocr`, ggml/src/ggml-alloc.c;
`llm_graph_context::build_attn`, `build_ffn` and `build_moe_ffn`, src/llama-graph.cpp.
"""

from __future__ import annotations

from dataclasses import dataclass

_ALIGNMENT = 32
_F32, _F16, _I32, _I64 = 4, 2, 4, 8
Place = tuple[int, int]  # start and end in the buffer, bytes
_MOST_LAYERS = 3  # the first differs from the others, and so does the last; the rest repeat


@dataclass(frozen=True, slots=True)
class GraphShape:
    """Widths of the tensors that a graph holds for each token, in elements.

    Attributes:
        n_layer: Layers, all alike.
        n_embd: Hidden state.
        n_head: Query heads, of which each has its own scores without flash attention.
        q_width: Queries.
        k_width: Keys.
        v_width: Values.
        out_width: What attention returns.
        ff_width: Dense feed-forward, or shared experts; 0 for none.
        gated: Whether the feed-forward has a gate beside the upward product.
        n_expert: Routed experts; 0 for none.
        n_expert_used: Of them for each token.
        expert_width: Feed-forward of one expert.
        n_vocab: Logits.
        k_rotation: Side of the matrix that rotates quantized keys and queries; 0 for none.
        v_rotation: The same for values.
    """

    n_layer: int
    n_embd: int
    n_head: int
    q_width: int
    k_width: int
    v_width: int
    out_width: int
    ff_width: int
    gated: bool
    n_expert: int
    n_expert_used: int
    expert_width: int
    n_vocab: int
    k_rotation: int = 0
    v_rotation: int = 0


@dataclass(frozen=True, slots=True)
class GraphRun:
    """How large the batches of a context get.

    Attributes:
        n_ctx: Positions of the KV cache, rounded up as llama.cpp does.
        n_tokens: Micro-batch.
        n_outputs: Tokens of it that want logits.
        flash_attention: Whether scores are never stored; llama.cpp's default on a processor.
    """

    n_ctx: int
    n_tokens: int
    n_outputs: int
    flash_attention: bool = True


def graph_bytes(shape: GraphShape, run: GraphRun) -> int:
    """Return the bytes that the allocator needs for one micro-batch."""
    graph = _Graph(shape, run)
    graph.build()
    return graph.arena.peak_bytes


class _Arena:
    """Best fit among the holes, else at the end; neighbouring holes merge."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._holes: list[Place] = []  # (start, end), ascending
        self._end = 0

    def take(self, n_bytes: int) -> Place:
        """Return the place of a new tensor."""
        size = -(-max(n_bytes, 1) // _ALIGNMENT) * _ALIGNMENT
        fitting = [hole for hole in self._holes if hole[1] - hole[0] >= size]
        if not fitting:
            place = (self._end, self._end + size)
            self._end += size
            self.peak_bytes = max(self.peak_bytes, self._end)
            return place
        hole = min(reversed(fitting), key=lambda hole: hole[1] - hole[0])
        index = self._holes.index(hole)
        place = (hole[0], hole[0] + size)
        self._holes[index : index + 1] = [(place[1], hole[1])] if place[1] < hole[1] else []
        return place

    def give(self, *places: Place) -> None:
        """Free tensors."""
        for start, end in places:
            touching = [hole for hole in self._holes if hole[1] == start or hole[0] == end]
            merged = (
                min([start, *(h[0] for h in touching)]),
                max([end, *(h[1] for h in touching)]),
            )
            self._holes = sorted([*(h for h in self._holes if h not in touching), merged])
            if merged[1] == self._end:
                self._holes.remove(merged)
                self._end = merged[0]


class _Graph:
    def __init__(self, shape: GraphShape, run: GraphRun) -> None:
        self.arena = _Arena()
        self._shape = shape
        self._run = run
        self._take, self._give = self.arena.take, self.arena.give
        self._inputs: dict[str, Place] = {}

    def build(self) -> None:
        """Take and give every tensor of the graph, in order."""
        shape, run, take, give = self._shape, self._run, self._take, self._give
        self._take_inputs()
        hidden = take(_F32 * run.n_tokens * shape.n_embd)
        give(self._inputs["tokens"])
        for _ in range(min(_MOST_LAYERS, shape.n_layer - 1)):
            out = self._attention()
            give(hidden)
            hidden = self._feed_forward(out, run.n_tokens)
        out = self._attention(last=True)
        rows = take(_F32 * run.n_outputs * shape.n_embd)
        give(out)
        residual = take(_F32 * run.n_outputs * shape.n_embd)
        give(hidden, self._inputs["rows"], residual)
        self._feed_forward(rows, run.n_outputs)
        take(_F32 * run.n_outputs * shape.n_vocab)

    def _take_inputs(self) -> None:
        shape, run = self._shape, self._run
        index_bytes = _I64 * run.n_tokens
        mask_bytes = (_F16 if run.flash_attention else _F32) * run.n_ctx * run.n_tokens
        sizes = {
            "tokens": _I32 * run.n_tokens,
            "embeddings": _F32 * run.n_tokens * shape.n_embd,  # in place of tokens; never used
            "k_rotation": _F32 * shape.k_rotation**2,
            "positions": _I32 * run.n_tokens,
            "v_rotation": _F32 * shape.v_rotation**2,
            "k_cells": index_bytes,
            # Without flash attention values lie transposed: an index for each element.
            "v_cells": index_bytes * (1 if run.flash_attention else shape.v_width),
            "mask": mask_bytes,
            "rows": _I32 * run.n_outputs,
        }
        self._inputs = {name: self._take(size) for name, size in sizes.items() if size}

    def _attention(self, *, last: bool = False) -> Place:
        shape, run, take, give = self._shape, self._run, self._take, self._give
        done = self._inputs if last else {}  # nothing reads the inputs after the last layer
        rotated_k, rotated_v = bool(shape.k_rotation), bool(shape.v_rotation)
        token_bytes = _F32 * run.n_tokens
        norm = take(token_bytes * shape.n_embd)
        query = self._renewed(take(token_bytes * shape.q_width), shape.q_width, 1 + rotated_k)
        value = self._renewed(take(token_bytes * shape.v_width), shape.v_width, rotated_v)
        key = take(token_bytes * shape.k_width)
        give(norm)
        key = self._renewed(key, shape.k_width)
        give(*self._of(done, "positions"))
        key = self._renewed(key, shape.k_width, rotated_k)
        give(*self._of(done, "k_rotation"), key, *self._of(done, "k_cells"))
        give(value, *self._of(done, "v_cells"))
        if run.flash_attention:
            mixed = take(token_bytes * shape.out_width)
            give(query, *self._of(done, "mask"))
        else:
            scores = take(token_bytes * run.n_ctx * shape.n_head)
            give(query, *self._of(done, "mask"))
            mixed = take(token_bytes * shape.out_width)
            give(scores)
            mixed = self._renewed(mixed, shape.out_width)
        mixed = self._renewed(mixed, shape.out_width, rotated_v)
        give(*self._of(done, "v_rotation"))
        out = take(token_bytes * shape.n_embd)
        give(mixed)
        return out

    @staticmethod
    def _of(places: dict[str, Place], name: str) -> tuple[Place, ...]:
        return (places[name],) if name in places else ()

    def _renewed(self, place: Place, width: int, times: int = 1) -> Place:
        """Return the place of a tensor computed from one that is not needed any more."""
        for _ in range(times):
            new = self._take(_F32 * self._run.n_tokens * width)
            self._give(place)
            place = new
        return place

    def _feed_forward(self, residual: Place, n_tokens: int) -> Place:
        shape, take, give = self._shape, self._take, self._give
        norm = take(_F32 * n_tokens * shape.n_embd)
        routed = self._experts(norm, n_tokens) if shape.n_expert else None
        if shape.ff_width or not routed:
            gates = [take(_F32 * n_tokens * shape.ff_width) for _ in range(1 + shape.gated)]
            give(norm)
            product = gates.pop()
            if gates:
                act = take(_F32 * n_tokens * shape.ff_width)
                give(*gates, product)
                product = act
            out = take(_F32 * n_tokens * shape.n_embd)
            give(product)
            if routed:
                give(routed)
        else:
            out = routed
        give(residual)
        return out

    def _experts(self, norm: Place, n_tokens: int) -> Place:
        shape, take, give = self._shape, self._take, self._give
        token_bytes = _F32 * n_tokens
        probabilities = take(token_bytes * shape.n_expert)
        order = take(token_bytes * shape.n_expert)
        weights = take(token_bytes * shape.n_expert_used)
        give(probabilities)
        total = take(token_bytes)
        normed = take(token_bytes * shape.n_expert_used)
        give(weights, total)
        width = shape.n_expert_used * shape.expert_width
        gate, up = take(token_bytes * width), take(token_bytes * width)
        if not shape.ff_width:
            give(norm)
        act = take(token_bytes * width)
        give(gate, up)
        down = take(token_bytes * shape.n_expert_used * shape.n_embd)
        give(act, order, normed)
        out = take(token_bytes * shape.n_embd)
        give(down)
        return out
