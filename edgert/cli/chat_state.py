"""The state of a chat: what was said, with which settings, to which engine."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from edgert.cli.opening import read_text

if TYPE_CHECKING:
    from edgert.api import Chunk, Engine
    from edgert.cli.command import Context
    from edgert.cli.options import ChatOptions, SamplingFlags
    from edgert.cli.progress import ProgressListener
    from edgert.cli.reply import Spoken
    from edgert.sampling import SamplingParams

Message = dict[str, str]


@dataclass(slots=True)
class ChatState:
    """A conversation that slash commands and replies change.

    Attributes:
        messages: What was said, without the system prompt.
        system: The system prompt.
        pending: Text of files read, put before the next message.
        n_regenerated: How often the last answer was made again.
        set_here: Settings changed by /set.
        replaced: The answer that is being made again.
    """

    engine: Engine
    options: ChatOptions
    context: Context
    progress: ProgressListener
    system: str | None = None
    messages: list[Message] = field(default_factory=list)
    pending: str = ""
    n_regenerated: int = 0
    set_here: set[str] = field(default_factory=set)
    replaced: Message | None = None

    @property
    def n_predict(self) -> int | None:
        """Most tokens of a reply."""
        return self.options.prompt.n_predict

    def say_to_model(self, text: str) -> None:
        """Add a message of the person."""
        if self.pending:
            text = f"{self.pending}\n\n{text}"
            self.pending = ""
        self.messages.append({"role": "user", "content": text})
        self.n_regenerated = 0
        self.replaced = None

    def conversation(self) -> list[Message]:
        """Return all messages, the system prompt first."""
        first = [{"role": "system", "content": self.system}] if self.system else []
        return first + self.messages

    def start_reply(self) -> Iterator[Chunk]:
        """Begin the model's answer to the last message."""
        sampling = sampling_params(self.options.sampling, self.n_regenerated)
        max_tokens = self.n_predict
        stop = self.options.sampling.reverse_prompt
        if self.options.prompt.raw:
            return self.engine.complete(
                self.messages[-1]["content"],
                stream=True, sampling=sampling, max_tokens=max_tokens, stop=stop,
            )  # fmt: skip
        return self.engine.chat(
            self.conversation(),
            stream=True, sampling=sampling, max_tokens=max_tokens, stop=stop,
        )  # fmt: skip

    def heard(self, spoken: Spoken) -> None:
        """Keep what the model said; if it was stopped before a word, take the question back."""
        if spoken.text or not spoken.interrupted:
            self.messages.append({"role": "assistant", "content": spoken.text})
            self.replaced = None
        else:
            self.take_back()

    def take_back(self) -> None:
        """Forget a question that could not be answered, or keep the answer it had."""
        if self.replaced is not None:
            self.messages.append(self.replaced)
            self.replaced = None
        elif self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def regenerate(self) -> bool:
        """Forget the last answer; False when there is none."""
        if not self.messages or self.messages[-1]["role"] != "assistant":
            return False
        self.replaced = self.messages.pop()
        self.n_regenerated += 1
        return True


def sampling_params(flags: SamplingFlags, n_regenerated: int = 0) -> SamplingParams:
    """Build the sampler's parameters; a fixed seed moves on when an answer is made again."""
    from edgert.sampling import SamplingParams

    grammar = flags.grammar
    if flags.grammar_file is not None:
        grammar = read_text(flags.grammar_file)
    return replace(
        SamplingParams(),
        temperature=flags.temp,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        repeat_penalty=flags.repeat_penalty,
        repeat_last_n=flags.repeat_last_n,
        seed=None if flags.seed is None else (flags.seed + n_regenerated) % 2**32,
        grammar=grammar,
        json_schema=flags.json_schema,
    ).checked()
