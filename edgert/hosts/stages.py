"""Layers in a row, some here, some on other hosts: chunks of a prompt overlap, and one may fail."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

from edgert.errors import Cancelled
from edgert.hosts.lasting_part import LastingPart
from edgert.hosts.remote_part import RemotePart
from edgert.hosts.route import obey
from edgert.hosts.steps import Order
from edgert.llama.part import PartRunner

Floats = NDArray[np.float32]
Part = PartRunner | LastingPart


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Tokens that go through the stages together."""

    first: int
    end: int
    n_rows: int


class Stages:
    """See `Route`: layers follow each other.

    Args:
        parts: In order; the last one puts out logits.
        chunk_tokens: Of a prompt at once.
        n_embd: Width of hidden states, for parts that are behind a link that is the only one.
        exits: Whether the last part is a head alone: it needs the rows whose logits are wanted,
            so no others come back from where the last layer is.
    """

    def __init__(
        self,
        parts: Sequence[PartRunner | RemotePart | LastingPart],
        chunk_tokens: int,
        n_embd: int = 0,
        *,
        exits: bool = False,
    ) -> None:
        self._parts: list[Part] = [
            LastingPart(part, n_embd, chunk_tokens) if isinstance(part, RemotePart) else part
            for part in parts
        ]
        self._away = [part for part in self._parts if isinstance(part, LastingPart)]
        self._exits = exits
        self._chunk_tokens = chunk_tokens
        self._pool = ThreadPoolExecutor(len(self._parts), "stage")
        self._cancelled = False
        self._computing: set[PartRunner] = set()
        self._n_runs = 0
        self._running: int | None = None
        self._turn = threading.Lock()  # between the end of a run and what stops it elsewhere
        # Other hosts are told by a thread: whoever cancels may hold what a send waits for.
        self._stopping: SimpleQueue[int | None] = SimpleQueue()
        threading.Thread(target=self._stop_away, name="stop", daemon=True).start()
        self.here = next((part for part in parts if isinstance(part, PartRunner)), None)

    def run(self, hidden: Floats, first_position: int, n_rows: int, n_candidates: int) -> Floats:
        """See `Route`."""
        chunks = self._chunks(len(hidden), n_rows)
        self._n_runs += 1
        self._running = self._n_runs
        try:
            return self._through(hidden, first_position, chunks, n_candidates)
        except Cancelled:
            self._cancelled = False  # as with one host, what comes between runs stops the next
            raise
        finally:
            with self._turn:
                self._running = None

    def _through(
        self, hidden: Floats, first_position: int, chunks: list[_Chunk], n_candidates: int
    ) -> Floats:
        """Run a batch through all parts."""
        if len(chunks) > 1:
            return self._overlapping(hidden, first_position, chunks, n_candidates)
        for part in self._parts:
            hidden = self._one(part, hidden, first_position, (chunks[0], n_candidates))
        return hidden

    def order(self, order: Order) -> None:
        """See `Route`."""
        for part in self._parts[: len(self._parts) - self._exits]:
            if isinstance(part, PartRunner):
                obey(part, order)
            else:
                part.order(order)

    def traffic(self) -> Sequence[tuple[int, int]]:
        """See `Route`."""
        return [part.traffic() for part in self._away]

    def cancel(self) -> None:
        """See `Route`."""
        self._cancelled = True
        for part in tuple(self._computing):
            part.cancel()
        self._stopping.put(self._n_runs)

    def close(self) -> None:
        """See `Route`."""
        self._stopping.put(None)
        for away in self._away:
            away.close()
        self._pool.shutdown()
        for part in self._parts:
            part.close()

    def _stop_away(self) -> None:
        while (number := self._stopping.get()) is not None:
            with self._turn:
                if number == self._running:
                    for part in self._away:
                        part.stop()

    def _chunks(self, n_tokens: int, n_rows: int) -> list[_Chunk]:
        """Cut a batch; rows are wanted of its last tokens."""
        chunks = []
        for first in range(0, n_tokens, self._chunk_tokens):
            end = min(first + self._chunk_tokens, n_tokens)
            wanted = max(0, end - max(first, n_tokens - n_rows))
            chunks.append(_Chunk(first, end, wanted))
        return chunks

    def _one(
        self, part: Part, hidden: Floats, first_position: int, wanted: tuple[_Chunk, int]
    ) -> Floats:
        """Run a chunk through one part."""
        if self._cancelled:
            raise Cancelled("the step was given up")
        chunk, n_candidates = wanted
        is_exit = self._exits and part is self._parts[-1]
        before_exit = self._exits and part is self._parts[-2]
        position = first_position + chunk.first
        if isinstance(part, PartRunner):
            if is_exit and not chunk.n_rows:
                return np.empty((0, 0), np.float32)
            if is_exit:  # nothing of it is cached: its layer is zeros
                part.truncate(0)
                return self._compute(part, hidden, 0, chunk.n_rows)
            n_all = len(hidden) if part.to_hidden else chunk.n_rows
            rows = self._compute(part, hidden, position, n_all)
            return rows[len(rows) - chunk.n_rows :] if before_exit else rows
        n_rows = chunk.n_rows if before_exit or not part.to_hidden else len(hidden)
        return part.run(hidden, position, n_rows, n_candidates)

    def _compute(self, part: PartRunner, hidden: Floats, position: int, n_rows: int) -> Floats:
        """Run a part here; what was to stop an earlier run and came too late does not stop it."""
        self._computing.add(part)
        try:
            return part.run(hidden, position, n_rows)
        except Cancelled:
            if self._cancelled:
                raise
            part.truncate(position)
            return part.run(hidden, position, n_rows)
        finally:
            self._computing.discard(part)

    def _overlapping(
        self, hidden: Floats, first_position: int, chunks: list[_Chunk], n_candidates: int
    ) -> Floats:
        """Run chunks one behind the other, each part in a thread of its own."""
        queues: list[SimpleQueue[Floats | None]] = [SimpleQueue() for _ in self._parts]
        rows: list[Floats] = []
        failed = threading.Event()

        def work(index: int) -> None:
            following = queues[index + 1] if index + 1 < len(queues) else None
            try:
                for chunk in chunks:
                    states = queues[index].get()
                    if states is None or failed.is_set():
                        return
                    out = self._one(
                        self._parts[index], states, first_position, (chunk, n_candidates)
                    )
                    if following is not None:
                        following.put(out.copy())
                    else:
                        rows.append(out.copy())
            except BaseException:
                failed.set()  # the parts before it need not go on
                raise
            finally:
                if following is not None:
                    following.put(None)

        futures = [self._pool.submit(work, index) for index in range(len(self._parts))]
        for chunk in chunks:
            queues[0].put(hidden[chunk.first : chunk.end])
        queues[0].put(None)
        # No part may still run when the next order comes.
        wait(futures)
        for future in futures:
            future.result()
        return np.concatenate([some for some in rows if len(some)] or rows[-1:])
