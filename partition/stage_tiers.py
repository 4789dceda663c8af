"""Turns "so many bytes stay" into names: which tensor is pinned, streamed or looked up."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

from partition.language_workload import LanguageWorkload, LayerWorkload, TensorWork
from partition.manifest import Tiers
from partition.residency import Item, Residency, choose_residency
from partition.workload import page_bytes as page_bytes
from partition.workload import passes


@dataclass(frozen=True, slots=True)
class StageWeights:
    """The tensors of a stage in the order that a pass uses them.

    Attributes:
        whole: Read whole on every pass.
        looked_up: Read by single rows.
        apart: Whether those are looked up in a file of their own, as where several hosts run a
            model; else they are in memory where everything is.
    """

    whole: tuple[TensorWork, ...]
    looked_up: tuple[TensorWork, ...]
    apart: bool = False

    @property
    def whole_bytes(self) -> int:
        """Memory of all that is read whole, pages around each counted."""
        return sum(page_bytes(tensor.size_bytes) for tensor in self.whole)

    @property
    def every_bytes(self) -> int:
        """Memory of everything, for a stage that is wholly in memory."""
        beside = () if self.apart else self.looked_up
        names = {tensor.name: tensor.size_bytes for tensor in (*self.whole, *beside)}
        return sum(page_bytes(size) for size in names.values())


def stage_weights(workload: LanguageWorkload, first: int, end: int, head: bool) -> StageWeights:
    """List the tensors of layers [first, end), of the entrance when it begins at 0, of the head."""
    parts: list[LayerWorkload] = [workload.entrance] if first == 0 else []
    parts += workload.run_layers[first:end]
    parts += [workload.head] if head else []
    tensors = [tensor for part in parts for tensor in sorted(part.tensors, key=_order)]
    whole = tuple(tensor for tensor in tensors if tensor.role != "lookup")
    read_whole = {tensor.name for tensor in whole}
    looked_up = tuple(t for t in tensors if t.role == "lookup" and t.name not in read_whole)
    return StageWeights(whole, looked_up)


def choose_tiers(weights: StageWeights, available_bytes: int) -> tuple[Tiers, Residency]:
    """Pin what fits into `available_bytes` beside the window; the rest streams.

    Raises:
        CapacityError: not even a window and what must stay fit.
    """
    items = [
        Item(t.name, page_bytes(t.size_bytes), must_pin=not can_stream(t)) for t in weights.whole
    ]
    # The order of use is the runtime's to learn: the window must do for any.
    residency = choose_residency(items, available_bytes, any_order=True)
    tiers = Tiers(
        layout="file",
        pinned=tuple(sorted(residency.pinned)),
        streamed=residency.streamed,
        looked_up=tuple(sorted(t.name for t in weights.looked_up)),
        window_bytes=residency.ring_bytes,
    )
    return tiers, residency


def can_stream(tensor: TensorWork) -> bool:
    """Whether the runtime may stream a weight."""
    return passes(tensor.name, tensor.shape)


def resident_tiers(weights: StageWeights, *, repacked: bool = True) -> Tiers:
    """Pin everything; on a processor repacked for its kernels while loading."""
    rows = {tensor.name for tensor in weights.looked_up}
    names = {tensor.name for tensor in weights.whole} | (set() if weights.apart else rows)
    return Tiers(
        layout="repacked" if repacked else "file",
        pinned=tuple(sorted(names)),
        looked_up=tuple(sorted(rows - names)),
    )


def staging_bytes(weights: StageWeights) -> int:
    """Return what repacking takes beside the weights: two areas of the largest one."""
    return 2 * max((page_bytes(tensor.size_bytes) for tensor in weights.whole), default=0)


def precision(tensors: Iterable[TensorWork]) -> dict[str, int]:
    """Return bytes by format, largest first."""
    totals: dict[str, int] = {}
    for tensor in tensors:
        totals[tensor.type_name] = totals.get(tensor.type_name, 0) + tensor.size_bytes
    return dict(sorted(totals.items(), key=lambda pair: (-pair[1], pair[0])))


# The order in which llama.cpp's graphs read the weights of a layer; others keep the file's order.
_USE_ORDER = (
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_norm",
    "ffn_gate_inp", "ffn_gate", "ffn_up", "ffn_down", "output_norm", "output",
)  # fmt: skip


def _order(tensor: TensorWork) -> int:
    name = tensor.name
    return _place_of(name.split(".")[2] if name.startswith("blk.") else name)


@lru_cache(maxsize=256)
def _place_of(part: str) -> int:
    matches = [i for i, name in enumerate(_USE_ORDER) if part.startswith(name)]
    return matches[-1] if matches else len(_USE_ORDER)
