"""Multi-line input: quotes, backslashes, pipes."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from edgert.cli import chat_input
from edgert.cli.chat_input import LineInput, is_complete, unwrap
from edgert.cli.command import Context
from edgert.cli.opening import decode_text
from edgert.config import directories
from edgert.errors import ConfigError


def read_all(text: str) -> list[str]:
    source = LineInput(io.StringIO(text))
    found = []
    while (message := source.read()) is not None:
        found.append(message)
    return found


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ("hello", True),
        ("", True),
        ("one \\", False),
        ('"""one', False),
        ('"""one\ntwo"""', True),
        ('  """', False),
        ('say """x', True),
    ],
)
def test_message_is_whole_without_open_quotes_or_backslash(text: str, whole: bool) -> None:
    assert is_complete(text) is whole


def test_marks_are_taken_off() -> None:
    assert unwrap("one\\\ntwo") == "one\ntwo"
    assert unwrap('"""\none\n  two\n"""') == "one\n  two"
    assert unwrap('"""one""" and more') == "one and more"
    assert unwrap("C:\\x") == "C:\\x"


def test_lines_of_a_pipe_are_messages() -> None:
    assert read_all('a\nb\\\nc\r\n"""d\n\ne"""\n\nlast') == ["a", "b\nc", "d\n\ne", "", "last"]


def test_open_quote_at_the_end_is_still_a_message() -> None:
    assert read_all('"""never closed\nmore') == ["never closed\nmore"]


def test_undecodable_bytes_name_place_and_offset() -> None:
    with pytest.raises(ConfigError, match=r"prompt.txt: byte 2 is not UTF-8 text \(0xff\)"):
        decode_text(b"ab\xffc", "prompt.txt")


def test_ctrl_g_opens_the_editor() -> None:
    from prompt_toolkit.keys import Keys

    keys = [binding.keys for binding in chat_input._bindings().bindings]
    assert (Keys.ControlG,) in keys


def test_history_that_cannot_be_written_does_not_end_the_conversation(tmp_path: Path) -> None:
    env = {"EDGERT_HOME": str(tmp_path / "home")}
    streams = (io.StringIO(), io.StringIO(), io.StringIO())
    history = chat_input._history(Context(*streams, env, directories(env), {}))
    history.store_string("kept")
    assert "kept" in (tmp_path / "home" / "history").read_text()
    (tmp_path / "home" / "history").unlink()
    (tmp_path / "home" / "history").mkdir()
    history.store_string("lost")
