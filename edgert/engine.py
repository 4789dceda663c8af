"""The engine: a model with its KV cache, answering prompts and conversations one at a time."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, overload

from edgert.chat import ChatFormat, Prompt, check_messages, check_text
from edgert.errors import BackendError, CapacityError, ConfigError
from edgert.events import Listener, ignore
from edgert.generation import Clock, Generation, Overflow, Request
from edgert.llama.backend import Backend
from edgert.replies import Chunk, Reply, collect
from edgert.sampling import LARGEST_SEED, SamplingParams, check_int
from edgert.sessions import ModelIdentity, Session, load_session, save_session
from edgert.speculation import LARGEST_DRAFT, Speculation
from edgert.speculative import Drafter
from edgert.stats import Stats
from edgert.stops import check_stops
from edgert.token_cache import TokenCache
from edgert.turns import ChunkStream, Turn

Messages = Sequence[Mapping[str, str]]

_CLOSE_RETRY_S = 0.05


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine is told besides its backend.

    Attributes:
        model_name: For people.
        identity: The model as sessions know it; None where there is no file.
        chat_template: Jinja text from the model file, None when it has none.
        overflow: What to do when the context is full.
        draft_max: Most tokens of a draft.
        draft_name: What drafts, for people; None when nothing does.
        seed: Seed of generations that name none.
    """

    model_name: str
    identity: ModelIdentity | None = None
    chat_template: str | None = None
    overflow: Overflow = "error"
    draft_max: int = 16
    draft_name: str | None = None
    seed: int | None = None

    def checked(self) -> Self:
        """Return self after checking every range.

        Raises:
            ConfigError: a value is out of range.
        """
        if self.overflow not in ("error", "shift"):
            raise ConfigError(f"overflow is {self.overflow!r}, wanted error or shift")
        check_int("draft_max", self.draft_max, 1, LARGEST_DRAFT)
        if self.seed is not None:
            check_int("seed", self.seed, 0, LARGEST_SEED)
        return self


class Engine:
    """A loaded model. Thread-safe: calls wait for each other, `cancel` never waits.

    Args:
        backend: Runs the model; owned from here on.
        settings: See `EngineSettings`.
        drafter: Guesses tokens for speculation; owned from here on.
        listener: Gets events, in the thread that runs the call.
        clock: Gives seconds.

    Raises:
        ConfigError: a setting is out of range, or the model cannot shift its context.
        FormatError: the chat template is broken.
    """

    def __init__(
        self,
        backend: Backend,
        settings: EngineSettings,
        drafter: Drafter | None = None,
        listener: Listener = ignore,
        clock: Clock = time.perf_counter,
    ) -> None:
        self._clock = clock
        self._settings = settings.checked()
        if settings.overflow == "shift" and not backend.can_shift():
            raise ConfigError(
                f"the context of {settings.model_name} cannot be shifted",
                hint="use --overflow error",
            )
        self._backend = backend
        self._listener = listener
        self._format = ChatFormat(
            backend.vocab, settings.chat_template, settings.model_name, listener
        )
        self._cache = TokenCache(backend)
        self._speculation = (
            Speculation(drafter, settings.draft_max, clock) if drafter is not None else None
        )
        self._turn = Turn()
        self._running = threading.RLock()  # a signal handler may cancel while this thread has it
        self._vocab_use = threading.Lock()  # the vocabulary needs no turn, but must not be freed
        self._generation: Generation | None = None
        self._stats = Stats()
        self._streams: weakref.WeakSet[ChunkStream] = weakref.WeakSet()
        self._closed = False

    @property
    def model_name(self) -> str:
        """The model's name."""
        return self._settings.model_name

    @property
    def n_ctx(self) -> int:
        """Positions in the KV cache."""
        return self._backend.n_ctx

    def applied(self) -> dict[str, str]:
        """Return the settings in effect, for people."""
        drafted = f"{self._settings.draft_name}, up to {self._settings.draft_max} tokens"
        return {
            "model": self.model_name,
            **self._backend.applied(),
            "overflow": self._settings.overflow,
            "speculation": drafted if self._speculation is not None else "off",
            "seed": "random" if self._settings.seed is None else str(self._settings.seed),
        }

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[False] = False,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply: ...

    @overload
    def chat(
        self,
        messages: Messages,
        *,
        stream: Literal[True],
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> ChunkStream: ...

    def chat(
        self,
        messages: Messages,
        *,
        stream: bool = False,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply | ChunkStream:
        """Answer a conversation.

        Args:
            messages: `{"role": ..., "content": ...}` each; roles are system, user, assistant, tool.
            stream: Return chunks as they come instead of the whole reply.
            sampling: How to choose tokens.
            max_tokens: Upper bound of the answer, None up to the context.
            stop: Texts that end the answer.

        Returns:
            A `Reply`, or an iterator of `Chunk`; its statistics are in `stats().last` at the end.

        Raises:
            ConfigError: an argument is wrong.
            CapacityError: the conversation is longer than the context.
            FormatError: the model file changed, or its chat template fails.
        """
        with self._vocab_use:
            self._check_open()
            prompt = self._format.prompt(messages)
        stops = (*check_stops(stop), *self._format.stops)
        request = self._request(prompt, sampling, max_tokens, stops)
        chunks = self._stream(request, remember=True)
        return chunks if stream else collect(list(chunks), chunks.stats())

    @overload
    def complete(
        self,
        prompt: str,
        *,
        stream: Literal[False] = False,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply: ...

    @overload
    def complete(
        self,
        prompt: str,
        *,
        stream: Literal[True],
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> ChunkStream: ...

    def complete(
        self,
        prompt: str,
        *,
        stream: bool = False,
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
    ) -> Reply | ChunkStream:
        """Continue a text without any chat template; arguments and errors as in `chat`."""
        token_ids = self.tokenize(prompt)
        if not token_ids:
            raise ConfigError("the prompt is empty", hint="pass some text")
        n_keep = int(self._backend.vocab.add_bos)
        stops = check_stops(stop)
        request = self._request(Prompt(tuple(token_ids), n_keep), sampling, max_tokens, stops)
        chunks = self._stream(request, remember=False)
        return chunks if stream else collect(list(chunks), chunks.stats())

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, BOS included where the model wants it."""
        check_text(text, "the text")
        with self._vocab_use:
            self._check_open()
            return self._backend.vocab.tokenize(text, add_special=True)

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of token ids; broken UTF-8 becomes U+FFFD, control tokens nothing."""
        with self._vocab_use:
            self._check_open()
            pieces = [self._backend.vocab.piece(token_id) for token_id in token_ids]
        return b"".join(pieces).decode("utf-8", "replace")

    def embed(self, text: str) -> list[float]:
        """Return the mean hidden state of a text; the cached conversation is forgotten.

        Raises:
            ConfigError: the text is empty.
            CapacityError: the text is longer than the context.
        """
        token_ids = self.tokenize(text)
        if not token_ids:
            raise ConfigError("the text is empty", hint="pass some text")
        with self._turn:
            self._check_open()
            if len(token_ids) > self.n_ctx:
                raise CapacityError(
                    f"the text has {len(token_ids):,} tokens, the context holds {self.n_ctx:,}",
                    hint=f"use --ctx-size {len(token_ids)}, or a shorter text",
                )
            try:
                return [float(value) for value in self._backend.embed(token_ids)]
            finally:
                self._cache.forget()

    def stats(self) -> Stats:
        """Return what was done since the engine was opened."""
        return self._stats

    def cancel(self) -> None:
        """End the running generation within one layer; its stream finishes with "cancelled"."""
        with self._running:
            if self._generation is not None:
                self._generation.cancel()

    def save_session(self, path: str | Path, messages: Messages) -> None:
        """Save a conversation with its KV cache; an earlier file stays until the new one is whole.

        Raises:
            ConfigError: the place cannot be written.
        """
        self._check_open()
        checked = check_messages(messages)
        with self._turn:
            self._check_open()
            session = Session(
                messages=tuple(checked),
                replies=self._format.remembered(checked),
                token_ids=tuple(self._cache.token_ids),
            )
            save_session(Path(path), self._identity(), session, self._write_state)

    def load_session(self, path: str | Path) -> list[dict[str, str]]:
        """Restore a conversation; its next answer computes only what is new.

        Returns:
            The messages.

        Raises:
            ConfigError: no such file, or one of another model or longer than this context.
            FormatError: the file is damaged. The engine goes on as before in all cases.
        """
        with self._turn:
            self._check_open()
            session = load_session(Path(path), self._identity(), self.n_ctx)
            if session.token_ids:
                try:
                    self._cache.restore(Path(path), session.token_ids)
                except BackendError as error:
                    raise ConfigError(
                        f"{path}: the saved KV cache does not fit this context: {error.message}",
                        hint="use the --cache-type-k/-v it was saved with, and enough --ctx-size",
                    ) from error
            for text, token_ids in session.replies.items():
                self._format.remember(text, token_ids)
            return [dict(message) for message in session.messages]

    def close(self) -> None:
        """End what runs and free the model; calling again does nothing."""
        self._end_streams()
        while not self._turn.take_within(_CLOSE_RETRY_S):
            self._end_streams()
        try:
            with self._vocab_use:
                if self._closed:
                    return
                self._closed = True
                if self._speculation is not None:
                    self._speculation.close()
                self._backend.close()
        finally:
            self._turn.give()

    def _end_streams(self) -> None:
        self.cancel()
        with self._running:
            streams = list(self._streams)
        for stream in streams:
            with suppress(ValueError):  # being advanced by another thread, which ends it soon
                stream.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _identity(self) -> ModelIdentity:
        if self._settings.identity is None:
            raise ConfigError("this engine has no model file: sessions need one")
        return self._settings.identity

    def _write_state(self, path: Path) -> None:
        self._backend.save_state_file(path, self._cache.token_ids)

    def _check_open(self) -> None:
        if self._closed:
            raise ConfigError("the engine is closed", hint="load the model again")

    def _request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None,
        max_tokens: int | None,
        stops: tuple[str, ...],
    ) -> Request:
        if max_tokens is not None:
            check_int("max_tokens", max_tokens, 1, 2**31 - 1)
        if not isinstance(sampling, SamplingParams | None):
            raise ConfigError(
                f"sampling is a {type(sampling).__name__}, wanted SamplingParams",
                hint="pass edgert.SamplingParams(temperature=0.7)",
            )
        params = (sampling or SamplingParams()).checked()
        if params.seed is None:
            params = replace(params, seed=self._settings.seed)
        return Request(prompt.token_ids, params, max_tokens, stops, prompt.n_keep)

    def _stream(self, request: Request, *, remember: bool) -> ChunkStream:
        generation = Generation(
            self._cache,
            request,
            self._speculation if self._cache.can_rewind else None,
            self._settings.overflow,
            self._listener,
            self._clock,
        )
        stream = ChunkStream(generation, self._chunks(generation, remember=remember))
        with self._running:
            self._streams.add(stream)
        return stream

    def _chunks(self, generation: Generation, *, remember: bool) -> Generator[Chunk, None, None]:
        text, token_ids, last = "", list[int](), None
        with self._turn:
            self._check_open()
            with self._running:
                self._generation = generation
            try:
                for chunk in generation.run():
                    text += chunk.text
                    token_ids += chunk.token_ids
                    if chunk.finish_reason is None:
                        yield chunk
                        continue
                    last = chunk
                    self._stats = self._stats.plus(generation.stats())
                    if remember:
                        self._format.remember(text, token_ids)
            finally:
                with self._running:
                    self._generation = None
        # who stops at the last chunk and asks no further must not keep others waiting
        if last is not None:
            yield last
