"""Hears every choice of every router, in whatever way the model's weights are kept."""

from __future__ import annotations

from typing import Protocol

from edgert.errors import ConfigError
from edgert.experts.binding import chosen_experts
from edgert.experts.ids import Ids
from edgert.experts.routed import Turn, find_turns
from edgert.llama.lib import TensorFields
from edgert.llama.runner import WeightGauges, WeightKeeper
from edgert.llama.tap import Tap
from edgert.weights.loading import LoadedModel


class RoutingListener(Protocol):
    """Hears every choice of every router."""

    def routed(self, turn: Turn, experts: Ids) -> None:
        """Take a choice, (n_tokens, n_used), the likeliest of each token first."""
        ...


def watch_routing(loaded: LoadedModel, listener: RoutingListener) -> None:
    """Have the tap of a model tell what its routers choose.

    Raises:
        ConfigError: the model has no routers.
    """
    turns = find_turns(loaded.uses)
    if not turns:
        raise ConfigError(
            f"{loaded.model.file.path} has no experts that a router chooses",
            hint="leave --routing-trace out, or name a mixture of experts",
        )
    for turn in turns:
        loaded.tap.watch(turn.ids_name, _Watch(turn, listener))


class TappedWeights:
    """A `WeightKeeper` that moves nothing, with a tap beside it.

    Args:
        keeper: Has the weights in place.
        tap: Only watches.
    """

    def __init__(self, keeper: WeightKeeper, tap: Tap) -> None:
        self._keeper = keeper
        self._tap = tap

    def begin_pass(self, n_tokens: int, n_logits: int) -> None:
        """Prepare for a decode."""
        self._tap.begin()
        self._keeper.begin_pass(n_tokens, n_logits)

    def end_pass(self, *, complete: bool) -> None:
        """Finish a decode; raises what went wrong while watching."""
        self._keeper.end_pass(complete=complete)
        self._tap.raise_error()

    def gauges(self) -> WeightGauges:
        """Return the keeper's gauges."""
        return self._keeper.gauges()

    def describe(self) -> str:
        """Say where the weights are."""
        return self._keeper.describe()

    def close(self) -> None:
        """Give the memory back."""
        self._keeper.close()


class _Watch:
    """Reads what one router chose from its node."""

    def __init__(self, turn: Turn, listener: RoutingListener) -> None:
        self._turn = turn
        self._listener = listener

    def __call__(self, node: TensorFields) -> None:
        if node.ne[1]:  # a batch that wants no logits has no rows in the last layer
            experts = chosen_experts(node, self._turn.stacks[0].n_experts)
            self._listener.routed(self._turn, experts)
