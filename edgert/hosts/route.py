"""How hidden states get from embeddings to logits over parts here and on other hosts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.hosts.remote_part import RemotePart, abort_all
from edgert.hosts.steps import Order, OrderKind, Step
from edgert.llama.part import PartRunner

Floats = NDArray[np.float32]


class Route(Protocol):
    """From embeddings to logits; not thread-safe, except `cancel`."""

    @property
    def here(self) -> PartRunner | None:
        """The first part that this process runs."""

    def run(self, hidden: Floats, first_position: int, n_rows: int, n_candidates: int) -> Floats:
        """Run hidden states; return (n_rows, n_vocab) logits.

        Args:
            hidden: (n_tokens, n_embd) embeddings.
            first_position: Everything before it is cached.
            n_rows: Of how many of the last tokens logits are wanted.
            n_candidates: Of each row of a part of the vocabulary only so many of the likeliest
                need to travel, the others may be -inf; 0 for all.
        """

    def order(self, order: Order) -> None:
        """Have every part forget or renumber positions."""

    def traffic(self) -> Sequence[tuple[int, int]]:
        """Return bytes sent and received so far, for each part on another host."""

    def cancel(self) -> None:
        """Make the running `run` raise `Cancelled`; callable from any thread."""

    def close(self) -> None:
        """Close every part here and every link."""


class SharedLayers:
    """Every host runs its share of every layer (tensor parallelism); home is the hub.

    Args:
        here: Home's share, which sums over hosts.
        others: The other shares, in their order; those with a part of the vocabulary answer.
        n_vocab: Of the whole vocabulary; home's part comes first.
    """

    def __init__(self, here: PartRunner, others: Sequence[RemotePart], n_vocab: int) -> None:
        self.here: PartRunner | None = here
        self._here = here
        self._others = list(others)
        self._n_vocab = n_vocab
        self._number = 0

    def run(self, hidden: Floats, first_position: int, n_rows: int, n_candidates: int) -> Floats:
        """See `Route`."""
        self._number += 1
        step = Step(self._number, first_position, len(hidden), n_rows, n_candidates)
        try:
            for part in self._others:
                part.start(step, hidden)
            logits = self._here.run(hidden, first_position, n_rows)
            return self._with_others(logits, step)
        except BaseException:
            abort_all(self._others, self._number)
            raise

    def order(self, order: Order) -> None:
        """See `Route`."""
        obey(self._here, order)
        for part in self._others:
            part.order(order)

    def traffic(self) -> Sequence[tuple[int, int]]:
        """See `Route`."""
        return [(part.link.sent_bytes, part.link.received_bytes) for part in self._others]

    def cancel(self) -> None:
        """See `Route`."""
        self._here.cancel()

    def close(self) -> None:
        """See `Route`."""
        for part in self._others:
            part.close()
        self._here.close()

    def _with_others(self, logits: Floats, step: Step) -> Floats:
        first = logits.shape[1]
        if first == self._n_vocab:
            return logits
        whole = np.empty((step.n_rows, self._n_vocab), np.float32)
        whole[:, :first] = logits
        for part in self._others:
            part.finish(step, whole[:, first : first + part.width])
            first += part.width
        return whole


def obey(part: PartRunner, order: Order) -> None:
    """Have a part here forget or renumber positions."""
    if order.kind is OrderKind.TRUNCATE:
        part.truncate(order.a)
    elif order.kind is OrderKind.SHIFT:
        part.shift(order.a, order.b)
    else:
        raise ValueError(f"{order.kind.name} is no order about positions")
