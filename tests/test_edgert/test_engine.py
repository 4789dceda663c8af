"""The engine on a fake model: caching, overflow, cancellation, errors, statistics."""

from __future__ import annotations

import threading

import numpy as np
import pytest

from edgert.engine import Engine, EngineSettings
from edgert.errors import BackendError, CapacityError, ConfigError, FormatError
from edgert.events import Event, Notice, PrefillProgress
from edgert.sampling import SamplingParams
from edgert.speculative import NgramDrafter
from fakes import TEMPLATE, FakeBackend, FakeVocab

GREEDY = SamplingParams(temperature=0.0)
SETTINGS = EngineSettings("fake", chat_template=TEMPLATE)


def make(backend: FakeBackend | None = None, **settings: object) -> tuple[Engine, FakeBackend]:
    backend = backend or FakeBackend()
    values = {"model_name": "fake", "chat_template": TEMPLATE, **settings}
    return Engine(backend, EngineSettings(**values)), backend  # type: ignore[arg-type]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_prompt_is_decoded_in_batches_and_reported() -> None:
    events: list[Event] = []
    backend = FakeBackend(n_batch=8)
    engine = Engine(backend, SETTINGS, listener=events.append)
    reply = engine.complete("x" * 19, sampling=GREEDY, max_tokens=1)
    assert [len(tokens) for tokens in backend.passes] == [8, 8, 4]
    progress = [(e.done_tokens, e.total_tokens) for e in events if isinstance(e, PrefillProgress)]
    assert progress == [(0, 20), (8, 20), (16, 20), (20, 20)]
    assert (reply.stats.n_prompt_tokens, reply.stats.n_prefilled_tokens) == (20, 20)


def test_greedy_output_is_the_argmax_chain() -> None:
    engine, _ = make()
    reply = engine.complete("ab", sampling=GREEDY, max_tokens=12)
    plain = FakeBackend()
    tokens = [plain.vocab.bos, *b"ab"]
    expected = []
    logits = plain.decode(tokens, 0, 1)
    for _ in range(12):
        expected.append(int(np.argmax(logits[-1])))
        tokens.append(expected[-1])
        logits = plain.decode([expected[-1]], len(tokens) - 1, 1)
    assert list(reply.token_ids) == expected
    assert reply.finish_reason == "length"


def test_stream_and_whole_reply_are_equal() -> None:
    engine, _ = make()
    whole = engine.complete("abc", sampling=SamplingParams(seed=5), max_tokens=20)
    chunks = list(
        engine.complete("abc", sampling=SamplingParams(seed=5), max_tokens=20, stream=True)
    )
    assert "".join(chunk.text for chunk in chunks) == whole.text
    assert [i for chunk in chunks for i in chunk.token_ids] == list(whole.token_ids)
    assert [chunk.finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert engine.stats().n_generations == 2
    assert engine.stats().last is not None


def test_later_turns_prefill_only_what_is_new() -> None:
    engine, backend = make()
    sampling = SamplingParams(temperature=1.5, seed=3, top_k=0, top_p=1.0, min_p=0.0)
    first = engine.chat([user("hello there")], sampling=sampling, max_tokens=9)
    n_cached = len(backend.tokens)
    messages = [user("hello there"), {"role": "assistant", "content": first.text}, user("more")]
    second = engine.chat(messages, sampling=sampling, max_tokens=3)
    assert second.stats.n_prefilled_tokens == second.stats.n_prompt_tokens - n_cached


def test_same_prompt_again_decodes_one_token() -> None:
    engine, _ = make()
    first = engine.complete("abcdef", sampling=GREEDY, max_tokens=4)
    again = engine.complete("abcdef", sampling=GREEDY, max_tokens=4)
    assert again.token_ids == first.token_ids
    assert again.stats.n_prefilled_tokens == 1


def test_end_token_stops_and_is_not_part_of_the_reply() -> None:
    vocab = FakeVocab()

    def logits(window: tuple[int, ...]) -> np.ndarray:
        row = np.zeros(vocab.n_tokens, np.float32)
        row[vocab.eot if window[-1] == ord("c") else window[-1] + 1] = 9.0
        return row

    engine, _ = make(FakeBackend(vocab=vocab, logits=logits))
    reply = engine.complete("a", sampling=GREEDY, max_tokens=10)
    assert (reply.text, reply.finish_reason) == ("bc", "stop")
    assert reply.token_ids == (ord("b"), ord("c"))


def test_stop_string_ends_the_text_before_it() -> None:
    vocab = FakeVocab()

    def logits(window: tuple[int, ...]) -> np.ndarray:
        row = np.zeros(vocab.n_tokens, np.float32)
        row[(window[-1] + 1) % 256] = 9.0
        return row

    engine, _ = make(FakeBackend(vocab=vocab, logits=logits))
    reply = engine.complete("a", sampling=GREEDY, max_tokens=20, stop=["efg", "fgX"])
    assert (reply.text, reply.finish_reason) == ("bcd", "stop")


def test_prompt_longer_than_context_is_refused_before_any_work() -> None:
    engine, backend = make(FakeBackend(n_ctx=32))
    with pytest.raises(CapacityError, match=r"33 tokens, the context holds 31") as caught:
        engine.complete("x" * 32, sampling=GREEDY)
    assert "--ctx-size" in (caught.value.hint or "")
    assert backend.passes == []


def test_full_context_ends_the_reply_with_length() -> None:
    engine, backend = make(FakeBackend(n_ctx=32))
    reply = engine.complete("x" * 20, sampling=GREEDY)
    assert reply.finish_reason == "length"
    assert reply.stats.n_generated_tokens == 32 - 21 + 1
    assert len(backend.tokens) == 32


def test_shift_keeps_bos_and_system_prompt_and_goes_on() -> None:
    events: list[Event] = []
    backend = FakeBackend(n_ctx=64)
    settings = EngineSettings("fake", chat_template=TEMPLATE, overflow="shift")
    engine = Engine(backend, settings, listener=events.append)
    messages = [{"role": "system", "content": "be kind"}, user("hi")]
    reply = engine.chat(messages, sampling=GREEDY, max_tokens=100)
    assert reply.stats.n_generated_tokens == 100
    head = [backend.vocab.bos, 258, *b"\nbe kind"]
    assert backend.tokens[: len(head)] == head
    assert len(backend.tokens) <= 64
    assert any(isinstance(event, Notice) and "full" in event.text for event in events)


def test_too_long_prompt_is_shortened_by_whole_shifts() -> None:
    engine, backend = make(FakeBackend(n_ctx=32), overflow="shift")
    text = "".join(chr(97 + i % 26) for i in range(80))
    engine.complete(text, sampling=GREEDY, max_tokens=1)
    # keep 1 (BOS), drop (32 - 1) // 2 = 15 at a time: 81 - 4 * 15 = 21 <= 31
    assert backend.tokens == [backend.vocab.bos, *text.encode()[60:]]


def test_shift_is_refused_where_the_model_cannot() -> None:
    with pytest.raises(ConfigError, match="cannot be shifted"):
        make(FakeBackend(shiftable=False), overflow="shift")


def test_cancel_from_another_thread_finishes_the_stream() -> None:
    started, cancelled = threading.Event(), threading.Event()

    def wait(n_pass: int) -> None:
        if n_pass == 5:
            started.set()
            assert cancelled.wait(10)

    engine, backend = make(FakeBackend(before_pass=wait))

    def cancel() -> None:
        assert started.wait(10)
        engine.cancel()
        cancelled.set()

    helper = threading.Thread(target=cancel)
    helper.start()
    reply = engine.complete("abc", sampling=GREEDY, max_tokens=50)
    helper.join()
    assert reply.finish_reason == "cancelled"
    assert reply.stats.n_generated_tokens == 4
    again = engine.complete("abc", sampling=GREEDY, max_tokens=8)
    assert again.token_ids[:4] == reply.token_ids
    assert again.stats.n_prefilled_tokens == 1
    assert not backend.broken


def test_cancel_without_a_generation_does_not_stop_the_next_one() -> None:
    engine, backend = make()
    engine.cancel()
    assert engine.complete("abc", sampling=GREEDY, max_tokens=3).finish_reason == "length"
    backend.cancel()  # came too late for an earlier one
    assert engine.complete("xyz", sampling=GREEDY, max_tokens=3).finish_reason == "length"


def test_error_during_decode_leaves_a_usable_engine() -> None:
    def fail(n_pass: int) -> None:
        if n_pass == 4:
            raise FormatError("the file shrank", path="model.gguf")

    engine, _ = make(FakeBackend(before_pass=fail))
    with pytest.raises(FormatError, match="shrank"):
        engine.complete("abc", sampling=GREEDY, max_tokens=10)
    fresh, _ = make()
    expected = fresh.complete("abc", sampling=GREEDY, max_tokens=10)
    assert engine.complete("abc", sampling=GREEDY, max_tokens=10).token_ids == expected.token_ids


def test_keyboard_interrupt_leaves_a_usable_engine() -> None:
    def interrupt(n_pass: int) -> None:
        if n_pass == 3:
            raise KeyboardInterrupt

    engine, _ = make(FakeBackend(before_pass=interrupt))
    with pytest.raises(KeyboardInterrupt):
        engine.complete("abc", sampling=GREEDY, max_tokens=10)
    assert engine.complete("abc", sampling=GREEDY, max_tokens=10).finish_reason == "length"


def test_abandoned_stream_lets_the_next_caller_in() -> None:
    engine, _ = make()
    stream = engine.complete("abc", sampling=GREEDY, stream=True)
    first = next(stream)
    with pytest.raises(ConfigError, match="another stream"):
        engine.complete("abc", sampling=GREEDY, max_tokens=2)
    stream.close()
    again = engine.complete("abc", sampling=GREEDY, max_tokens=2)
    assert again.token_ids[: len(first.token_ids)] == first.token_ids


def test_second_thread_waits_for_its_turn() -> None:
    engine, _ = make()
    expected = engine.complete("abc", sampling=GREEDY, max_tokens=20).token_ids
    found: list[tuple[int, ...]] = []

    def ask() -> None:
        found.append(engine.complete("abc", sampling=GREEDY, max_tokens=20).token_ids)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


def test_close_ends_an_open_stream_and_later_calls_say_so() -> None:
    engine, backend = make()
    stream = engine.complete("abc", sampling=GREEDY, stream=True)
    next(stream)
    engine.close()
    engine.close()
    assert backend.closed
    with pytest.raises(ConfigError, match="closed"):
        engine.complete("abc")
    with pytest.raises(StopIteration):
        next(stream)


def test_recurrent_model_works_without_forgetting_and_without_speculation() -> None:
    events: list[Event] = []
    backend = FakeBackend(can_forget=False, order=1)
    engine = Engine(backend, SETTINGS, NgramDrafter(), events.append)
    fresh, _ = make(FakeBackend(order=1))
    for prompt in ("abab abab", "abab xyz"):
        expected = fresh.complete(prompt, sampling=GREEDY, max_tokens=40).token_ids
        assert engine.complete(prompt, sampling=GREEDY, max_tokens=40).token_ids == expected


def test_embed_forgets_the_conversation() -> None:
    engine, backend = make()
    engine.complete("abc", sampling=GREEDY, max_tokens=3)
    assert engine.embed("ab") == [float(256 + 97 + 98)] * 4
    assert engine.complete("abc", sampling=GREEDY, max_tokens=3).stats.n_prefilled_tokens == 4
    assert backend.tokens[:4] == [256, 97, 98, 99]


def test_tokens_and_text_round_trip() -> None:
    engine, _ = make()
    assert engine.detokenize(engine.tokenize("hello été")) == "hello été"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": "abc"}, "stop is a string"),
        ({"stop": [""]}, r"stop\[0\]"),
        ({"sampling": SamplingParams(top_p=1.5)}, "top_p"),
        ({"sampling": SamplingParams(temperature=float("nan"))}, "temperature"),
        ({"sampling": SamplingParams(seed=-1)}, "seed"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    engine, backend = make()
    with pytest.raises(ConfigError, match=message):
        engine.complete("abc", **arguments)  # type: ignore[call-overload]
    assert backend.passes == []


def test_text_that_is_not_unicode_is_refused() -> None:
    engine, _ = make()
    broken = b"abc\xff".decode("utf-8", "surrogateescape")
    with pytest.raises(ConfigError, match="character 3"):
        engine.complete(broken)
    with pytest.raises(ConfigError, match=r"messages\[0\].content"):
        engine.chat([user(broken)])


def test_engine_seed_makes_replies_repeatable() -> None:
    one, _ = make(seed=11)
    two, _ = make(seed=11)
    other, _ = make(seed=12)
    replies = [e.complete("abc", max_tokens=20).token_ids for e in (one, two, other)]
    assert replies[0] == replies[1] != replies[2]


def test_listener_that_fails_does_not_wedge_the_engine() -> None:
    def listener(event: Event) -> None:
        raise BackendError(f"listener: {event}")

    engine = Engine(FakeBackend(), SETTINGS, listener=listener)
    for _ in range(2):
        with pytest.raises(BackendError, match="listener"):
            engine.complete("abc", max_tokens=2)


def test_whoever_stops_at_the_last_chunk_lets_the_next_one_in() -> None:
    engine, _ = make()
    stream = engine.complete("abc", sampling=GREEDY, max_tokens=3, stream=True)
    while next(stream).finish_reason is None:
        pass
    assert engine.complete("abc", sampling=GREEDY, max_tokens=3).finish_reason == "length"
    assert list(stream) == []


def test_cancelled_prefill_counts_only_what_was_computed() -> None:
    def press(n_pass: int) -> None:
        if n_pass == 2:
            engine.cancel()

    engine, _ = make(FakeBackend(n_batch=8, before_pass=press))
    reply = engine.complete("x" * 30, sampling=GREEDY, max_tokens=3)
    assert reply.finish_reason == "cancelled"
    assert (reply.stats.n_prompt_tokens, reply.stats.n_prefilled_tokens) == (31, 8)


def test_closing_waits_for_a_stream_that_nobody_reads_on_and_ends_it() -> None:
    decoding, release = threading.Event(), threading.Event()

    def wait(n_pass: int) -> None:
        if n_pass == 3:
            decoding.set()
            release.wait(10)

    engine, backend = make(FakeBackend(before_pass=wait))
    stream = engine.complete("abc", sampling=GREEDY, stream=True)
    reader = threading.Thread(target=lambda: [next(stream) for _ in range(3)])
    reader.start()
    assert decoding.wait(10)
    closer = threading.Thread(target=engine.close)
    closer.start()
    release.set()
    reader.join(10)
    closer.join(10)
    assert backend.closed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampling": {"temperature": 1}}, "sampling is a dict, wanted SamplingParams"),
        ({"stop": None}, "stop is a NoneType, wanted a list of strings"),
        ({"sampling": SamplingParams(grammar=5)}, "grammar is a int, wanted GBNF text"),  # type: ignore[arg-type]
        ({"sampling": SamplingParams(json_schema=[1])}, "JSON schema is a list"),  # type: ignore[arg-type]
        ({"sampling": SamplingParams(json_schema={"a": object()})}, "JSON schema is not JSON"),
    ],
)
def test_arguments_of_a_wrong_kind_are_named(arguments: dict[str, object], message: str) -> None:
    engine, _ = make()
    with pytest.raises(ConfigError, match=message):
        engine.chat([user("hi")], **arguments)  # type: ignore[call-overload]
    with pytest.raises(ConfigError, match="is a NoneType, wanted text"):
        engine.complete(None)  # type: ignore[call-overload]


def test_text_to_embed_that_is_too_long_says_by_how_much() -> None:
    engine, _ = make(FakeBackend(n_ctx=16))
    with pytest.raises(CapacityError, match="the text has 31 tokens, the context holds 16"):
        engine.embed("x" * 30)
