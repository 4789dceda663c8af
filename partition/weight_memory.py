"""The memory that weights take wherever they are placed: whole pages, what must stay, a window.

A search divides bytes, a stage is cut at whole tensors. The numbers here are such that what a
search finds to fit does fit when it is cut.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from partition.cached_tiers import least_of, rounds_bytes
from partition.language_workload import TensorWork
from partition.stage_tiers import can_stream, page_bytes


@dataclass(frozen=True, slots=True)
class WeightMemory:
    """Weights of one unit as memory, pages around each of them included.

    Attributes:
        stays_bytes: Of weights that cannot stream.
        dense: Of each dense weight that can.
        stacks: Of each stack of experts.
        experts: The stacks themselves, by which caches are counted.
        lookup_bytes: Of tables of which single rows are read, where they are held whole.
    """

    stays_bytes: int = 0
    dense: tuple[int, ...] = ()
    stacks: tuple[int, ...] = ()
    experts: tuple[TensorWork, ...] = ()
    lookup_bytes: int = 0

    def __add__(self, other: WeightMemory) -> WeightMemory:
        """Return both together, as one unit."""
        return WeightMemory(
            self.stays_bytes + other.stays_bytes,
            self.dense + other.dense,
            self.stacks + other.stacks,
            self.experts + other.experts,
            self.lookup_bytes + other.lookup_bytes,
        )


NO_WEIGHTS = WeightMemory()


@dataclass(frozen=True, slots=True)
class Window:
    """What streaming needs on any stage of a model, in numbers that add up by unit.

    Any two weights may be in the window at once. What a weight has above `ordinary_bytes`, the
    second largest of the model, is counted with its unit, so that stages without the largest one
    (mostly the output head) do not pay for it, and no stage is counted short:
    (a - o) + (b - o) + 2 o = a + b for the two largest a and b of a stage.

    Attributes:
        ordinary_bytes: The second largest weight that may pass.
        cache_bytes: Least cache of experts and what computes with it, where they have one.
    """

    ordinary_bytes: int
    cache_bytes: int

    @property
    def n_bytes(self) -> int:
        """The window, with the least cache beside it."""
        return 2 * self.ordinary_bytes + self.cache_bytes

    def floor_bytes(self, unit: WeightMemory) -> int:
        """Return what of a unit's weights counts as kept wherever it is placed."""
        beyond = (size - self.ordinary_bytes for size in self._passing(unit))
        return unit.stays_bytes + sum(size for size in beyond if size > 0)

    def free_bytes(self, unit: WeightMemory, expert_bytes: Sequence[float]) -> tuple[float, ...]:
        """Return the bytes that are pinned or streamed, by read class.

        Args:
            unit: Its weights.
            expert_bytes: Of each class of experts, as the file has them; empty without a cache.
        """
        every = sum(unit.dense) + sum(unit.stacks) + unit.stays_bytes
        return (every - self.floor_bytes(unit) - sum(expert_bytes), *expert_bytes)

    def _passing(self, unit: WeightMemory) -> tuple[int, ...]:
        return unit.dense if self.cache_bytes else unit.dense + unit.stacks


def weight_memory(tensors: Iterable[TensorWork]) -> WeightMemory:
    """Count the pages of a unit's weights."""
    tensors = tuple(tensors)
    whole = [tensor for tensor in tensors if tensor.role == "every_token"]
    stacks = [tensor for tensor in tensors if tensor.role == "experts"]
    return WeightMemory(
        sum(page_bytes(tensor.size_bytes) for tensor in whole if not can_stream(tensor)),
        tuple(page_bytes(tensor.size_bytes) for tensor in whole if can_stream(tensor)),
        tuple(page_bytes(tensor.size_bytes) for tensor in stacks),
        tuple(stacks),
        sum(page_bytes(tensor.size_bytes) for tensor in tensors if tensor.role == "lookup"),
    )


def window_of(units: Sequence[WeightMemory], *, cached: bool, n_tokens: int = 1) -> Window:
    """Return what streaming needs for any stage of these units.

    Args:
        units: Of the model.
        cached: Whether experts have a cache and do not pass.
        n_tokens: Computed at once.
    """
    stacks = [tensor for unit in units for tensor in unit.experts] if cached else []
    cache_bytes = least_of(stacks) + rounds_bytes(stacks, n_tokens)
    dense = [size for unit in units for size in unit.dense]
    passing = dense if cache_bytes else dense + [size for unit in units for size in unit.stacks]
    largest = sorted(passing)[-2:]
    return Window(largest[0] if len(largest) > 1 else 0, cache_bytes)
