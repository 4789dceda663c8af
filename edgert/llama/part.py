"""Runs a part of a model: hidden states in, hidden states or logits out."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.llama.backend import Counters
from edgert.llama.context import Piece
from edgert.llama.part_graph import PartGraph
from edgert.llama.runner import LlamaBackend

Floats = NDArray[np.float32]


class PartRunner:
    """An open part; not thread-safe, except `cancel`.

    Args:
        backend: Owned from here on.
        graph: Installed in its tap.
        to_hidden: Whether it ends with hidden states.
    """

    def __init__(self, backend: LlamaBackend, graph: PartGraph, *, to_hidden: bool) -> None:
        self._backend = backend
        self._graph = graph
        self.to_hidden = to_hidden

    @property
    def n_ctx(self) -> int:
        """Positions in the KV cache."""
        return self._backend.n_ctx

    @property
    def n_batch(self) -> int:
        """Most tokens of one `run`."""
        return self._backend.n_batch

    @property
    def n_logits_max(self) -> int:
        """Most logits of one `run`."""
        return self._backend.n_logits_max

    def run(self, hidden: Floats, first_position: int, n_rows: int) -> Floats:
        """Run hidden states at positions `first_position` and up.

        Args:
            hidden: (n_tokens, n_embd), what the layer before the first one put out, or embeddings.
            first_position: Everything before it is cached.
            n_rows: Of how many of the last tokens the output is wanted; hosts that share layers
                must agree, and a part that others follow computes all.

        Returns:
            (n_rows, n_embd) hidden states, or (n_rows, n_vocab) logits; the next run may overwrite
            them.

        Raises:
            Cancelled: `cancel` was called; positions from `first_position` on are undefined.
            LinkError: other hosts of the same layers failed.
            FormatError: the file changed or cannot be read any more.
            BackendError: llama.cpp failed.
        """
        self._graph.begin_pass(len(hidden), n_rows)
        complete = False
        try:
            logits = self._backend.decode_hidden(hidden, first_position, n_rows)
            complete = True
        finally:
            self._graph.end_pass(complete=complete)
        return self._graph.hidden(n_rows) if self.to_hidden else logits

    def run_pieces(self, hidden: Floats, pieces: Sequence[Piece]) -> Floats:
        """Run hidden states of several sequences together.

        Args:
            hidden: (n_tokens, n_embd), those of the pieces one after the other.
            pieces: Of which sequences they are, each sequence once.

        Returns:
            Rows of all pieces, in their order; the next run may overwrite them.

        Raises:
            Cancelled: `cancel` was called; positions of the pieces are undefined.
            CapacityError: there is no room for their positions; nothing has changed.
            FormatError, BackendError: as `run`; positions of the pieces are undefined.
        """
        n_rows = sum(piece.n_rows for piece in pieces)
        self._graph.begin_pass(len(hidden), n_rows)
        complete = False
        try:
            logits = self._backend.decode_pieces(hidden, pieces)
            complete = True
        finally:
            self._graph.end_pass(complete=complete)
        return self._graph.hidden(n_rows) if self.to_hidden else logits

    def truncate(self, n_positions: int, sequence: int = 0) -> None:
        """Forget positions of a sequence from `n_positions` on."""
        self._backend.truncate(n_positions, sequence)

    def wipe(self) -> None:
        """Forget every sequence, and overwrite what was kept of them."""
        self._backend.wipe()

    def shift(self, keep: int, discard: int, sequence: int = 0) -> None:
        """Forget [keep, keep + discard) of a sequence and renumber."""
        self._backend.shift(keep, discard, sequence)

    def can_shift(self) -> bool:
        """Say whether `shift` works."""
        return self._backend.can_shift()

    def cancel(self) -> None:
        """Make the running `run` raise `Cancelled`; callable from any thread."""
        self._backend.cancel()

    def counters(self) -> Counters:
        """Return the counters as they are now."""
        return self._backend.counters()

    def applied(self) -> dict[str, str]:
        """Return what was applied, for people."""
        return self._backend.applied()

    def close(self) -> None:
        """Free everything; calling again does nothing."""
        self._backend.close()
