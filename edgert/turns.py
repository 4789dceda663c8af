"""Who may use an engine now: one generation at a time, others wait for their turn."""

from __future__ import annotations

import threading
from collections.abc import Generator
from types import TracebackType
from typing import Protocol, Self

from edgert.errors import ConfigError
from edgert.replies import Chunk
from edgert.stats import GenerationStats


class Turn:
    """A lock that can be given back by another thread, and refuses to wait for its own thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def take(self) -> None:
        """Wait for the turn.

        Raises:
            ConfigError: this thread has it already, through a stream that is not exhausted.
        """
        if not self._lock.acquire(blocking=False):
            if self._holder == threading.get_ident():
                raise ConfigError(
                    "another stream of this engine is open in this thread",
                    hint="exhaust the stream or close() it first",
                )
            self._lock.acquire()
        self._holder = threading.get_ident()

    def take_within(self, seconds: float) -> bool:
        """Wait for the turn at most so long; say whether it was taken."""
        taken = self._lock.acquire(timeout=seconds)
        if taken:
            self._holder = threading.get_ident()
        return taken

    def give(self) -> None:
        """Let the next one in."""
        self._holder = None
        self._lock.release()

    def __enter__(self) -> Self:
        self.take()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.give()


class Source(Protocol):
    """What a stream runs; `edgert.generation.Generation` is one."""

    def cancel(self) -> None:
        """End it soon, or at its first step."""
        ...

    def stats(self) -> GenerationStats:
        """Return what it cost so far."""
        ...


class ChunkStream:
    """An iterator of chunks that holds the engine's turn from the first chunk to the last.

    Leaving a `with` block, `close()`, or dropping the stream ends the generation.

    Args:
        source: What runs.
        chunks: Not started; takes the turn at its first step.
    """

    def __init__(self, source: Source, chunks: Generator[Chunk, None, None]) -> None:
        self._source = source
        self._chunks = chunks

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def cancel(self) -> None:
        """Make the stream finish with "cancelled" within one layer; from any thread."""
        self._source.cancel()

    def stats(self) -> GenerationStats:
        """Return what the generation cost so far."""
        return self._source.stats()

    def close(self) -> None:
        """End the generation; calling again does nothing."""
        self._chunks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
