"""Tokens to text: characters split over tokens are put together, stop strings end the text."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from edgert.errors import ConfigError

_MOST_STOPS = 64
_LONGEST_STOP = 1024


class TextStream:
    """Collects token bytes and gives out text that can no longer be part of a stop string.

    Args:
        stops: Strings that end the text; they are not part of it.
    """

    def __init__(self, stops: Sequence[str] = ()) -> None:
        self._stops = check_stops(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.stopped = False

    def feed(self, piece: bytes) -> str:
        """Take the bytes of a token and return the text that is certain now.

        Sets `stopped` when a stop string is complete; what follows it is dropped.
        """
        return "" if self.stopped else self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """Return what was held back; an unfinished character becomes U+FFFD."""
        text = "" if self.stopped else self._release(self._decoder.decode(b"", final=True))
        held, self._held = self._held, ""  # empty after a stop
        return text + held

    def _release(self, fresh: str) -> str:
        text = self._held + fresh
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        n_held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - n_held :]
        return text[: len(text) - n_held]


def check_stops(stops: Sequence[object] | str) -> tuple[str, ...]:
    """Return the stop strings after checking them.

    Raises:
        ConfigError: a string instead of a list, an empty, overlong or non-text one, or too many.
    """
    if isinstance(stops, str):  # a sequence of texts as well, but hardly meant
        raise ConfigError("stop is a string, wanted a list of strings", hint=f"pass [{stops!r}]")
    if not isinstance(stops, Sequence):
        raise ConfigError(f"stop is a {type(stops).__name__}, wanted a list of strings")
    if len(stops) > _MOST_STOPS:
        raise ConfigError(f"{len(stops)} stop strings, at most {_MOST_STOPS}")
    checked: list[str] = []
    for index, stop in enumerate(stops):
        if not isinstance(stop, str) or not 0 < len(stop) <= _LONGEST_STOP:
            raise ConfigError(
                f"stop[{index}] is {stop!r:.60}, wanted a text of 1 to {_LONGEST_STOP} characters"
            )
        checked.append(stop)
    return tuple(checked)


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`, less than all of it."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if stop.startswith(text[len(text) - length :]):
            return length
    return 0
