"""How hidden states get from embeddings to logits over parts here and on other hosts."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
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


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens that go through the stages together."""

    first: int
    end: int
    n_rows: int


class Stages:
    """Layers in a row, some here, some on other hosts; chunks of a prompt overlap.

    Args:
        parts: In order; the last one puts out logits.
        chunk_tokens: Of a prompt at once.
    """

    def __init__(self, parts: Sequence[PartRunner | RemotePart], chunk_tokens: int) -> None:
        self._parts = list(parts)
        self._chunk_tokens = chunk_tokens
        self._number = 0
        self._numbering = threading.Lock()
        self._pool = ThreadPoolExecutor(len(self._parts), "stage")
        self.here = next((part for part in parts if isinstance(part, PartRunner)), None)

    def run(self, hidden: Floats, first_position: int, n_rows: int, n_candidates: int) -> Floats:
        """See `Route`."""
        chunks = self._chunks(len(hidden), n_rows)
        if len(chunks) == 1:
            for part in self._parts:
                hidden = self._one(part, hidden, first_position, (chunks[0], n_candidates))
            return hidden
        return self._overlapping(hidden, first_position, chunks, n_candidates)

    def order(self, order: Order) -> None:
        """See `Route`."""
        for part in self._parts:
            if isinstance(part, PartRunner):
                obey(part, order)
            else:
                part.order(order)

    def cancel(self) -> None:
        """See `Route`."""
        for part in self._parts:
            if isinstance(part, PartRunner):
                part.cancel()

    def close(self) -> None:
        """See `Route`."""
        self._pool.shutdown()
        for part in self._parts:
            part.close()

    def _chunks(self, n_tokens: int, n_rows: int) -> list[_Chunk]:
        """Cut a batch; rows are wanted of its last tokens."""
        chunks = []
        for first in range(0, n_tokens, self._chunk_tokens):
            end = min(first + self._chunk_tokens, n_tokens)
            wanted = max(0, end - max(first, n_tokens - n_rows))
            chunks.append(_Chunk(first, end, wanted))
        return chunks

    def _one(
        self,
        part: PartRunner | RemotePart,
        hidden: Floats,
        first_position: int,
        wanted: tuple[_Chunk, int],
    ) -> Floats:
        """Run a chunk through one part."""
        chunk, n_candidates = wanted
        n_rows = len(hidden) if part.to_hidden else chunk.n_rows
        position = first_position + chunk.first
        if isinstance(part, PartRunner):
            return part.run(hidden, position, n_rows)
        with self._numbering:
            self._number += 1
            step = Step(self._number, position, len(hidden), n_rows, n_candidates)
        out = np.empty((n_rows, part.width), np.float32)
        part.start(step, hidden)
        part.finish(step, out)
        return out

    def _overlapping(
        self, hidden: Floats, first_position: int, chunks: list[_Chunk], n_candidates: int
    ) -> Floats:
        """Run chunks one behind the other, each part in a thread of its own."""
        queues: list[SimpleQueue[Floats | None]] = [SimpleQueue() for _ in self._parts]
        rows: list[Floats] = []

        def work(index: int) -> None:
            following = queues[index + 1] if index + 1 < len(queues) else None
            try:
                for chunk in chunks:
                    states = queues[index].get()
                    if states is None:
                        return
                    out = self._one(
                        self._parts[index], states, first_position, (chunk, n_candidates)
                    )
                    if following is not None:
                        following.put(out.copy())
                    else:
                        rows.append(out.copy())
            finally:
                if following is not None:
                    following.put(None)

        futures = [self._pool.submit(work, index) for index in range(len(self._parts))]
        for chunk in chunks:
            queues[0].put(hidden[chunk.first : chunk.end])
        queues[0].put(None)
        for future in futures:
            future.result()
        return np.concatenate(rows)


def obey(part: PartRunner, order: Order) -> None:
    """Have a part here forget or renumber positions."""
    if order.kind is OrderKind.TRUNCATE:
        part.truncate(order.a)
    elif order.kind is OrderKind.SHIFT:
        part.shift(order.a, order.b)
    else:
        raise ValueError(f"{order.kind.name} is no order about positions")
