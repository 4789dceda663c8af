"""Turns declared settings into typer commands, and a parsed command line into an invocation."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, TextIO

import typer

from edgert.cli.terminal import printable
from edgert.config import Directories, Origin, Setting, directories, read_file, resolve, settings_of
from edgert.errors import ConfigError

_LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand: its options, and the module whose `run` does it, imported only then."""

    name: str
    help: str
    module: str
    options: type


@dataclass(frozen=True, slots=True)
class Context:
    """What a command may touch besides its options."""

    stdin: TextIO
    stdout: TextIO
    stderr: TextIO
    env: Mapping[str, str]
    directories: Directories
    origins: Mapping[str, Origin]

    def say(self, text: str) -> None:
        """Write a line for the person to stderr."""
        print(printable(text, self.stderr), file=self.stderr, flush=True)

    def color(self) -> bool:
        """Whether stderr is a terminal that may be coloured."""
        plain = bool(self.env.get("NO_COLOR")) or self.env.get("TERM") == "dumb"
        return self.stderr.isatty() and not plain


def attach(app: typer.Typer, command: Command, commands: Sequence[Command]) -> None:
    """Add `command` to `app` with one parameter for each of its settings."""
    settings = settings_of(command.options)

    def call(**flags: object) -> int:
        return _run(command, commands, settings, flags)

    parameters = [
        Parameter(s.name, Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(s))
        for s in settings
    ]
    # typer reads a signature; this one is written from the declarations.
    call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    app.command(command.name, help=command.help, short_help=command.help)(call)


def _annotation(setting: Setting) -> object:
    flag = setting.flag
    if not flag.spellings:
        return Annotated[
            str | None, typer.Argument(help=flag.help, metavar=flag.metavar, show_default=False)
        ]
    default = "" if setting.default in (None, (), False) else f" [default: {setting.default}]"
    text = f"{flag.help}{default} [{setting.variable}]"
    if setting.kind is bool:
        return Annotated[bool | None, typer.Option(*flag.spellings, help=text, show_default=False)]
    kind = list[str] if setting.kind is tuple else str
    option = typer.Option(*flag.spellings, help=text, metavar=flag.metavar, show_default=False)
    return Annotated[kind | None, option]


def _run(
    command: Command,
    commands: Sequence[Command],
    settings: Sequence[Setting],
    flags: Mapping[str, object],
) -> int:
    env = os.environ
    places = directories(env)
    known = sorted({s.name for other in commands for s in settings_of(other.options)})
    file = read_file(places.config_file, command.name, known, [other.name for other in commands])
    given = {name: value for name, value in flags.items() if value not in (None, [], ())}
    resolved = resolve(settings, given, env, file)
    context = Context(sys.stdin, sys.stdout, sys.stderr, env, places, resolved.origins)
    level = "debug" if resolved.values.get("verbose") is True else env.get("EDGERT_LOG", "")
    _set_up_logging(level, resolved.values.get("log_file"))
    module = import_module(command.module)
    code = module.run(resolved.build(command.options), context)
    return int(code or 0)


def _set_up_logging(wanted: str, log_file: object) -> None:
    if not wanted and not log_file:
        return
    import logging

    level = (wanted or "info").upper()
    if level not in _LOG_LEVELS:
        raise ConfigError(f"variable EDGERT_LOG: {wanted!r} is not one of {', '.join(_LOG_LEVELS)}")
    pattern = "%(asctime)s %(levelname)s %(name)s: %(message)s"
    if not log_file:
        logging.basicConfig(level=level, format=pattern, stream=sys.stderr)
        return
    try:
        handler = logging.FileHandler(Path(str(log_file)), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"--log-file {log_file}: {error.strerror}") from error
    logging.basicConfig(level=level, format=pattern, handlers=[handler])
