"""The asynchronous twin, on the fake model."""

from __future__ import annotations

import asyncio
import threading

import pytest

from edgert.aio import AsyncEngine
from edgert.engine import Engine, EngineSettings
from edgert.errors import ConfigError
from edgert.sampling import SamplingParams
from fakes import TEMPLATE, FakeBackend

GREEDY = SamplingParams(temperature=0.0)
MESSAGES = [{"role": "user", "content": "hi"}]


def make(backend: FakeBackend) -> AsyncEngine:
    return AsyncEngine(Engine(backend, EngineSettings("fake", chat_template=TEMPLATE)))


async def test_reply_and_stream_are_those_of_the_engine() -> None:
    plain = Engine(FakeBackend(), EngineSettings("fake", chat_template=TEMPLATE))
    expected = plain.chat(MESSAGES, sampling=GREEDY, max_tokens=9)
    async with make(FakeBackend()) as engine:
        reply = await engine.chat(MESSAGES, sampling=GREEDY, max_tokens=9)
        assert (reply.text, reply.token_ids) == (expected.text, expected.token_ids)
        stream = engine.chat(MESSAGES, sampling=GREEDY, max_tokens=9, stream=True)
        assert "".join([chunk.text async for chunk in stream]) == expected.text
        assert await engine.detokenize(await engine.tokenize("hi")) == "hi"


async def test_cancelling_the_task_ends_the_generation_and_frees_the_engine() -> None:
    loop = asyncio.get_running_loop()
    decoding, release = asyncio.Event(), threading.Event()

    def wait(n_pass: int) -> None:
        if n_pass == 3:
            loop.call_soon_threadsafe(decoding.set)
            assert release.wait(10)

    backend = FakeBackend(before_pass=wait)
    engine = make(backend)
    task = asyncio.ensure_future(engine.complete("abc", sampling=GREEDY, max_tokens=200))
    await decoding.wait()
    task.cancel()
    await asyncio.sleep(0)
    release.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert len(backend.passes) == 3
    reply = await engine.complete("abc", sampling=GREEDY, max_tokens=5)
    assert reply.finish_reason == "length"
    await engine.close()
    assert backend.closed


async def test_more_callers_than_worker_threads_all_get_their_answer() -> None:
    async with make(FakeBackend()) as engine:
        expected = (await engine.complete("abc", sampling=GREEDY, max_tokens=6)).token_ids
        jobs = [engine.complete("abc", sampling=GREEDY, max_tokens=6) for _ in range(80)]
        replies = await asyncio.gather(*jobs)
        assert {reply.token_ids for reply in replies} == {expected}


async def test_a_stream_left_early_lets_the_next_one_in() -> None:
    async with make(FakeBackend()) as engine:
        stream = engine.complete("abc", sampling=GREEDY, stream=True)
        async for chunk in stream:
            assert chunk.token_ids
            break
        await stream.aclose()
        reply = await engine.complete("abc", sampling=GREEDY, max_tokens=3)
        assert reply.finish_reason == "length"


async def test_a_second_call_inside_a_stream_is_refused_instead_of_waiting_forever() -> None:
    async with make(FakeBackend()) as engine:
        stream = engine.complete("abc", sampling=GREEDY, stream=True)
        await anext(stream)
        with pytest.raises(ConfigError, match="another stream of this engine is open in this task"):
            await engine.complete("abc", sampling=GREEDY, max_tokens=3)
        await stream.aclose()


async def test_closing_ends_a_stream_that_is_half_read() -> None:
    backend = FakeBackend()
    engine = make(backend)
    stream = engine.complete("abc", sampling=GREEDY, stream=True)
    await anext(stream)
    await asyncio.wait_for(engine.close(), 10)
    assert backend.closed
    assert [chunk async for chunk in stream] == []


async def test_whoever_stops_at_the_last_chunk_lets_the_next_one_in() -> None:
    async with make(FakeBackend()) as engine:
        stream = engine.complete("abc", sampling=GREEDY, max_tokens=3, stream=True)
        while (await anext(stream)).finish_reason is None:
            pass
        assert (await engine.complete("abc", sampling=GREEDY, max_tokens=3)).finish_reason
        await stream.aclose()
