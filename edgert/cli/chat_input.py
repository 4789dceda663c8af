"""Reading what a person types: multi-line rules, a terminal with history, or plain lines."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Protocol, TextIO

from edgert.cli.opening import decode_text

if TYPE_CHECKING:
    from prompt_toolkit.history import History
    from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

    from edgert.cli.command import Context

_QUOTES = '"""'
PROMPT = "> "
MORE = ". "


class Input(Protocol):
    """Where messages come from."""

    def read(self) -> str | None:
        """Return the next message, None at the end; raises KeyboardInterrupt on Ctrl-C."""
        ...


def is_complete(text: str) -> bool:
    """Say whether a message is whole: no open triple quote, no trailing backslash."""
    opened = text.lstrip()
    if opened.startswith(_QUOTES):
        return _QUOTES in opened[len(_QUOTES) :]
    return not text.endswith("\\")


def unwrap(text: str) -> str:
    """Return the message without the marks that joined its lines."""
    opened = text.lstrip()
    if opened.startswith(_QUOTES):
        inside, _, after = opened[len(_QUOTES) :].partition(_QUOTES)
        return inside.strip("\n") + after.rstrip()
    return text.replace("\\\n", "\n")


class LineInput:
    """Messages from a file or pipe, one a line unless marked to go on."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._n_read_bytes = 0

    def read(self) -> str | None:
        """Return the next message, None at the end of the stream."""
        lines: list[str] = []
        while line := self._next_line():
            lines.append(line.removesuffix("\n").removesuffix("\r"))
            if is_complete("\n".join(lines)):
                break
        return unwrap("\n".join(lines)) if lines else None

    def _next_line(self) -> str:
        if self._stream is not sys.stdin:
            return self._stream.readline()
        content = sys.stdin.buffer.readline()
        line = decode_text(content, f"stdin, from byte {self._n_read_bytes}")
        self._n_read_bytes += len(content)
        return line


class TerminalInput:
    """Messages typed into a terminal, with history and editing; the prompt goes to stderr."""

    def __init__(self, context: Context, words: tuple[str, ...]) -> None:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.completion import WordCompleter
        from prompt_toolkit.output import ColorDepth, create_output

        self._session: PromptSession[str] = PromptSession(
            message=PROMPT,
            multiline=True,
            prompt_continuation=MORE,
            history=_history(context),
            key_bindings=_bindings(),
            completer=WordCompleter(list(words), sentence=True),
            complete_while_typing=False,
            color_depth=None if context.color() else ColorDepth.DEPTH_1_BIT,
            output=create_output(stdout=context.stderr),
        )

    def read(self) -> str | None:
        """Return the next message, None on Ctrl-D."""
        try:
            return unwrap(self._session.prompt())
        except EOFError:
            return None


def choose_input(context: Context, words: tuple[str, ...]) -> Input:
    """Return a terminal input if a person is there to type, else a line input."""
    if context.stdin.isatty() and context.stderr.isatty():
        return TerminalInput(context, words)
    return LineInput(context.stdin)


def _bindings() -> KeyBindings:
    from prompt_toolkit.key_binding import KeyBindings

    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if is_complete(buffer.text):
            buffer.validate_and_handle()
        else:
            buffer.insert_text("\n")

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-g")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.open_in_editor()

    return bindings


def _history(context: Context) -> History:
    from prompt_toolkit.history import FileHistory, InMemoryHistory

    if context.env.get("EDGERT_NOHISTORY"):
        return InMemoryHistory()
    path = context.directories.history_file
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        context.say(f"note: no history, {path}: {error.strerror}")
        return InMemoryHistory()

    class ForgivingHistory(FileHistory):
        """History that a full disk does not end the conversation over."""

        def store_string(self, string: str) -> None:
            with contextlib.suppress(OSError):
                super().store_string(string)

    return ForgivingHistory(str(path))
