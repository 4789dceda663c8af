"""Settings from four places: flag over environment over configuration file over default.

Remembers where every value came from. Which settings exist is declared by whoever reads them.
"""

from __future__ import annotations

import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from edgert.errors import ConfigError

Origin = Literal["flag", "environment", "file", "default"]
Value = str | int | float | bool | tuple[str, ...] | None
T = TypeVar("T")

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})


@dataclass(frozen=True, slots=True)
class Flag:
    """How a setting is written on the command line; no spellings make it positional."""

    spellings: tuple[str, ...]
    help: str
    metavar: str
    choices: tuple[str, ...] = ()
    minimum: float | None = None
    maximum: float | None = None


@dataclass(frozen=True, slots=True)
class Setting:
    """One value a command reads: its name, kind, default and spelling."""

    name: str
    kind: type
    default: Value
    flag: Flag

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return f"EDGERT_{self.name.upper()}"


@dataclass(frozen=True, slots=True)
class Resolved:
    """Values by setting name, and where each came from."""

    values: Mapping[str, Value]
    origins: Mapping[str, Origin]

    def build(self, group: type[T]) -> T:
        """Fill a dataclass of settings, or of groups of them."""
        hints = get_type_hints(group)
        arguments: dict[str, object] = {}
        for name in (field.name for field in fields(group)):  # type: ignore[arg-type]
            nested = hints[name]
            is_group = isinstance(nested, type) and is_dataclass(nested)
            arguments[name] = self.build(nested) if is_group else self.values[name]
        return group(**arguments)


@dataclass(frozen=True, slots=True)
class Directories:
    """Where edgert keeps its files."""

    config_file: Path
    cache: Path
    data: Path

    @property
    def sessions(self) -> Path:
        """Saved conversations."""
        return self.data / "sessions"

    @property
    def history_file(self) -> Path:
        """Lines typed into the chat."""
        return self.data / "history"


def directories(env: Mapping[str, str]) -> Directories:
    """Choose the folders: EDGERT_HOME for all of them, else the XDG base directories."""
    if env.get("EDGERT_HOME"):
        home = Path(env["EDGERT_HOME"])
        return Directories(home / "config.toml", home / "cache", home)
    user = Path(env.get("HOME") or "~").expanduser()

    def base(variable: str, default: str) -> Path:
        value = env.get(variable, "")
        return Path(value) if value.startswith("/") else user / default

    return Directories(
        base("XDG_CONFIG_HOME", ".config") / "edgert" / "config.toml",
        base("XDG_CACHE_HOME", ".cache") / "edgert",
        base("XDG_DATA_HOME", ".local/share") / "edgert",
    )


def settings_of(group: type) -> list[Setting]:
    """List the settings of a dataclass: fields `Annotated[kind, Flag]`, or groups of them."""
    hints = get_type_hints(group, include_extras=True)
    found: list[Setting] = []
    for field in fields(group):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            kind, flag = get_args(hint)
            default = None if field.default is MISSING else field.default
            found.append(Setting(field.name, _bare(kind), default, flag))
        else:
            found += settings_of(hint)
    return found


def resolve(
    settings: Sequence[Setting],
    flags: Mapping[str, object],
    env: Mapping[str, str],
    file: Mapping[str, object],
) -> Resolved:
    """Take each setting from the first place that has it.

    Args:
        settings: What the command reads.
        flags: Values given on the command line; None means not given.
        env: Environment variables.
        file: Values of the configuration file, see `read_file`.

    Raises:
        ConfigError: a value is of the wrong kind or out of range; names its place.
    """
    values: dict[str, Value] = {}
    origins: dict[str, Origin] = {}
    for setting in settings:
        name = setting.name
        spelled = setting.flag.spellings[-1] if setting.flag.spellings else setting.flag.metavar
        origin: Origin
        if flags.get(name) is not None:
            origin, place, raw = "flag", spelled, flags[name]
        elif setting.flag.spellings and env.get(setting.variable):
            origin, place, raw = (
                "environment",
                f"variable {setting.variable}",
                env[setting.variable],
            )
        elif name in file:
            origin, place, raw = "file", f"{name} in the configuration file", file[name]
        else:
            values[name], origins[name] = setting.default, "default"
            continue
        values[name], origins[name] = _parse(setting, raw, place), origin
    return Resolved(values, origins)


def read_file(
    path: Path, command: str, known: Sequence[str], commands: Sequence[str]
) -> dict[str, object]:
    """Read the settings a configuration file holds for one command.

    Top-level keys apply to every command, keys of a table named like a command to that one.

    Args:
        path: A TOML file; a missing one is empty.
        command: The command that runs.
        known: Names of all settings of all commands.
        commands: Names of all commands.

    Raises:
        ConfigError: not readable, not TOML, or an unknown key.
    """
    import tomllib

    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the configuration: {error}") from error
    merged: dict[str, object] = {}
    chosen: dict[str, object] = {}
    for key, value in content.items():
        if isinstance(value, dict) and key in commands:
            normal = {_normal(path, name, known): item for name, item in value.items()}
            chosen |= normal if key == command else {}
        else:
            merged[_normal(path, key, known)] = value
    return merged | chosen


def check_text(text: str, place: str) -> str:
    """Return `text` if it is valid Unicode; arguments carry undecodable bytes as surrogates.

    Raises:
        ConfigError: names the byte offset of the first bad byte.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        offset = len(text[: error.start].encode("utf-8", "surrogateescape"))
        raise ConfigError(
            f"{place}: byte {offset} is not UTF-8 text", hint="write it in UTF-8 and try again"
        ) from error
    return text


def _normal(path: Path, key: str, known: Sequence[str]) -> str:
    name = key.replace("-", "_")
    if name in known:
        return name
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]}?" if close else "see `edgert chat --help` for the names"
    raise ConfigError(f"{path}: unknown key {key!r}", hint=hint)


def _bare(kind: object) -> type:
    """Return int for `int | None`, tuple for `tuple[str, ...]`."""
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
    bare = get_origin(kind) or kind
    if not isinstance(bare, type):
        raise TypeError(f"{kind!r} cannot be a setting")
    return bare


def _parse(setting: Setting, raw: object, place: str) -> Value:
    if setting.kind is bool:
        return _parse_bool(raw, place)
    if setting.kind is tuple:
        items = raw if isinstance(raw, list | tuple) else [raw]
        return tuple(check_text(str(item), place) for item in items)
    text = check_text(str(raw), place)
    if setting.kind is str:
        if setting.flag.choices and text not in setting.flag.choices:
            raise ConfigError(f"{place}: {text!r} is not one of {', '.join(setting.flag.choices)}")
        return text
    return _parse_number(setting, text, place)


def _parse_bool(raw: object, place: str) -> bool:
    text = str(raw).lower()
    if text not in _TRUE | _FALSE:
        raise ConfigError(f"{place}: {raw!r} is not true or false")
    return text in _TRUE


def _parse_number(setting: Setting, text: str, place: str) -> int | float:
    wanted = "a whole number" if setting.kind is int else "a number"
    try:
        value: int | float = int(text) if setting.kind is int else float(text)
    except ValueError:
        raise ConfigError(f"{place}: {text!r} is not {wanted}") from None
    low, high = setting.flag.minimum, setting.flag.maximum
    below = low is not None and not value >= low
    above = high is not None and not value <= high
    if below or above or value != value:
        bounds = f"{low:g} or more" if high is None and low is not None else f"{low} to {high}"
        raise ConfigError(f"{place}: {text} is out of range, wanted {bounds}")
    return value
