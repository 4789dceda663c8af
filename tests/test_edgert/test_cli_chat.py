"""`edgert chat` over a fake model: one-shot, conversations, commands, Ctrl-C."""

from __future__ import annotations

import io
import json
import signal
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from edgert.cli import chat, run
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
from edgert.cli.reply import Spoken, statistics_line
from edgert.config import directories
from edgert.engine import Engine, EngineSettings
from edgert.errors import ConfigError, EdgertError
from edgert.events import Listener
from edgert.sessions import ModelIdentity
from edgert.stats import GenerationStats
from fakes import TEMPLATE, FakeBackend

OPTIONS = ChatOptions(
    ModelFlags(), PromptFlags(n_predict=8), SamplingFlags(seed=1), DraftFlags(), OutputFlags()
)


@dataclass
class Desk:
    """A person's side: streams and a fake engine."""

    folder: Path
    typed: str = ""
    backend: FakeBackend = field(default_factory=lambda: FakeBackend(n_ctx=2048))
    out: io.StringIO = field(default_factory=io.StringIO)
    err: io.StringIO = field(default_factory=io.StringIO)

    def context(self) -> Context:
        env = {"EDGERT_HOME": str(self.folder)}
        return Context(io.StringIO(self.typed), self.out, self.err, env, directories(env), {})

    def load(self, options: ChatOptions, context: Context, listener: Listener) -> Engine:
        del options, context
        identity = ModelIdentity(name="fake", size_bytes=1, sha256="0", cache_types="f16/f16")
        settings = EngineSettings("fake", identity, chat_template=TEMPLATE)
        return Engine(self.backend, settings, listener=listener)

    def chat(self, options: ChatOptions = OPTIONS) -> int:
        return chat.run(options, self.context(), self.load)

    def state(self, options: ChatOptions = OPTIONS) -> ChatState:
        context = self.context()
        progress = ProgressListener(context)
        return ChatState(self.load(options, context, progress), options, context, progress)


def prompt(**flags: object) -> ChatOptions:
    return replace(OPTIONS, prompt=replace(OPTIONS.prompt, **flags))  # type: ignore[arg-type]


def test_one_shot_puts_the_reply_on_stdout_and_the_rest_on_stderr(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert desk.chat(prompt(prompt="hello")) == 0
    assert desk.out.getvalue().endswith("\n")
    assert "tok/s" not in desk.out.getvalue()
    assert "decode 8 tok at" in desk.err.getvalue()
    assert desk.backend.closed


def test_same_seed_gives_the_same_reply(tmp_path: Path) -> None:
    desks = [Desk(tmp_path), Desk(tmp_path)]
    for desk in desks:
        desk.chat(prompt(prompt="hello"))
    assert desks[0].out.getvalue() == desks[1].out.getvalue()


def test_dash_reads_the_prompt_from_stdin_and_run_does_so_by_itself(tmp_path: Path) -> None:
    piped = Desk(tmp_path, typed="hello")
    piped.chat(prompt(prompt="-"))
    given = Desk(tmp_path)
    given.chat(prompt(prompt="hello"))
    assert piped.out.getvalue() == given.out.getvalue()
    assert piped.backend.tokens == given.backend.tokens


def test_file_comes_before_the_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("from file")
    desk = Desk(tmp_path)
    desk.chat(prompt(prompt="question", file=str(tmp_path / "a.txt"), raw=True))
    asked = bytes(t for t in desk.backend.tokens if t < 256)
    assert asked.startswith(b"from file\n\nquestion")


def test_prompt_file_that_is_not_utf8_names_the_offset(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xfe bad")
    with pytest.raises(ConfigError, match=r"a.txt: byte 5 is not UTF-8"):
        Desk(tmp_path).chat(prompt(file=str(tmp_path / "a.txt")))


def test_json_is_one_object_with_text_and_statistics(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.chat(replace(prompt(prompt="hello"), output=OutputFlags(json=True)))
    result = json.loads(desk.out.getvalue())
    assert result["model"] == "fake"
    assert result["stats"]["n_generated_tokens"] == 8
    assert result["finish_reason"] == "length"
    assert desk.err.getvalue() == ""


def test_system_prompt_is_said_first(tmp_path: Path) -> None:
    (tmp_path / "s.txt").write_text("be brief\n")
    desk = Desk(tmp_path)
    desk.chat(prompt(prompt="x", system_prompt_file=str(tmp_path / "s.txt")))
    asked = bytes(t for t in desk.backend.tokens if t < 256)
    assert asked.startswith(b"\nbe brief")


def test_bad_grammar_and_schema_are_refused_before_loading(tmp_path: Path) -> None:
    sampling = replace(OPTIONS.sampling, grammar="root ::= x", json_schema="{}")
    desk = Desk(tmp_path)
    with pytest.raises(ConfigError):
        desk.chat(replace(prompt(prompt="x"), sampling=sampling))
    assert not desk.backend.passes


def conversation(tmp_path: Path, *lines: str) -> tuple[Desk, int]:
    desk = Desk(tmp_path, typed="".join(f"{line}\n" for line in lines))
    return desk, desk.chat()


def test_every_line_of_a_pipe_gets_a_reply(tmp_path: Path) -> None:
    desk, code = conversation(tmp_path, "one", "", "two")
    assert code == 0
    assert desk.err.getvalue().count("decode 8 tok") == 2


@pytest.mark.parametrize("word", ["/exit", "/quit", "/bye"])
def test_leaving_words_leave(tmp_path: Path, word: str) -> None:
    desk, code = conversation(tmp_path, word, "never said")
    assert (code, desk.backend.passes) == (0, [])


def test_unknown_command_gets_a_suggestion_and_the_chat_goes_on(tmp_path: Path) -> None:
    desk, code = conversation(tmp_path, "/hlep", "/exti", "hello")
    assert "error: there is no /hlep\nhint: did you mean /help?" in desk.err.getvalue()
    assert (code, desk.err.getvalue().count("decode")) == (0, 1)


def test_set_changes_and_show_tells_where_from(tmp_path: Path) -> None:
    desk, _ = conversation(tmp_path, "/set temp 0.25", "/show temp", "/show top_k", "/show nothing")
    said = desk.err.getvalue()
    assert "temp = 0.25 (/set)" in said
    assert "top_k = 40 (default)" in said
    assert "error: nothing to show for 'nothing'" in said


@pytest.mark.parametrize("line", ["/set", "/set temp", "/set nonsense 1", "/set temp hot"])
def test_wrong_set_is_an_error_that_changes_nothing(tmp_path: Path, line: str) -> None:
    desk, _ = conversation(tmp_path, line, "/show temp")
    assert "error: " in desk.err.getvalue()
    assert "temp = 0.8 (default)" in desk.err.getvalue()


def test_clear_forgets_and_regen_without_an_answer_says_so(tmp_path: Path) -> None:
    desk, _ = conversation(tmp_path, "hello", "/clear", "/show history", "/regen")
    assert "user: hello" not in desk.err.getvalue()
    assert "error: there is no answer to make again" in desk.err.getvalue()


def test_regen_answers_the_same_question_differently(tmp_path: Path) -> None:
    desk, _ = conversation(tmp_path, "hello", "/regen", "/show history")
    first, second = desk.out.getvalue().rstrip("\n").split("\n")[:2]
    assert first != second
    assert desk.err.getvalue().count("user: hello") == 1


def test_conversation_saved_and_loaded_goes_on(tmp_path: Path) -> None:
    _, _ = conversation(tmp_path, "/system be kind", "hello", "/save talk")
    desk, _ = conversation(tmp_path, "/show sessions", "/load talk", "/system", "/show history")
    said = desk.err.getvalue()
    assert said.startswith("talk\n[loaded 3 messages]\nbe kind\nsystem: be kind\nuser: hello")


@pytest.mark.parametrize("line", ["/save", "/load", "/load nothing", "/save .hidden", "/read"])
def test_wrong_name_is_an_error_not_the_end(tmp_path: Path, line: str) -> None:
    desk, code = conversation(tmp_path, line, "/help")
    assert code == 0
    assert "error: " in desk.err.getvalue()
    assert "/regen" in desk.err.getvalue()


def test_save_into_an_impossible_place_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    desk, code = conversation(tmp_path, "hello", f"/save {tmp_path}/file/talk.session", "/stats")
    assert code == 0
    assert "error: " in desk.err.getvalue()
    assert "[1 replies" in desk.err.getvalue()


def test_read_puts_a_file_before_the_next_message(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("some notes")
    desk, _ = conversation(tmp_path, f"/read {tmp_path}/notes.txt", "sum up", "/show history")
    assert "user: some notes\n\nsum up" in desk.err.getvalue()


def test_question_that_does_not_fit_is_taken_back(tmp_path: Path) -> None:
    desk = Desk(tmp_path, typed="x" * 200 + "\nhi\n/show history\n", backend=FakeBackend(n_ctx=64))
    assert desk.chat() == 0
    assert "error: " in desk.err.getvalue()
    assert "user: hi" in desk.err.getvalue()
    assert "user: xxx" not in desk.err.getvalue()


def interrupting(desk: Desk, after: int) -> Callable[[str], None]:
    """Write to the desk's stdout; press Ctrl-C in the middle."""

    def show(text: str) -> None:
        desk.out.write(text)
        if len(desk.out.getvalue()) == after:
            signal.raise_signal(signal.SIGINT)

    return show


def test_first_ctrl_c_stops_the_reply_and_keeps_what_was_said(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    options = prompt(n_predict=1500)
    state = desk.state(options)
    state.say_to_model("hello")
    before = signal.getsignal(signal.SIGINT)
    spoken = chat.reply(state, interrupting(desk, 3))
    assert spoken.interrupted
    assert spoken.finish_reason == "cancelled"
    assert 3 <= len(spoken.text) < 1500
    assert state.messages[-1] == {"role": "assistant", "content": spoken.text}
    assert signal.getsignal(signal.SIGINT) is before
    state.say_to_model("again")
    assert not chat.reply(replace(state, options=OPTIONS), desk.out.write).interrupted


def test_second_ctrl_c_leaves(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    state = desk.state(prompt(n_predict=1500))
    state.say_to_model("hello")

    def show(text: str) -> None:
        del text
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        chat.reply(state, show)


def test_failing_stdout_stops_the_reply(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    state = desk.state(prompt(n_predict=1500))
    state.say_to_model("hello")

    def show(text: str) -> None:
        raise BrokenPipeError(text)

    with pytest.raises(BrokenPipeError):
        chat.reply(state, show)
    assert state.engine.complete("x", max_tokens=1).finish_reason == "length"


def test_terminal_gets_no_control_characters(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    desk = Desk(tmp_path, out=Terminal())
    write = chat.writer(desk.state())
    write("a\x1b]0;title\x07b\n\tc\x9bd\r")
    assert desk.out.getvalue() == "a]0;titleb\n\tcd"


STATS = GenerationStats(
    n_prompt_tokens=10, n_prefilled_tokens=10, prefill_s=0.5, n_generated_tokens=5, decode_s=2.0,
    ttft_s=0.5, bytes_read=8_000_000, stall_s=0.5, n_passes=4, n_drafted=0, n_accepted=0,
    n_rechecked=0, resident_weight_bytes=1_500_000_000, budget_bytes=2_000_000_000, streaming=True,
)  # fmt: skip


def test_statistics_of_a_streamed_reply_say_what_streaming_cost() -> None:
    assert statistics_line(STATS) == (
        "[prefill 10 tok at 20.0 tok/s · decode 5 tok at 2.0 tok/s · 2.0 MB/token · stall 25% · "
        "resident 1.50 GB of 2.00 GB]"
    )


def test_statistics_of_a_resident_reply_are_short() -> None:
    line = statistics_line(replace(STATS, streaming=False, n_drafted=4, n_accepted=3))
    assert line == (
        "[prefill 10 tok at 20.0 tok/s · decode 5 tok at 2.0 tok/s · 3 of 4 drafted accepted]"
    )


def test_run_without_prompt_reads_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []

    def answering(options: ChatOptions, context: Context) -> int:
        del context
        seen.append(options.prompt.prompt)
        return 0

    monkeypatch.setattr(chat, "run", answering)
    run.run(OPTIONS, Desk(tmp_path).context())
    run.run(prompt(prompt="given"), Desk(tmp_path).context())
    assert seen == ["-", "given"]


def test_errors_of_the_engine_leave_a_one_shot(tmp_path: Path) -> None:
    desk = Desk(tmp_path, backend=FakeBackend(n_ctx=16))
    with pytest.raises(EdgertError):
        desk.chat(prompt(prompt="x" * 100))
    assert desk.backend.closed


def test_a_reply_that_the_context_cuts_short_says_so(tmp_path: Path) -> None:
    desk = Desk(tmp_path, backend=FakeBackend(n_ctx=48))
    assert desk.chat(prompt(prompt="hi", n_predict=None)) == 0
    assert "[cut short: the context of 48 tokens is full" in desk.err.getvalue()
    whole = Desk(tmp_path)
    whole.chat(prompt(prompt="hi"))
    assert "cut short" not in whole.err.getvalue()


def test_default_undoes_a_setting(tmp_path: Path) -> None:
    desk, _ = conversation(
        tmp_path, "/set temp 0.25", "/set grammar root ::= x", "/set temp default",
        "/set\tgrammar default", "/show temp", "/show grammar",
    )  # fmt: skip
    assert "temp = 0.8 " in desk.err.getvalue()
    assert "nothing to show for 'grammar'" in desk.err.getvalue()


def test_settings_that_exclude_each_other_are_refused_when_set(tmp_path: Path) -> None:
    desk, _ = conversation(
        tmp_path, '/set grammar root ::= "a"', "/set json_schema {}", "/show json_schema"
    )
    assert "error: grammar and json_schema are both given" in desk.err.getvalue()
    assert "nothing to show for 'json_schema'" in desk.err.getvalue()


@pytest.mark.parametrize("command", ["/read", "/save", "/load"])
def test_path_of_nobody_is_an_error_not_the_end(tmp_path: Path, command: str) -> None:
    desk, code = conversation(tmp_path, f"{command} ~nobody-here/x", "hello")
    assert "there is no such user" in desk.err.getvalue()
    assert (code, desk.err.getvalue().count("decode")) == (0, 1)


def test_ctrl_c_during_a_command_stops_it_and_keeps_the_conversation(tmp_path: Path) -> None:
    class Interrupted(FakeBackend):
        def save_state_file(self, path: Path, tokens: object) -> None:
            raise KeyboardInterrupt(path, tokens)

    desk = Desk(tmp_path, "hello\n/save talk\n/show history\n", backend=Interrupted(n_ctx=2048))
    assert desk.chat() == 0
    assert "[stopped; Ctrl-C again leaves]" in desk.err.getvalue()
    assert "user: hello" in desk.err.getvalue()
    assert list((tmp_path / "sessions").iterdir()) == []


def test_an_answer_that_cannot_be_made_again_stays(tmp_path: Path) -> None:
    state = Desk(tmp_path).state()
    state.say_to_model("hello")
    state.heard(Spoken("hi", "stop", interrupted=False))
    assert state.regenerate()
    state.take_back()
    assert [message["content"] for message in state.messages] == ["hello", "hi"]


def test_sessions_and_models_cannot_control_the_terminal(tmp_path: Path) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    desk = Desk(tmp_path, err=Terminal())
    desk.context().say("a\x1b]0;title\x07b")
    assert desk.err.getvalue() == "a]0;titleb\n"


def test_saving_before_anything_was_said_is_an_error_that_says_so(tmp_path: Path) -> None:
    desk, code = conversation(tmp_path, "/save talk")
    assert code == 0
    assert desk.err.getvalue() == "error: nothing has been said yet that could be saved\n"
