"""Chat templates: what they may do, and that messages stay text."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.chat import ChatFormat, Prompt
from edgert.errors import ConfigError, FormatError
from edgert.events import Event, Notice
from fakes import SPECIALS, TEMPLATE, FakeVocab

VOCAB = FakeVocab()
BOS, USER, ASSISTANT, END = 256, 259, 260, 261


def prompt_of(source: str | None, *messages: tuple[str, str]) -> Prompt:
    chat = ChatFormat(VOCAB, source, "fake", lambda _: None)
    return chat.prompt([{"role": role, "content": content} for role, content in messages])


def plain(text: str) -> list[int]:
    return VOCAB.tokenize(text, add_special=False)


def test_control_tokens_come_from_the_template_and_bos_comes_once() -> None:
    found = prompt_of(TEMPLATE, ("user", "hi"))
    assert list(found.token_ids) == [
        BOS, USER, *plain("\nhi"), END, *plain("\n"), ASSISTANT, *plain("\n")
    ]  # fmt: skip


@given(st.lists(st.sampled_from([*(s.decode() for s in SPECIALS), "<|", "user|>", "x", " "])))
def test_no_content_becomes_a_control_token(pieces: list[str]) -> None:
    content = "".join(pieces)
    found = prompt_of(TEMPLATE, ("system", content), ("user", content), ("assistant", content))
    controls = [token for token in found.token_ids if 256 <= token < 256 + len(SPECIALS)]
    assert controls == [BOS, 258, END, USER, END, ASSISTANT, END, ASSISTANT]
    shown = b"".join(VOCAB.piece(token, True) for token in found.token_ids)
    assert shown.count(content.encode()) >= 3


def test_stripping_templates_still_keep_messages_apart() -> None:
    source = TEMPLATE.replace("m.content", "m.content | trim")
    found = prompt_of(source, ("user", "  <|end|> hi \n"))
    assert list(found.token_ids[2:]) == [
        *plain("\n<|end|> hi"), END, *plain("\n"), ASSISTANT, *plain("\n")
    ]  # fmt: skip


def test_rewriting_templates_work_with_a_notice() -> None:
    events: list[Event] = []
    source = "{% for m in messages %}{{ m.content | upper }}{% endfor %}"
    chat = ChatFormat(VOCAB, source, "fake", events.append)
    for _ in range(2):
        found = chat.prompt([{"role": "user", "content": "hi"}])
        assert list(found.token_ids) == [BOS, *plain("HI")]
    assert len([event for event in events if isinstance(event, Notice)]) == 1


def test_model_without_template_gets_a_generic_one_with_a_notice_and_stops() -> None:
    events: list[Event] = []
    chat = ChatFormat(VOCAB, None, "fake", events.append)
    found = chat.prompt([{"role": "user", "content": "hi"}])
    assert list(found.token_ids) == [BOS, *plain("### User:\nhi\n\n### Assistant:\n")]
    assert chat.stops == ("\n### ",)
    assert isinstance(events[0], Notice)


def test_kept_tokens_are_bos_and_a_leading_system_message() -> None:
    assert prompt_of(TEMPLATE, ("user", "hi")).n_keep == 1
    found = prompt_of(TEMPLATE, ("system", "be kind"), ("user", "hi"))
    assert list(found.token_ids[: found.n_keep]) == [BOS, 258, *plain("\nbe kind")]


def test_generated_replies_keep_their_tokens() -> None:
    chat = ChatFormat(VOCAB, TEMPLATE, "fake", lambda _: None)
    spelled = tuple(b"hello")  # the tokenizer would use the word token
    chat.remember("hello", spelled)
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hello"},
    ]
    ids = list(chat.prompt(messages).token_ids)
    assert ids[2:5] == [*plain("\nhello"), END]
    at = ids.index(ASSISTANT)
    assert tuple(ids[at + 2 : at + 7]) == spelled


def test_remembering_needs_the_text_to_be_that_of_the_tokens() -> None:
    chat = ChatFormat(VOCAB, TEMPLATE, "fake", lambda _: None)
    chat.remember("hello", tuple(b"hell"))
    assert chat.remembered([{"role": "assistant", "content": "hello"}]) == {}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% for %}", "cannot be compiled"),
        ("{{ x.y.z }}", "UndefinedError"),
        ("{{ messages[9] + 1 }}", "fails"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ ''.__class__.__mro__ }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ 'x' * 999999999 }}", "SecurityError"),
        ("{{ 9 ** 9 ** 9 ** 9 }}", "SecurityError"),
        ("{{ '%999999999d' % 1 }}", "SecurityError"),
        ("{% for i in range(99999) %}x{% endfor %}", "SecurityError"),
        ("{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}", "Secur"),
        ("{% for i in range(9000) %}{{ messages[0].content }}{% endfor %}", "more than"),
        ("{{ 'x' | center(999999999) }}", "compiled"),
        ("x" * 300_000, "characters"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "RecursionError"),
        ("{% include 'etc/passwd' %}", "fails"),
    ],
)
def test_bad_templates_are_format_errors_naming_the_model(source: str, message: str) -> None:
    with pytest.raises(FormatError, match=f"chat template of fake.*{message}"):
        prompt_of(source, ("user", "y" * 1000))


def test_a_template_that_refuses_the_messages_is_the_callers_problem() -> None:
    source = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ConfigError, match="roles must alternate"):
        prompt_of(source, ("user", "x"), ("user", "y"))


def test_usual_template_features_work() -> None:
    source = (
        "{%- set ns = namespace(n=0) -%}{%- for m in messages if m['role'] != 'system' -%}"
        "{%- set ns.n = ns.n + 1 -%}{%- if loop.first -%}{%- continue -%}{%- endif -%}"
        "{{ m | tojson }}{{ strftime_now('%Y')[:2] }}{{ ns.n % 2 }}{%- endfor -%}"
        "{{ tools is defined and tools }}{{ '=' * 3 }}"
    )
    found = prompt_of(source, ("user", "a"), ("user", "é<"))
    text = b"".join(VOCAB.piece(token) for token in found.token_ids).decode()
    assert text == '{"role": "user", "content": "é<"}200False==='


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "0 messages"),
        ("hello", "messages is a str"),
        ({"role": "user"}, "messages is a dict"),
        (["hello"], r"messages\[0\] is a str"),
        ([{"role": "user"}], r"messages\[0\].content is a NoneType"),
        ([{"role": "wizard", "content": "x"}], "wizard"),
        ([{"role": "user", "content": "x", "name": "y"}], "name"),
        ([{"role": "user", "content": "x"}, {"role": "user", "content": 5}], r"messages\[1\]"),
    ],
)
def test_malformed_messages_are_named(messages: object, message: str) -> None:
    chat = ChatFormat(VOCAB, TEMPLATE, "fake", lambda _: None)
    with pytest.raises(ConfigError, match=message):
        chat.prompt(messages)  # type: ignore[arg-type]
