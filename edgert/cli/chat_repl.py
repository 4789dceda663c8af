"""The conversation loop: read, obey or ask, until the person leaves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import edgert
from edgert.cli import chat
from edgert.cli.chat_commands import COMMANDS, Next, obey
from edgert.cli.chat_input import Input, choose_input
from edgert.cli.reply import Spoken
from edgert.errors import Cancelled, CapacityError, EdgertError, LinkError

if TYPE_CHECKING:
    from edgert.cli.chat_state import ChatState


class Repl:
    """A conversation with a person or a script.

    Args:
        state: The conversation.
        source: Where messages come from; None chooses by whether stdin is a terminal.
    """

    def __init__(self, state: ChatState, source: Input | None = None) -> None:
        self._state = state
        self._source = source or choose_input(state.context, tuple(COMMANDS))
        self._write = chat.writer(state)
        self._interrupted = False

    def run(self) -> int:
        """Converse and return the exit code."""
        context = self._state.context
        if context.stdin.isatty():
            engine = self._state.engine
            context.say(
                f"edgert {edgert.__version__} · {engine.model_name} · context {engine.n_ctx:,}"
            )
            context.say("/help lists the commands, Ctrl-C stops a reply, Ctrl-D leaves")
        while True:
            try:
                text = self._source.read()
            except KeyboardInterrupt:
                if self._interrupted:
                    return Cancelled.exit_code
                self._interrupted = True
                context.say("Ctrl-C again leaves, and so do Ctrl-D and /exit")
                continue
            if text is None:
                return 0
            if text.strip() and not self._handle(text):
                return 0

    def _handle(self, text: str) -> bool:
        """Obey a command or get an answer; False when the person wants to leave."""
        self._interrupted = False
        try:
            match self._obey(text) if text.startswith("/") else "ask":
                case "leave":
                    return False
                case "again":
                    self._answer()
                case "ask":
                    self._state.say_to_model(text)
                    self._answer()
                case "done":
                    pass
        except EdgertError as error:
            self._state.context.say(f"error: {error.message}")
            if error.hint:
                self._state.context.say(f"hint: {error.hint}")
            if isinstance(error, CapacityError) and self._state.messages:
                self._state.context.say("hint: /clear forgets the conversation so far")
        return True

    def _obey(self, text: str) -> Next:
        try:
            return obey(self._state, text)
        except KeyboardInterrupt:
            self._interrupted = True
            self._state.progress.clear()
            self._state.context.say("[stopped; Ctrl-C again leaves]")
            return "done"

    def _answer(self) -> None:
        try:
            spoken = chat.reply(self._state, self._write)
        except EdgertError as error:
            said = error.said if isinstance(error, LinkError) else None
            if said:  # the person may ask to go on from there
                self._state.heard(Spoken(said, "link", interrupted=False))
            else:
                self._state.take_back()
            raise
        self._interrupted = spoken.interrupted
