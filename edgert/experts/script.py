"""Remembers which nodes of the single-token graph matter, so that the others cost next to nothing.

Asking about a node costs microseconds of Python, and a token's graph has hundreds. The graph of one
token is always the same one, so after one pass that looked at every node the rest look only at
those that matter; each of them is compared with what was there before, and a graph that differs is
an error before anything of it is computed wrongly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from edgert.errors import BackendError


@dataclass(frozen=True, slots=True)
class _Stop:
    """A node that matters, and how many after it do not."""

    name: bytes
    n_passed_over: int


class Script:
    """Which nodes matter; one list for each kind of single-token graph.

    Args:
        pass_over: Asks to be spared the next nodes; answers whether that can be done.
    """

    def __init__(self, pass_over: Callable[[int], bool] = lambda _n_nodes: False) -> None:
        self._pass_over = pass_over
        self._known: dict[int, list[_Stop]] = {}
        self._kind: int | None = None
        self._stops: list[_Stop] | None = None
        self._next = 0
        self._to_skip = 0
        self._learnt: list[bytes | None] = []
        self._before: dict[int, list[_Stop]] = {}

    def begin(self, kind: int | None) -> None:
        """Start a pass.

        Args:
            kind: What tells single-token graphs apart: the number of logits. None for other passes.
        """
        self._kind = kind
        self._stops = None if kind is None else self._known.get(kind)
        self._next = self._to_skip = 0
        self._learnt = []

    def skips(self) -> bool:
        """Say whether the node at hand does not matter."""
        if not self._to_skip:
            return False
        self._to_skip -= 1
        return True

    def saw(self, name: bytes, *, matters: bool) -> None:
        """Take note of a node that was looked at.

        Raises:
            BackendError: another one stood here before.
        """
        if self._stops is None:
            if self._kind is not None:
                self._learnt.append(name if matters or not self._learnt else None)
            return
        stop = self._stops[self._next] if self._next < len(self._stops) else None
        if stop is not None and stop.name == name:
            self._next += 1
            if stop.n_passed_over and not self._pass_over(stop.n_passed_over):
                self._to_skip = stop.n_passed_over
        elif self._next:  # before the first stop there may be a graph that shifts the cache
            self._known.clear()
            known = "the end" if stop is None else stop.name.decode()
            raise BackendError(
                f"llama.cpp built another graph: {name.decode()} where {known} was",
                hint="try again: the next pass looks at every node",
            )

    def end(self, *, complete: bool, n_passed_over: int = 0) -> None:
        """Finish a pass; one that was not completed teaches nothing.

        Args:
            complete: Whether every node was computed.
            n_passed_over: Nodes that were still to be passed over.

        Raises:
            BackendError: the graph had fewer nodes than before.
        """
        stops, self._stops = self._stops, None
        if not complete or self._kind is None:
            return
        if stops is None:
            learnt = _stops(self._learnt)
            if self._before.get(self._kind) == learnt:  # twice: no shift of the cache went first
                self._known[self._kind] = learnt
            self._before[self._kind] = learnt
        elif self._next != len(stops) or self._to_skip or n_passed_over:
            self._known.clear()
            raise BackendError("llama.cpp built another graph, with fewer nodes")


def _stops(names: list[bytes | None]) -> list[_Stop]:
    """Turn a name for every node, None where it does not matter, into stops."""
    places = [i for i, name in enumerate(names) if name is not None]
    ends = [*places[1:], len(names)]
    return [
        _Stop(names[place] or b"", end - place - 1) for place, end in zip(places, ends, strict=True)
    ]
