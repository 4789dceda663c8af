"""Syntax of GBNF grammars, checked here because llama.cpp prints its findings and may not return.

Source: llama.cpp src/llama-grammar.cpp, the parser of the tested release; same language.
"""

from __future__ import annotations

import string

from edgert.errors import ConfigError

_END = "\0"  # after the text, which may hold none
_WORD = frozenset(string.ascii_letters + string.digits + "-")
_HEX = frozenset(string.hexdigits)
_HEX_LENGTHS = {"x": 2, "u": 4, "U": 8}
_ESCAPED = frozenset('trn\\"[]-')
_BLANK = frozenset(" \t")
_NEWLINE = frozenset("\r\n")
_DIGITS = frozenset(string.digits)
_MOST_DIGITS = 9
_MOST_REPETITIONS = 2000


def check_syntax(text: str) -> None:
    """Parse a grammar without NUL and with few nested groups.

    Raises:
        ConfigError: names line, column and what was wanted there.
    """
    _Parser(text).check()


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text + _END
        self._at = 0
        self._defined: set[str] = set()
        self._used: dict[str, int] = {}

    def check(self) -> None:
        self._space(newlines=True)
        while self._next() != _END:
            self._rule()
        for name, at in self._used.items():
            if name not in self._defined:
                raise self._error(f"there is no rule named {name}", at)
        if "root" not in self._defined:
            raise ConfigError("grammar has no rule named root", hint="start with: root ::= ...")

    def _rule(self) -> None:
        self._defined.add(self._name())
        self._space()
        for character in "::=":
            self._expect(character, "::=")
        self._space(newlines=True)
        self._alternates(nested=False)
        if self._next() not in _NEWLINE and self._next() != _END:
            raise self._error("wanted a newline or the end")
        self._space(newlines=True)

    def _alternates(self, *, nested: bool) -> None:
        self._sequence(nested=nested)
        while self._next() == "|":
            self._at += 1
            self._space(newlines=True)
            self._sequence(nested=nested)

    def _sequence(self, *, nested: bool) -> None:
        has_item = False
        while True:
            character = self._next()
            if character in "*+?{":
                if not has_item:
                    raise self._error(f"nothing before {character} that could be repeated")
                has_item = self._repetition(nested=nested)
            elif character in '"[<!(.' or character in _WORD:
                has_item = self._item(character)
            else:
                return
            self._space(newlines=nested)

    def _item(self, character: str) -> bool:
        """Parse one symbol; False when it is empty and cannot be repeated."""
        start = self._at
        if character in _WORD:
            self._used.setdefault(self._name(), start)
            return True
        self._at += 1
        match character:
            case '"':
                self._characters('"', ranges=False)
                return self._at > start + 2
            case "[":
                first = start + 1
                if self._next() == "^":
                    self._at, first = self._at + 1, first + 1
                self._characters("]", ranges=True)
                return self._at > first + 1
            case "(":
                self._space(newlines=True)
                self._alternates(nested=True)
                self._expect(")", ")")
            case "!":
                self._expect("<", "<")
                self._token()
            case "<":
                self._token()
            case _:  # the dot
                pass
        return True

    def _characters(self, closer: str, *, ranges: bool) -> None:
        while self._next() != closer:
            self._character()
            if ranges and self._next() == "-" and self._text[self._at + 1] != closer:
                self._at += 1
                self._character()
        self._at += 1

    def _character(self) -> None:
        if self._next() == _END:
            raise self._error("the grammar ends within quotes or brackets")
        if self._next() == "\\":
            self._at += 1
            kind = self._next()
            if kind not in _ESCAPED and kind not in _HEX_LENGTHS:
                raise self._error(f"unknown escape \\{kind.strip(_END)}")
            for _ in range(_HEX_LENGTHS.get(kind, 0)):
                self._at += 1
                if self._next() not in _HEX:
                    raise self._error(f"wanted {_HEX_LENGTHS[kind]} hexadecimal digits")
        self._at += 1

    def _token(self) -> None:
        """Parse the rest of <name> or <[id]>; whether it exists only the vocabulary knows."""
        if self._next() == "[":
            self._at += 1
            self._number()
            self._expect("]", "]")
        else:
            while self._next() not in (">", _END):
                self._at += 1
        self._expect(">", ">")

    def _repetition(self, *, nested: bool) -> bool:
        """Parse * + ? or {least,most}; False when nothing is left of what is repeated."""
        start, character = self._at, self._next()
        self._at += 1
        if character != "{":
            return True
        self._space(newlines=nested)
        least = self._number()
        most: int | None = least
        self._space(newlines=nested)
        if self._next() == ",":
            self._at += 1
            self._space(newlines=nested)
            most = None
            if self._next() in _DIGITS:
                most = self._number()
                self._space(newlines=nested)
        self._expect("}", ", or }")
        if most is not None and most < least:  # llama.cpp would not come to an end
            raise self._error(f"from {least} to {most} is no number of repetitions", start)
        if least > _MOST_REPETITIONS:
            raise self._error(f"{least} repetitions, at most {_MOST_REPETITIONS}", start)
        return most != 0

    def _number(self) -> int:
        start = self._at
        while self._next() in _DIGITS:
            self._at += 1
        if not 0 < self._at - start <= _MOST_DIGITS:
            raise self._error(f"wanted a number of 1 to {_MOST_DIGITS} digits", start)
        return int(self._text[start : self._at])

    def _name(self) -> str:
        start = self._at
        while self._next() in _WORD:
            self._at += 1
        if self._at == start:
            raise self._error("wanted the name of a rule: letters, digits and -")
        return self._text[start : self._at]

    def _space(self, *, newlines: bool = False) -> None:
        while True:
            character = self._next()
            if character == "#":
                while self._next() not in _NEWLINE and self._next() != _END:
                    self._at += 1
            elif character in _BLANK or (newlines and character in _NEWLINE):
                self._at += 1
            else:
                return

    def _expect(self, character: str, wanted: str) -> None:
        if self._next() != character:
            raise self._error(f"wanted {wanted}")
        self._at += 1

    def _next(self) -> str:
        return self._text[self._at]

    def _error(self, what: str, at: int | None = None) -> ConfigError:
        before = self._text[: self._at if at is None else at]
        line, column = before.count("\n") + 1, len(before) - before.rfind("\n")
        return ConfigError(
            f"grammar, line {line}, column {column}: {what}",
            hint="see grammars/README.md of llama.cpp for the GBNF syntax",
        )
