"""Stop strings and characters that are split over tokens."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import ConfigError
from edgert.stops import TextStream


def feed(pieces: list[bytes], stops: list[str]) -> tuple[list[str], bool]:
    stream = TextStream(stops)
    parts = [stream.feed(piece) for piece in pieces]
    return [*parts, stream.finish()], stream.stopped


def test_a_character_split_over_tokens_comes_out_once_and_whole() -> None:
    assert feed([b"a\xe2", b"\x82", b"\xacb"], []) == (["a", "", "€b", ""], False)


def test_an_unfinished_character_becomes_the_replacement_character() -> None:
    assert feed([b"a\xe2\x82"], []) == (["a", "\ufffd"], False)


def test_a_possible_stop_is_held_back_and_released_when_it_is_none() -> None:
    assert feed([b"ab<", b"/s", b"x"], ["</s>"]) == (["ab", "", "</sx", ""], False)


def test_a_stop_over_three_tokens_ends_the_text() -> None:
    assert feed([b"ab<", b"/s", b">cd", b"ef"], ["</s>"]) == (["ab", "", "", "", ""], True)


def test_the_earliest_of_several_stops_counts() -> None:
    assert feed([b"one two three"], ["three", "two"])[0] == ["one ", ""]


@given(
    st.text(alphabet="ab€", max_size=30),
    st.lists(st.text(alphabet="ab€", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_splitting_never_changes_the_text(text: str, stops: list[str], data: st.DataObject) -> None:
    raw = text.encode()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(raw)), max_size=8)))
    edges = [0, *cuts, len(raw)]
    pieces = [raw[a:b] for a, b in itertools.pairwise(edges)]
    # stops arrive character by character, so the first one to be complete counts
    ends = [text.find(s) + len(s) for s in stops if s in text]
    if ends:
        first = min(ends)
        starts = [text.find(s) for s in stops if s in text and text.find(s) + len(s) == first]
        allowed = {text[: text.find(s)] for s in stops if s in text}
        found = "".join(feed(pieces, stops)[0])
        assert found in allowed
        assert len(found) <= max(starts)
    else:
        assert "".join(feed(pieces, stops)[0]) == text


@pytest.mark.parametrize("stops", ["x", [""], ["y" * 2000], [1], ["z"] * 100])
def test_bad_stops_are_refused(stops: object) -> None:
    with pytest.raises(ConfigError, match="stop"):
        TextStream(stops)  # type: ignore[arg-type]
