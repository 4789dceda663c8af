"""Settings: precedence, origins, kinds and what is refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.cli.options import ChatOptions
from edgert.config import Flag, check_text, directories, read_file, resolve, settings_of
from edgert.errors import ConfigError

_COUNT = Flag(("-n", "--count"), "", "N", minimum=1, maximum=10)


@dataclass(frozen=True, slots=True)
class Inner:
    count: Annotated[int, _COUNT] = 3
    loud: Annotated[bool, Flag(("--loud",), "", "")] = False


@dataclass(frozen=True, slots=True)
class Outer:
    inner: Inner
    name: Annotated[str | None, Flag(("--name",), "", "TEXT", choices=("a", "b"))] = None
    stops: Annotated[tuple[str, ...], Flag(("-r",), "", "TEXT")] = ()
    part: Annotated[float, Flag(("--part",), "", "X", minimum=0, maximum=1)] = 0.5


SETTINGS = settings_of(Outer)


def one(name: str, value: object) -> object:
    return resolve(SETTINGS, {name: value}, {}, {}).values[name]


def test_settings_of_nested_groups_are_found() -> None:
    assert [s.name for s in SETTINGS] == ["count", "loud", "name", "stops", "part"]
    assert [s.kind for s in SETTINGS] == [int, bool, str, tuple, float]


def test_flag_beats_environment_beats_file_beats_default() -> None:
    places: list[tuple[dict[str, object], dict[str, str], dict[str, object]]] = [
        ({"count": "1"}, {"EDGERT_COUNT": "2"}, {"count": 4}),
        ({}, {"EDGERT_COUNT": "2"}, {"count": 4}),
        ({}, {}, {"count": 4}),
        ({}, {}, {}),
    ]
    found = [resolve(SETTINGS, *place) for place in places]
    assert [r.values["count"] for r in found] == [1, 2, 4, 3]
    assert [r.origins["count"] for r in found] == ["flag", "environment", "file", "default"]


def test_groups_are_filled_with_the_resolved_values() -> None:
    resolved = resolve(SETTINGS, {"count": "7", "stops": ["x", "y"]}, {"EDGERT_LOUD": "yes"}, {})
    assert resolved.build(Outer) == Outer(Inner(7, loud=True), stops=("x", "y"))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", "x", "--count: 'x' is not a whole number"),
        ("count", "1.5", "--count: '1.5' is not a whole number"),
        ("count", "11", "--count: 11 is out of range, wanted 1 to 10"),
        ("part", "nan", "--part: nan is out of range, wanted 0 to 1"),
        ("name", "c", "--name: 'c' is not one of a, b"),
        ("loud", "maybe", "--loud: 'maybe' is not true or false"),
    ],
)
def test_wrong_value_names_its_place(name: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        one(name, value)
    assert error.value.message == message


def test_wrong_value_in_the_environment_names_the_variable() -> None:
    with pytest.raises(ConfigError, match="variable EDGERT_COUNT"):
        resolve(SETTINGS, {}, {"EDGERT_COUNT": "many"}, {})


def test_empty_variable_counts_as_not_set() -> None:
    assert resolve(SETTINGS, {}, {"EDGERT_COUNT": ""}, {}).origins["count"] == "default"


@given(st.text(max_size=8))
def test_any_text_is_a_number_or_a_config_error(text: str) -> None:
    try:
        value = one("part", text)
    except ConfigError:
        return
    assert isinstance(value, float)
    assert 0 <= value <= 1


def test_file_gives_common_and_command_settings(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('count = 2\n[chat]\nname = "a"\n[bench]\ncount = 9\n')
    names, commands = ["count", "name"], ["chat", "bench"]
    assert read_file(path, "chat", names, commands) == {"count": 2, "name": "a"}
    assert read_file(path, "bench", names, commands) == {"count": 9}


def test_missing_file_is_empty(tmp_path: Path) -> None:
    assert read_file(tmp_path / "none.toml", "chat", [], []) == {}


@pytest.mark.parametrize("content", [b"coutn = 1", b"count = ", b"\xff\xfe", b"[chat]\nx = 1"])
def test_bad_file_is_a_config_error_naming_it(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "config.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"config\.toml"):
        read_file(path, "chat", ["count"], ["chat"])


def test_misspelled_key_gets_a_suggestion(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("coutn = 1")
    with pytest.raises(ConfigError) as error:
        read_file(path, "chat", ["count"], ["chat"])
    assert error.value.hint == "did you mean count?"


def test_undecodable_argument_names_the_byte() -> None:
    argument = b"gr\xc3\xbcn \xff".decode("utf-8", "surrogateescape")
    with pytest.raises(ConfigError, match="--prompt: byte 6 is not UTF-8"):
        check_text(argument, "--prompt")


def test_edgert_home_holds_everything() -> None:
    places = directories({"EDGERT_HOME": "/e", "XDG_CACHE_HOME": "/c"})
    assert places.config_file == Path("/e/config.toml")
    assert places.cache == Path("/e/cache")
    assert places.sessions == Path("/e/sessions")


def test_xdg_folders_are_respected_and_relative_ones_ignored() -> None:
    places = directories({"HOME": "/h", "XDG_CACHE_HOME": "/c", "XDG_CONFIG_HOME": "relative"})
    assert places.cache == Path("/c/edgert")
    assert places.config_file == Path("/h/.config/edgert/config.toml")
    assert places.data == Path("/h/.local/share/edgert")


def test_every_chat_flag_has_one_name_and_one_variable() -> None:
    settings = settings_of(ChatOptions)
    spellings = [text for s in settings for text in s.flag.spellings]
    assert len(spellings) == len(set(spellings))
    assert len({s.variable for s in settings}) == len(settings)
