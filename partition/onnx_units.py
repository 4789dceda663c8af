"""Cuts an ONNX model into units for a search: runs of nodes between legal cuts."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from partition.onnx_workload import Cut, NodeWork, OnnxWorkload
from partition.units import Unit, UnitChain, Work

MOST_UNITS = 256


def onnx_units(workload: OnnxWorkload, most_units: int = MOST_UNITS) -> UnitChain:
    """Cut a model at legal points into at most `most_units` units.

    Where there are more legal cuts, the nodes are divided into stretches of equal work and each is
    cut where the least crosses. One inference is one token: decode and prefill are alike. A weight
    that several units read belongs to the first of them, one that none reads to the first unit.
    Nodes whose operations are unknown count none (`OnnxWorkload.unknown`).

    Args:
        workload: The model.
        most_units: At least 1, else ValueError.
    """
    if most_units < 1:
        raise ValueError(f"{most_units} units, wanted at least 1")
    cuts = _chosen(workload, most_units)
    bounds = unit_bounds(workload, most_units)
    handed = [cut.size_bytes or 0 for cut in cuts] + [_returned_bytes(workload)]
    owner = _owners(workload, bounds)
    units = tuple(
        _unit(index, workload, bounds[index], bounds[index + 1], (owner[index], handed[index]))
        for index in range(len(bounds) - 1)
    )
    return UnitChain((1.0,), units, tuple(handed))


def unit_bounds(workload: OnnxWorkload, most_units: int = MOST_UNITS) -> list[int]:
    """Return the nodes where units begin, and one past the last node."""
    cuts = _chosen(workload, most_units)
    return [0, *(cut.position for cut in cuts), len(workload.nodes)]


def _chosen(workload: OnnxWorkload, most_units: int) -> list[Cut]:
    legal = list(workload.legal_cuts)
    if len(legal) < most_units:
        return legal
    if most_units == 1:
        return []
    done: list[float] = [0.0]
    for node in workload.nodes:
        size = sum(workload.weights[name].size_bytes for name in node.weights)
        done.append(done[-1] + 1 + (node.flops or 0) + size)
    best: dict[int, Cut] = {}
    n_stretches = most_units - 1
    for cut in legal:
        stretch = min(n_stretches - 1, int(n_stretches * done[cut.position] / done[-1]))
        if stretch not in best or (cut.size_bytes or 0) < (best[stretch].size_bytes or 0):
            best[stretch] = cut
    return [best[stretch] for stretch in sorted(best)]


def _owners(workload: OnnxWorkload, bounds: Sequence[int]) -> list[list[str]]:
    """Return the weights of each unit; every weight is in exactly one."""
    owned: list[list[str]] = [[] for _ in bounds[1:]]
    seen: set[str] = set()
    for index, (first, end) in enumerate(pairwise(bounds)):
        for node in workload.nodes[first:end]:
            owned[index] += [name for name in node.weights if name not in seen]
            seen.update(node.weights)
    owned[0] += [name for name in workload.weights if name not in seen]
    return owned


def _returned_bytes(workload: OnnxWorkload) -> int:
    sizes = [workload.tensors[n].size_bytes for n in workload.outputs if n in workload.tensors]
    return sum(size or 0 for size in sizes)


def _unit(
    index: int, workload: OnnxWorkload, first: int, end: int, owned: tuple[list[str], int]
) -> Unit:
    nodes = workload.nodes[first:end]
    names, handed_bytes = owned
    flops: dict[str, float] = {}
    read: dict[str, float] = {}
    other, products = 0.0, 0.0
    for node in nodes:
        if node.product_type is not None:
            flops[node.product_type] = flops.get(node.product_type, 0.0) + (node.flops or 0)
        elif node.op_type in ("MatMul", "Gemm", "Einsum", "Attention", "MultiHeadAttention"):
            products += node.flops or 0
        else:
            other += node.flops or 0
        for type_name, size in _reads(node, workload):
            read[type_name] = read.get(type_name, 0.0) + size
    work = Work(1, 1, flops, read, products, 0.0, other, float(handed_bytes))
    name = nodes[0].name if len(nodes) == 1 else f"{nodes[0].name} to {nodes[-1].name}"
    return Unit(
        index=index,
        name=name,
        layer=None,
        weight_bytes=(float(sum(workload.weights[n].size_bytes for n in names)),),
        kept_bytes=0,
        lookup_bytes=0,
        decode=work,
        prefill=work,
        n_products=sum(node.product_type is not None for node in nodes),
    )


def _reads(node: NodeWork, workload: OnnxWorkload) -> list[tuple[str, int]]:
    weights = [workload.weights[name] for name in node.weights]
    if node.lookup_bytes is not None and weights:
        return [(weights[0].type_name, min(node.lookup_bytes, weights[0].size_bytes))]
    return [(weight.type_name, weight.size_bytes) for weight in weights]
