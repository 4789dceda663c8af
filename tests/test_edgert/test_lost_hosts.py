"""A host that is gone for good: home goes on alone, or the error has the text so far."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from edgert.cli import chat
from edgert.cli.chat_repl import Repl
from edgert.cli.chat_state import ChatState
from edgert.cli.command import Context
from edgert.cli.options import (
    ChatOptions,
    DraftFlags,
    ModelFlags,
    OutputFlags,
    PromptFlags,
    SamplingFlags,
)
from edgert.cli.progress import ProgressListener
from edgert.config import directories
from edgert.engine import Engine, EngineSettings
from edgert.errors import CapacityError, LinkError, LinkTimeout
from edgert.events import Listener, ignore
from edgert.hosts.fallback import FallbackBackend
from edgert.llama.backend import Backend
from edgert.receipt import HostUse, Receipt
from edgert.sampling import SamplingParams
from fakes import TEMPLATE, FakeBackend

OPTIONS = ChatOptions(
    ModelFlags(), PromptFlags(n_predict=8), SamplingFlags(seed=1), DraftFlags(), OutputFlags()
)
GREEDY = SamplingParams(temperature=0)
TOLD = "tell me something that is long enough to be cut off in the middle of it"


@dataclass
class FakeHosts(FakeBackend):
    """A model over several hosts, one of which leaves."""

    given_up: bool = False

    def give_up(self) -> None:
        self.given_up = True


def leaves_at(n_pass: int, error: LinkError | None = None) -> Callable[[int], None]:
    """Raise from one pass on."""

    def before_pass(number: int) -> None:
        if number >= n_pass:
            raise error or LinkError("cloud: closed the connection")

    return before_pass


def engine(backend: Backend) -> Engine:
    return Engine(backend, EngineSettings("fake"))


def alone() -> str:
    with engine(FakeBackend()) as found:
        return found.complete(TOLD, max_tokens=20, sampling=GREEDY).text


@pytest.mark.parametrize("n_pass", [1, 2, 3, 4, 9, 20])
def test_home_goes_on_with_the_same_reply(n_pass: int) -> None:
    notices: list[str] = []
    hosts = FakeHosts(before_pass=leaves_at(n_pass))
    home = FakeBackend()
    backend = FallbackBackend(
        hosts, lambda: home, lambda event: notices.append(getattr(event, "text", ""))
    )
    with engine(backend) as found:
        reply = found.complete(TOLD, max_tokens=20, sampling=GREEDY)
        assert reply.text == alone()
        assert reply.receipt.fallback == "cloud: closed the connection"
        assert hosts.given_up
        assert "home goes on alone" in notices[-1]
        again = found.complete(TOLD, max_tokens=20, sampling=GREEDY)
        assert again.text == alone()
    assert home.closed
    assert hosts.closed


def test_the_receipt_of_a_reply_that_went_on_at_home_names_both() -> None:
    before = Receipt(hosts=(HostUse("cloud", "layers 3 to 8", sent_bytes=700),))
    after = replace(before, hosts=(before.hosts[0].plus(300, 10),), fallback="cloud: gone")
    assert after.since(before).describe() == (
        "cloud: layers 3 to 8, sent 300 B, received 10 B (f32); went on at home alone"
    )


def test_a_cache_that_was_cut_or_shifted_is_caught_up_as_it_is() -> None:
    hosts, home = FakeHosts(), FakeBackend()
    backend = FallbackBackend(hosts, lambda: home, ignore)
    backend.decode(list(range(20)), 0, 1)
    backend.truncate(12)
    backend.shift(2, 4)
    hosts.before_pass = leaves_at(0)
    backend.decode([30], 8, 1)
    assert home.tokens == [0, 1, *range(6, 12), 30]
    backend.truncate(3)
    backend.decode([31, 32], 3, 1)
    assert home.tokens == [0, 1, 6, 31, 32]


def test_home_that_cannot_go_on_either_says_both_reasons() -> None:
    def refuse() -> Backend:
        raise CapacityError("the plan takes 9 bytes, 8 are left")

    backend = FallbackBackend(FakeHosts(before_pass=leaves_at(1)), refuse, ignore)
    with pytest.raises(LinkError, match=r"cloud: closed .*; home cannot go on alone: the plan"):
        backend.decode([1], 0, 1)


@pytest.mark.parametrize("kind", [LinkError, LinkTimeout])
def test_without_a_plan_for_home_the_error_has_the_text_so_far(kind: type[LinkError]) -> None:
    hosts = FakeHosts(before_pass=leaves_at(9, kind("cloud: is silent")))
    with engine(hosts) as found:
        with pytest.raises(kind, match="cloud: is silent, after 6 tokens of the reply") as caught:
            found.complete(TOLD, max_tokens=20, sampling=GREEDY)
        assert caught.value.said
        assert alone().startswith(caught.value.said)
        hosts.before_pass = None
        assert found.complete(TOLD, max_tokens=20, sampling=GREEDY).text == alone()


@dataclass
class Desk:
    """A person's side: streams, and an engine whose link is lost after a few tokens."""

    folder: Path
    typed: str = ""
    out: io.StringIO = field(default_factory=io.StringIO)
    err: io.StringIO = field(default_factory=io.StringIO)
    backend: FakeBackend = field(
        default_factory=lambda: FakeBackend(n_ctx=2048, before_pass=leaves_at(5))
    )

    def context(self) -> Context:
        env = {"EDGERT_HOME": str(self.folder)}
        return Context(io.StringIO(self.typed), self.out, self.err, env, directories(env), {})

    def load(self, options: ChatOptions, context: Context, listener: Listener) -> Engine:
        del options, context
        settings = EngineSettings("fake", chat_template=TEMPLATE)
        return Engine(self.backend, settings, listener=listener)

    def chat(self, options: ChatOptions) -> int:
        return chat.run(options, self.context(), self.load)

    def state(self) -> ChatState:
        context = self.context()
        progress = ProgressListener(context)
        return ChatState(self.load(OPTIONS, context, progress), OPTIONS, context, progress)


def asked(**flags: object) -> ChatOptions:
    return replace(OPTIONS, prompt=replace(OPTIONS.prompt, **flags))  # type: ignore[arg-type]


def test_one_shot_prints_the_text_so_far_and_fails_as_a_link(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    with pytest.raises(LinkError) as caught:
        desk.chat(asked(prompt="hello"))
    assert caught.value.exit_code == 6
    assert caught.value.said
    assert desk.out.getvalue() == caught.value.said + "\n"


def test_as_json_the_text_so_far_has_its_own_reason(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    options = replace(asked(prompt="hello"), output=replace(OPTIONS.output, json=True))
    with pytest.raises(LinkError) as caught:
        desk.chat(options)
    found = json.loads(desk.out.getvalue())
    assert (found["text"], found["finish_reason"]) == (caught.value.said, "link")


def test_a_conversation_keeps_what_was_said_before_the_link_was_lost(tmp_path: Path) -> None:
    desk = Desk(tmp_path, typed="hello\n")
    state = desk.state()
    assert Repl(state).run() == 0
    assert "error: cloud: closed the connection, after" in desk.err.getvalue()
    assert [message["role"] for message in state.messages] == ["user", "assistant"]
    assert desk.out.getvalue().startswith(state.messages[1]["content"])
    desk.backend.before_pass = None
    state.say_to_model("continue")
    chat.reply(state, lambda _: None)
    assert [message["role"] for message in state.messages][2:] == ["user", "assistant"]
