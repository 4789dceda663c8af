"""The asynchronous twin of the engine: each blocking step runs in a worker thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, overload

from edgert.engine import Engine, Messages
from edgert.errors import ConfigError
from edgert.loading import load
from edgert.replies import Chunk, Reply, collect
from edgert.sampling import SamplingParams
from edgert.stats import Stats
from edgert.turns import ChunkStream

T = TypeVar("T")
Chunks = AsyncGenerator[Chunk, None]


class AsyncEngine:
    """An engine for `async` code; cancelling a task ends its generation within one layer.

    Args:
        engine: Owned from here on.

    Example:
        >>> async with await AsyncEngine.load("model.gguf") as engine:
        ...     reply = await engine.chat(messages)
        ...     async for chunk in engine.chat(messages, stream=True):
        ...         print(chunk.text, end="")
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        # callers wait here and not in worker threads, which a few of them would use up
        self._turn = _TaskTurn()

    @classmethod
    async def load(
        cls,
        model: str | Path | None = None,
        **options: Any,  # noqa: ANN401  typed by `edgert.load`
    ) -> Self:
        """Open a model; the options are those of `edgert.load`."""
        return cls(await asyncio.to_thread(load, model, **options))

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Awaitable[Reply]: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Chunks: ...

    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Awaitable[Reply] | Chunks:
        """Answer a conversation; await the reply, or iterate over chunks. See `Engine.chat`."""
        return self._answer(
            lambda: self.engine.chat(
                messages, stream=True, sampling=sampling, max_tokens=max_tokens, stop=stop
            ),
            stream=stream,
        )

    @overload
    def complete(
        self,
        prompt: str,
        *,
        stream: Literal[False] = False,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Awaitable[Reply]: ...

    @overload
    def complete(
        self,
        prompt: str,
        *,
        stream: Literal[True],
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Chunks: ...

    def complete(
        self,
        prompt: str,
        *,
        stream: bool = False,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Awaitable[Reply] | Chunks:
        """Continue a text; await the reply, or iterate over chunks. See `Engine.complete`."""
        return self._answer(
            lambda: self.engine.complete(
                prompt, stream=True, sampling=sampling, max_tokens=max_tokens, stop=stop
            ),
            stream=stream,
        )

    async def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text."""
        return await asyncio.to_thread(self.engine.tokenize, text)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids."""
        return await asyncio.to_thread(self.engine.detokenize, token_ids)

    async def embed(self, text: str) -> list[float]:
        """Return the mean hidden state of a text; see `Engine.embed`."""
        return await self._in_turn(lambda: self.engine.embed(text))

    async def save_session(self, path: str | Path, messages: Messages) -> None:
        """Save a conversation; see `Engine.save_session`."""
        await self._in_turn(lambda: self.engine.save_session(path, messages))

    async def load_session(self, path: str | Path) -> list[dict[str, str]]:
        """Restore a conversation; see `Engine.load_session`."""
        return await self._in_turn(lambda: self.engine.load_session(path))

    def stats(self) -> Stats:
        """Return what was done since the engine was opened."""
        return self.engine.stats()

    def cancel(self) -> None:
        """End the running generation within one layer."""
        self.engine.cancel()

    async def close(self) -> None:
        """End what runs, streams that are half read included, and free the model."""
        await asyncio.to_thread(self.engine.close)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    def _answer(
        self, start: Callable[[], ChunkStream], *, stream: bool
    ) -> Awaitable[Reply] | Chunks:
        return self._chunks(start) if stream else self._reply(start)

    async def _reply(self, start: Callable[[], ChunkStream]) -> Reply:
        async with self._turn:
            chunks = await asyncio.to_thread(start)
            seen = [chunk async for chunk in _each(chunks)]
            return collect(seen, chunks.stats())

    async def _chunks(self, start: Callable[[], ChunkStream]) -> Chunks:
        last = None
        async with self._turn:
            async for chunk in _each(await asyncio.to_thread(start)):
                if chunk.finish_reason is None:
                    yield chunk
                else:
                    last = chunk
        # who stops at the last chunk and asks no further must not keep others waiting
        if last is not None:
            yield last

    async def _in_turn(self, work: Callable[[], T]) -> T:
        async with self._turn:
            return await asyncio.to_thread(work)


class _TaskTurn:
    """A lock that refuses to wait for its own task."""

    def __init__(self) -> None:
        self._lock = asyncio.Lock()
        self._holder: asyncio.Task[Any] | None = None

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        if self._lock.locked() and self._holder is task:
            raise ConfigError(
                "another stream of this engine is open in this task",
                hint="exhaust the stream or await its aclose() first",
            )
        await self._lock.acquire()
        self._holder = task

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._holder = None
        self._lock.release()


async def _each(chunks: ChunkStream) -> Chunks:
    """Take chunks in worker threads; cancellation waits for the thread, which ends soon."""
    try:
        while True:
            step = asyncio.ensure_future(asyncio.to_thread(next, chunks, None))
            try:
                chunk = await asyncio.shield(step)
            except asyncio.CancelledError:
                chunks.cancel()
                await asyncio.wait({step})
                raise
            if chunk is None:
                return
            yield chunk
    finally:
        chunks.close()
