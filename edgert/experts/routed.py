"""Routed weights: stacks of experts that ids computed by a router pick from."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from edgert.errors import BackendError
from edgert.llama.lib import tensor_at
from edgert.weights.uses import WeightUse


@dataclass(frozen=True, slots=True)
class Stack:
    """The experts of one tensor.

    Attributes:
        name: The tensor.
        index: Its place among all stacks, in order of use.
        turn: The place of its layer among those with experts.
        n_experts: Matrices in it.
        row_length: Columns of each.
        n_rows: Rows of each.
        ggml_type: Type of its bytes.
        expert_bytes: Bytes of one expert in the model's file.
        addresses: Its `ggml_tensor` structures.
    """

    name: str
    index: int
    turn: int
    n_experts: int
    row_length: int
    n_rows: int
    ggml_type: int
    expert_bytes: int
    addresses: tuple[int, ...]

    @property
    def n_weights(self) -> int:
        """Weights of one expert."""
        return self.row_length * self.n_rows


@dataclass(frozen=True, slots=True)
class Turn:
    """One layer's experts: a router's choice and the stacks it picks from.

    Attributes:
        index: Place among the layers with experts.
        ids_name: Name of the node whose output (int32, n_used x n_tokens) is the choice.
        layer: The layer's number as the node's name gives it; None if it gives none.
        stacks: In order of use.
    """

    index: int
    ids_name: bytes
    layer: int | None
    stacks: tuple[Stack, ...]

    @property
    def n_weights(self) -> int:
        """Weights of one expert, of all stacks."""
        return sum(stack.n_weights for stack in self.stacks)

    @property
    def n_bits(self) -> int:
        """Their bits in the model's file."""
        return sum(8 * stack.expert_bytes for stack in self.stacks)


def find_turns(
    uses: Mapping[str, WeightUse], only_by_choice: Collection[str] = ()
) -> tuple[Turn, ...]:
    """Group the routed weights of a model by the node that chooses among them, in order of use.

    Args:
        uses: Every weight.
        only_by_choice: Weights whose bytes cannot be used whole: those of nested experts.

    Raises:
        BackendError: two layers are chosen for by nodes of the same name, or what can be used only
            by choice is used in another way.
    """
    for weight in only_by_choice:
        if weight in uses and not uses[weight].routed_by:
            raise BackendError(
                f"{weight} is nested, and no node of llama.cpp's graph says which experts it "
                "chooses",
                hint="run the model that it was made of",
            )
    routed = sorted((use for use in uses.values() if use.routed_by), key=lambda use: use.order)
    groups: dict[bytes, list[WeightUse]] = {}
    for use in routed:
        groups.setdefault(use.routed_by, []).append(use)
    turns: list[Turn] = []
    n_stacks = 0
    for name, members in groups.items():
        stacks = tuple(_stack(use, n_stacks + i, len(turns)) for i, use in enumerate(members))
        n_stacks += len(stacks)
        if len({stack.n_experts for stack in stacks}) > 1:
            raise BackendError(f"{name.decode()} chooses from stacks of different lengths")
        turns.append(Turn(len(turns), name, _number_of(name), stacks))
    return tuple(turns)


def stacks_of(turns: Sequence[Turn]) -> tuple[Stack, ...]:
    """Return every stack, in order of use."""
    return tuple(stack for turn in turns for stack in turn.stacks)


def _stack(use: WeightUse, index: int, turn: int) -> Stack:
    tensor = tensor_at(min(use.addresses))
    return Stack(
        name=use.name,
        index=index,
        turn=turn,
        n_experts=tensor.ne[2],
        row_length=tensor.ne[0],
        n_rows=tensor.ne[1],
        ggml_type=tensor.type,
        expert_bytes=tensor.nb[2],
        addresses=tuple(sorted(use.addresses)),
    )


def _number_of(name: bytes) -> int | None:
    number = name.rpartition(b"-")[2]
    return int(number) if number.isdigit() else None
