"""How often a token wants each expert: assumed, or counted from a routing trace; read classes."""

from __future__ import annotations

import json
import os
import stat
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

from edgert.errors import ConfigError, FormatError
from partition.manifest import LayerRouting, Routing
from partition.manifest_routing import pack_shares, pack_tokens, unpack_shares, unpack_tokens

MOST_EXPERT_CLASSES = 12
_MOST_CHOICES = 512  # of each layer are kept, the latest; manifests keep them too
_MOST_TRACE_BYTES = 1 << 30
_MOST_LINE_BYTES = 1 << 16
_TINY = 1e-9


# By layer and token, the experts that were chosen; empty for layers without routed experts.
Choices = tuple[tuple[tuple[int, ...], ...], ...]


@dataclass(frozen=True, slots=True)
class Popularity:
    """How unequal experts are.

    Attributes:
        kind: "assumed" follows a power law, "trace" counted what a router chose.
        zipf_exponent: Of the assumed law: the expert of rank r is wanted like 1 / r^exponent; 0 is
            all alike.
        layers: For "trace", by layer and expert, the share of tokens that want it; empty for layers
            without routed experts.
        choices: For "trace", what was chosen, for replaying it.
    """

    kind: Literal["assumed", "trace"] = "assumed"
    zipf_exponent: float = 0.5
    layers: tuple[tuple[float, ...], ...] = ()
    choices: Choices = ()

    def wanted(self, layer: int, n_expert: int, n_used: int) -> tuple[float, ...]:
        """Return the share of tokens that want each expert, in [0, 1]; they add up to `n_used`.

        Args:
            layer: Its index in the model.
            n_expert: Experts in the layer.
            n_used: Experts that one token wants.

        Raises:
            ConfigError: the trace has nothing for this layer, or other experts.
        """
        if self.kind == "assumed":
            weights = [(rank + 1.0) ** -self.zipf_exponent for rank in range(n_expert)]
            return _capped(weights, n_used)
        shares = self.layers[layer] if layer < len(self.layers) else ()
        if len(shares) != n_expert:
            raise ConfigError(
                f"the routing trace has {len(shares)} experts in layer {layer}, "
                f"the model has {n_expert}",
                hint="record the trace with this model",
            )
        return shares


def read_routing_trace(path: Path, n_layer: int, n_expert: int, n_used: int) -> Popularity:
    """Count a routing trace: a line `{"layer": 0, "experts": [3, 17]}` for every token and layer.

    Each layer is counted as if one more token had wanted all experts alike, so that an expert the
    trace never met is rare instead of impossible.

    Args:
        path: The file, JSON lines.
        n_layer: Layers of the model.
        n_expert: Experts in each layer that has some.
        n_used: Experts that one token wants.

    Raises:
        ConfigError: no such file, or no regular one; or the model has no experts.
        FormatError: a line that is none of the above; says its number.
    """
    if not n_expert or not n_used:
        raise ConfigError(
            f"the routing trace {path} is of experts, and the model has none",
            hint="leave it out",
        )
    counts = [[0] * n_expert for _ in range(n_layer)]
    n_tokens = [0] * n_layer
    choices: list[deque[tuple[int, ...]]] = [deque(maxlen=_MOST_CHOICES) for _ in counts]
    for number, line in _lines(path):
        layer, experts = _choice(path, number, line)
        if not 0 <= layer < n_layer:
            _fail(path, number, f"$.layer is {layer}, wanted 0 to {n_layer - 1}")
        if len(experts) != n_used or len(set(experts)) != n_used:
            _fail(path, number, f"$.experts is {experts[:8]}, wanted {n_used} different ones")
        if any(not 0 <= expert < n_expert for expert in experts):
            _fail(path, number, f"$.experts is {experts[:8]}, wanted 0 to {n_expert - 1}")
        n_tokens[layer] += 1
        choices[layer].append(tuple(experts))
        for expert in experts:
            counts[layer][expert] += 1
    if not any(n_tokens):
        _fail(path, 1, "the trace is empty")
    unseen = n_used / n_expert
    layers = tuple(
        tuple((count + unseen) / (n + 1) for count in row) if n else ()
        for row, n in zip(counts, n_tokens, strict=True)
    )
    return Popularity("trace", 0.0, layers, tuple(map(tuple, choices)))


def routing_of(popularity: Popularity) -> Routing | None:
    """Return a trace as a manifest keeps it; None where popularity is assumed."""
    tokens = next((layer for layer in popularity.choices if layer), ())
    if not tokens:
        return None
    return Routing(
        n_expert=max(map(len, popularity.layers)),
        n_used=len(tokens[0]),
        layers=tuple(
            LayerRouting(shares=pack_shares(shares), choices=pack_tokens(choices))
            for shares, choices in zip(popularity.layers, popularity.choices, strict=True)
        ),
    )


def popularity_of(
    routing: Routing | None, n_layer: int, n_expert: int, n_used: int
) -> Popularity | None:
    """Return what a manifest keeps of a trace; None if it has none, or of another model."""
    if routing is None:
        return None
    if (len(routing.layers), routing.n_expert, routing.n_used) != (n_layer, n_expert, n_used):
        return None
    return Popularity(
        "trace",
        0.0,
        tuple(unpack_shares(layer.shares) for layer in routing.layers),
        tuple(unpack_tokens(layer.choices, n_used) for layer in routing.layers),
    )


def distinct_experts(wanted: Sequence[float], n_tokens: int) -> float:
    """Return how many experts `n_tokens` tokens want together, choosing independently."""
    return sum(1.0 - (1.0 - share) ** n_tokens for share in wanted)


def expert_classes(
    experts: Sequence[tuple[float, float]], n_classes: int = MOST_EXPERT_CLASSES
) -> tuple[tuple[float, ...], tuple[int, ...]]:
    """Put experts of similar popularity into classes.

    Classes hold equal shares of what a token reads, so the few popular experts are told apart
    finely and the many rare ones coarsely; equal experts share a class.

    Args:
        experts: (share of tokens that want it, its bytes) of every expert of the model.
        n_classes: At most so many.

    Returns:
        The share of each class, weighted by bytes so that no byte read is lost, descending; and the
        class of each expert.
    """
    order = sorted(range(len(experts)), key=lambda i: (-experts[i][0], i))
    total = sum(share * size for share, size in experts)
    members: list[list[int]] = []
    read, previous = 0.0, -1.0
    for index in order:
        share, size = experts[index]
        due = len(members) * total / n_classes
        differs = previous - share > _TINY and read >= due - _TINY * total
        if not members or (differs and len(members) < n_classes):
            members.append([])
        members[-1].append(index)
        read += share * size
        previous = share
    reads, class_of = [], [0] * len(experts)
    for number, group in enumerate(members):
        size = sum(experts[i][1] for i in group)
        wanted_bytes = sum(experts[i][0] * experts[i][1] for i in group)
        reads.append(min(1.0, wanted_bytes / size))
        for i in group:
            class_of[i] = number
    return tuple(reads), tuple(class_of)


def _capped(weights: Sequence[float], n_used: int) -> tuple[float, ...]:
    """Scale weights to add up to `n_used` with none above 1; they descend."""
    left, n_full, total = float(n_used), 0, sum(weights)
    while n_full < len(weights) and left * weights[n_full] >= total:
        total -= weights[n_full]
        left -= 1.0
        n_full += 1
    rest = weights[n_full:]
    return (*[1.0] * n_full, *(min(1.0, left * weight / total) for weight in rest))


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the routing trace {path}: {error}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ConfigError(f"the routing trace {path} is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if status.st_size > _MOST_TRACE_BYTES:
            raise ConfigError(
                f"the routing trace {path} has {status.st_size:,} bytes, "
                f"wanted at most {_MOST_TRACE_BYTES:,}"
            )
        number = 0
        while line := file.readline(_MOST_LINE_BYTES + 1):
            number += 1
            if len(line) > _MOST_LINE_BYTES:
                _fail(path, number, f"longer than {_MOST_LINE_BYTES:,} bytes")
            if line.strip():
                yield number, line


def _choice(path: Path, number: int, line: bytes) -> tuple[int, list[int]]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        _fail(path, number, f"not JSON: {error}")
    if not isinstance(value, dict) or value.keys() != {"layer", "experts"}:
        _fail(path, number, 'wanted an object with exactly "layer" and "experts"')
    layer, experts = value["layer"], value["experts"]
    if not _is_integer(layer):
        _fail(path, number, "$.layer is no integer")
    if not isinstance(experts, list) or not all(_is_integer(expert) for expert in experts):
        _fail(path, number, "$.experts is no list of integers")
    return layer, experts


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _fail(path: Path, number: int, message: str) -> NoReturn:
    raise FormatError(
        f"line {number}: {message}",
        path=path,
        hint='a routing trace has lines like {"layer": 0, "experts": [3, 17]}',
    )
