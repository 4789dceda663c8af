"""The slash commands of a chat."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgert.cli.chat_state import sampling_params
from edgert.cli.opening import read_text, user_path
from edgert.cli.options import PromptFlags, SamplingFlags
from edgert.cli.reply import statistics_line
from edgert.config import resolve, settings_of
from edgert.errors import ConfigError

if TYPE_CHECKING:
    from edgert.cli.chat_state import ChatState

Next = Literal["done", "leave", "again"]
Handler = Callable[["ChatState", str], Next]

_SETTABLE_PROMPT = ("n_predict", "raw")
_SESSION_SUFFIX = ".session"

HELP = '''\
/help, /?          this list
/clear             forget the conversation
/regen             answer the last message again
/system [TEXT]     set the system prompt and start over; show it without TEXT
/set KEY VALUE     change a setting, such as temp 0.2 or n_predict 100; VALUE default resets it
/show [KEY]        settings and where they come from; or model, history, sessions
/save NAME         save the conversation with its KV cache
/load NAME         resume it without reading it again
/read FILE         put a text file before the next message
/stats             what the replies cost
/exit, /quit, /bye leave; so does Ctrl-D
Several lines: """ before and after, a \\ at the end of a line, or Esc Enter.
Ctrl-G writes the message in $EDITOR.'''


def obey(state: ChatState, text: str) -> Next:
    """Do what a line that starts with / says.

    Raises:
        ConfigError: no such command, or its argument is wrong.
    """
    name, *rest = text.split(maxsplit=1)
    handler = COMMANDS.get(name)
    if handler is None:
        close = get_close_matches(name, [known for known in COMMANDS if known != "/?"], n=1)
        raise ConfigError(
            f"there is no {name}", hint=f"did you mean {close[0]}?" if close else "/help lists them"
        )
    return handler(state, rest[0].strip() if rest else "")


def _help(state: ChatState, argument: str) -> Next:
    del argument
    state.context.say(HELP)
    return "done"


def _leave(state: ChatState, argument: str) -> Next:
    del state, argument
    return "leave"


def _clear(state: ChatState, argument: str) -> Next:
    del argument
    state.messages.clear()
    state.pending = ""
    state.context.say("[forgotten]")
    return "done"


def _regen(state: ChatState, argument: str) -> Next:
    del argument
    if not state.regenerate():
        raise ConfigError("there is no answer to make again")
    return "again"


def _system(state: ChatState, argument: str) -> Next:
    if argument:
        state.system = argument
        state.messages.clear()
        state.context.say("[system prompt set, conversation forgotten]")
    else:
        state.context.say(state.system or "[no system prompt]")
    return "done"


def _set(state: ChatState, argument: str) -> Next:
    key, value = (*argument.split(maxsplit=1), "", "")[:2]
    name = key.replace("-", "_")
    sampling = {s.name: s for s in settings_of(SamplingFlags)}
    prompt = {s.name: s for s in settings_of(PromptFlags) if s.name in _SETTABLE_PROMPT}
    settings = sampling | prompt
    if name not in settings or not value:
        raise ConfigError(
            "wanted /set KEY VALUE" if name in settings or not key else f"no setting {key!r}",
            hint=f"settings are {', '.join(settings)}",
        )
    given = {} if value == "default" else {name: value}
    values = resolve([settings[name]], given, {}, {}).values
    options = state.options
    if name in sampling:
        options = replace(options, sampling=replace(options.sampling, **values))  # type: ignore[arg-type]
    else:
        options = replace(options, prompt=replace(options.prompt, **values))  # type: ignore[arg-type]
    sampling_params(options.sampling)
    state.options = options
    state.set_here.add(name)
    state.context.say(f"[{name} = {values[name]}]")
    return "done"


def _show(state: ChatState, argument: str) -> Next:
    match argument:
        case "":
            for line in [*_settings(state), *_applied(state)]:
                state.context.say(line)
        case "model":
            state.context.say(f"model = {state.engine.model_name}")
            for line in _applied(state):
                state.context.say(line)
        case "history":
            for message in state.conversation():
                state.context.say(f"{message['role']}: {message['content']}")
        case "sessions":
            names = sorted(p.stem for p in state.context.directories.sessions.glob("*.session"))
            state.context.say(", ".join(names) or "[none saved]")
        case key:
            _show_one(state, key.replace("-", "_"))
    return "done"


def _show_one(state: ChatState, name: str) -> None:
    lines = [
        line
        for line in [*_settings(state), *_applied(state)]
        if line.split(" = ")[0].replace(" ", "_") == name
    ]
    if not lines:
        raise ConfigError(f"nothing to show for {name!r}", hint="/show lists everything")
    for line in lines:
        state.context.say(line)


def _settings(state: ChatState) -> list[str]:
    lines = []
    for group in (state.options.model, state.options.prompt, state.options.sampling):
        for name in (field.name for field in fields(group)):
            value = getattr(group, name)
            if value in (None, ()):
                continue
            origin = (
                "/set" if name in state.set_here else state.context.origins.get(name, "default")
            )
            lines.append(f"{name} = {value} ({origin})")
    return lines


def _applied(state: ChatState) -> list[str]:
    return [f"{name} = {value} (applied)" for name, value in state.engine.applied().items()]


def _save(state: ChatState, argument: str) -> Next:
    path = _session_path(state, argument)
    if not state.conversation():
        raise ConfigError("nothing has been said yet that could be saved")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path.parent}: cannot make the folder: {error.strerror}",
            hint="name a file in a folder you may write to, such as /save ./talk.session",
        ) from error
    state.engine.save_session(path, state.conversation())
    state.context.say(f"[saved {path}]")
    return "done"


def _load(state: ChatState, argument: str) -> Next:
    path = _session_path(state, argument)
    if not path.is_file():
        known = sorted(p.stem for p in path.parent.glob(f"*{_SESSION_SUFFIX}"))
        raise ConfigError(
            f"no saved conversation {path}", hint=f"saved ones: {', '.join(known) or 'none'}"
        )
    messages = state.engine.load_session(path)
    is_system = bool(messages) and messages[0]["role"] == "system"
    state.system = messages[0]["content"] if is_system else None
    state.messages[:] = messages[1:] if is_system else messages
    state.context.say(f"[loaded {len(messages)} messages]")
    return "done"


def _session_path(state: ChatState, name: str) -> Path:
    if not name:
        raise ConfigError("wanted a name", hint="/save talk, then /load talk")
    path = user_path(name)
    if os.sep in name:
        return path
    if name.startswith("."):
        raise ConfigError(f"{name!r} is not a name for a conversation", hint="/save talk")
    return state.context.directories.sessions / (
        name.removesuffix(_SESSION_SUFFIX) + _SESSION_SUFFIX
    )


def _read(state: ChatState, argument: str) -> Next:
    if not argument:
        raise ConfigError("wanted a file", hint="/read notes.txt")
    text = read_text(argument)
    state.pending = f"{state.pending}\n\n{text}" if state.pending else text
    state.context.say(f"[{len(text):,} characters go before the next message]")
    return "done"


def _stats(state: ChatState, argument: str) -> Next:
    del argument
    stats = state.engine.stats()
    if stats.last is None:
        state.context.say("[nothing said yet]")
        return "done"
    state.context.say(statistics_line(stats.last))
    state.context.say(
        f"[{stats.n_generations} replies · {stats.n_generated_tokens:,} tokens · "
        f"{stats.bytes_read / 1e9:.1f} GB read]"
    )
    return "done"


COMMANDS: dict[str, Handler] = {
    "/help": _help, "/?": _help, "/clear": _clear, "/regen": _regen, "/system": _system,
    "/set": _set, "/show": _show, "/save": _save, "/load": _load, "/read": _read,
    "/stats": _stats, "/exit": _leave, "/quit": _leave, "/bye": _leave,
}  # fmt: skip
