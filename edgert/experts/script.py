"""Remembers which nodes of the single-token graph matter, so that the others cost next to nothing.

Asking about a node costs microseconds of Python, and a token's graph has hundreds. The graph of one
token is always the same one, so after one pass that looked at every node the rest look only at
those that matter; each of them is compared with what was there before, and a graph that differs is
an error before anything of it is computed wrongly.
"""

from __future__ import annotations

from edgert.errors import BackendError


class Script:
    """Which asks matter, counted from the first node; one for each kind of single-token graph."""

    def __init__(self) -> None:
        self._known: dict[int, list[bytes | None]] = {}
        self._kind: int | None = None
        self._names: list[bytes | None] | None = None
        self._learnt: list[bytes | None] = []
        self._position = 0

    def begin(self, kind: int | None) -> None:
        """Start a pass.

        Args:
            kind: What tells single-token graphs apart: the number of logits. None for other passes.
        """
        self._kind = kind
        self._names = None if kind is None else self._known.get(kind)
        self._learnt = []
        self._position = 0

    def skips(self) -> bool:
        """Say whether the next node does not matter, and go on to it if so."""
        names = self._names
        if names is None or self._position >= len(names) or names[self._position] is not None:
            return False
        self._position += 1
        return True

    def saw(self, name: bytes, *, matters: bool) -> None:
        """Take note of a node that was looked at.

        Raises:
            BackendError: another one stood here before.
        """
        if self._names is None:
            if self._kind is not None:
                first = not self._learnt
                self._learnt.append(name if matters or first else None)
            return
        known = self._names[self._position] if self._position < len(self._names) else None
        if known == name:
            self._position += 1
        elif self._position:
            self._known.clear()
            raise BackendError(
                f"llama.cpp built another graph: {name.decode()} where {known!r} was",
                hint="try again: the next pass looks at every node",
            )

    def end(self, *, complete: bool) -> None:
        """Finish a pass; one that was not completed teaches nothing."""
        if complete and self._kind is not None and self._names is None and self._learnt:
            self._known[self._kind] = self._learnt
        elif complete and self._names is not None and self._position != len(self._names):
            self._known.clear()
            raise BackendError("llama.cpp built another graph, with fewer nodes")
        self._names = None
