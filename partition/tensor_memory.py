"""The memory that a share of every layer takes of a host, by how many groups of KV heads it has.

The same rule as for a chain of stages (`partition.weight_memory`): what a search of shares finds to
fit does fit when the tensors are cut.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import replace

from partition.language_workload import LanguageWorkload, LayerWorkload, TensorWork
from partition.manifest import TensorShare
from partition.tensor_shares import ShareBytes
from partition.tensor_split import HeadPart, head_tensors, largest_layer, share_groups
from partition.weight_memory import WeightMemory, weight_memory, window_of

_FEW_LAYERS = 4  # as many as `partition.graph_memory` follows
_Kind = tuple[tuple[str, str, tuple[int, ...]], ...]


def share_bytes(
    workload: LanguageWorkload, *, entrance: bool, head: HeadPart
) -> tuple[ShareBytes, ...]:
    """Return what a host holds with 1 group, 2, and so on, wherever its share begins.

    Args:
        workload: Of a model that `why_not_split` has no objection to.
        entrance: Whether token embeddings are looked up there.
        head: Which part of the output it has.
    """
    n_groups, kinds = share_groups(workload), _kinds(workload)
    first = weight_memory(workload.entrance.tensors if entrance else ())
    found = []
    for n_own in range(1, n_groups + 1):
        shares = [
            TensorShare(first_group=group, end_group=group + n_own, n_groups=n_groups)
            for group in range(n_groups - n_own + 1)
        ]
        units = [first, weight_memory(_largest_head(workload, shares, head))]
        for layer, count in kinds:
            units += [weight_memory(largest_layer(layer, shares))] * count
        found.append(_sizes(units))
    return tuple(found)


def of_each_kind(workload: LanguageWorkload) -> LanguageWorkload:
    """Return the model with few layers, whose compute buffers are those of all."""
    first = workload.run_layers[:_FEW_LAYERS]
    others = (layer for layer, _ in _kinds(workload) if layer not in first)
    return replace(workload, layers=(*first, *others))


def distinct_layers(workload: LanguageWorkload) -> tuple[LanguageWorkload, list[int]]:
    """Return the model with one layer of each kind, and the kind of every layer.

    The first layer, which what comes before it is counted with, is a kind of its own.
    """
    layers = workload.run_layers
    found: dict[Hashable, LayerWorkload] = {None: layers[0]}
    kinds: dict[Hashable, int] = {None: 0}
    numbers = [0]
    for layer in layers[1:]:
        key = (_tensors_of(layer), layer.kind, layer.attention, layer.state_bytes)
        found.setdefault(key, layer)
        numbers.append(kinds.setdefault(key, len(kinds)))
    return replace(workload, layers=tuple(found.values())), numbers


def _sizes(units: Sequence[WeightMemory]) -> ShareBytes:
    window = window_of(units, cached=False)
    return ShareBytes(
        weight_bytes=sum(unit.stays_bytes + sum(unit.dense) for unit in units),
        floor_bytes=sum(window.floor_bytes(unit) for unit in units),
        window_bytes=window.n_bytes,
    )


def _kinds(workload: LanguageWorkload) -> list[tuple[LayerWorkload, int]]:
    """Return a layer of each kind, and how many are like it: most models have one or two."""
    examples: dict[_Kind, LayerWorkload] = {}
    counts: Counter[_Kind] = Counter()
    for layer in workload.run_layers:
        kind = _tensors_of(layer)
        examples.setdefault(kind, layer)
        counts[kind] += 1
    return [(layer, counts[kind]) for kind, layer in examples.items()]


def _tensors_of(layer: LayerWorkload) -> _Kind:
    return tuple((t.name.split(".", 2)[-1], t.type_name, t.shape) for t in layer.tensors)


def _largest_head(
    workload: LanguageWorkload, shares: Sequence[TensorShare], head: HeadPart
) -> Sequence[TensorWork]:
    parts = (head_tensors(workload.head, share, head) for share in shares)
    return max(parts, key=lambda tensors: sum(tensor.size_bytes for tensor in tensors))
