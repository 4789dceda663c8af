"""Puts a model that fits wholly into memory, repacked for this processor, and leaves it there."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass

from edgert.events import Listener
from edgert.llama.lib import LlamaLibrary
from edgert.llama.runner import WeightGauges
from edgert.observer import UNOBSERVED, RunObserver
from edgert.weights.flash import FlashReader
from edgert.weights.pinning import Pinned, pin, staging_bytes
from edgert.weights.repack import Repacker
from edgert.weights.source import WeightSource
from edgert.weights.uses import WeightUse


@dataclass(frozen=True, slots=True)
class ResidentPlan:
    """Every used weight, as it will lie in memory.

    Attributes:
        weights: In order of use.
        chosen: Repacking buffer types by name.
    """

    weights: tuple[Pinned, ...]
    chosen: Mapping[str, int]

    @property
    def weight_bytes(self) -> int:
        """Memory of the weights."""
        return sum(weight.memory_bytes for weight in self.weights)

    @property
    def peak_bytes(self) -> int:
        """Memory of the weights and of repacking them."""
        return self.weight_bytes + staging_bytes(self.weights)


class ResidentWeights:
    """The `WeightKeeper` of a model that is wholly in memory.

    Args:
        weight_bytes: Memory of the weights.
        kernels: The repacking buffers in use.
        resources: Frees the memory.
    """

    def __init__(self, weight_bytes: int, kernels: str, resources: ExitStack) -> None:
        self._kernels = kernels
        self._resources = resources
        self._gauges = WeightGauges(weight_bytes, weight_bytes, 0, 0.0, False, "repacked")

    def begin_pass(self, n_tokens: int, n_logits: int) -> None:
        """Nothing to prepare."""

    def end_pass(self, *, complete: bool) -> None:
        """Nothing can have gone wrong."""

    def gauges(self) -> WeightGauges:
        """Return the fixed gauges."""
        return self._gauges

    def describe(self) -> str:
        """Say where the weights are."""
        return f"resident, repacked where ggml can ({self._kernels})"

    def close(self) -> None:
        """Give the memory back."""
        self._resources.close()


def plan_resident(
    source: WeightSource, uses: Mapping[str, WeightUse], repacker: Repacker
) -> ResidentPlan:
    """Decide how every weight lies in memory; moves nothing yet."""
    chosen = repacker.choose(uses)
    weights = []
    for use in sorted(uses.values(), key=lambda use: use.order):
        buft = chosen.get(use.name)
        size = None if buft is None else repacker.packed_bytes(use, buft)
        weights.append(Pinned(use, source.original(use.name), size))
    return ResidentPlan(tuple(weights), chosen)


def place_resident(
    library: LlamaLibrary,
    source: WeightSource,
    plan: ResidentPlan,
    repacker: Repacker,
    listener: Listener,
    observer: RunObserver = UNOBSERVED,
) -> ResidentWeights:
    """Read and repack every weight.

    Raises:
        FormatError: a weight cannot be read.
    """
    reader = FlashReader(source.paths, source.sizes_bytes, observer=observer)
    with ExitStack() as stack:
        stack.callback(repacker.close)
        try:
            uses = {weight.use.name: weight.use for weight in plan.weights}
            repacker.mark(uses, plan.chosen)
            region = pin(library, reader, plan.weights, listener, repacker)
        finally:
            reader.close()
        stack.callback(region.close)
        return ResidentWeights(plan.weight_bytes, repacker.kernels(), stack.pop_all())
