"""Reads JSON that nobody vouches for: bounded, without repeated keys, NaN or endless numbers.

Says where a problem is as a path such as `$.stages[1].kv_bytes`. What a document means is for the
models of its format.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate

from edgert.errors import FormatError

LARGEST_BYTES = 64 << 20
DEEPEST = 32
MOST_VALUES = 1 << 21
MOST_DIGITS = 19

_PLAIN_KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")
_STRINGS = re.compile(rb'"[^"]*+"?')
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_STEPS = {**dict.fromkeys(b"[{", 1), **dict.fromkeys(b"]}", -1)}
_NOT_BRACKETS = bytes(set(range(256)) - set(_STEPS))
_LONGEST_SHOWN = 60

Step = str | int
Problem = Mapping[str, object]


class _Refused:
    """Takes the place of a value that JSON allows and we do not."""

    def __init__(self, text: str, rule: str) -> None:
        self.text = text
        self.rule = rule


def read_json(content: bytes, place: str) -> object:
    """Parse one JSON document.

    Args:
        content: UTF-8 text, `LARGEST_BYTES` at most.
        place: Where it is from, for errors.

    Raises:
        FormatError: not JSON, or more than we read; with line and offset, or the path in it.
    """
    _check_extent(content, place)
    text = _decode(content, place)
    hooks = _Hooks()
    try:
        document: object = json.loads(
            text,
            parse_int=hooks.whole,
            parse_constant=hooks.constant,
            object_pairs_hook=hooks.pairs,
        )
    except json.JSONDecodeError as error:
        raise FormatError(
            f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}",
            path=place,
            offset=len(text[: error.pos].encode()),
            hint="the file is damaged or cut short, or was edited by hand",
        ) from error
    if hooks.refused:
        path, value = next(_find(document, ()))
        raise FormatError(f"{json_path(path)}: {value.text}, {value.rule}", path=place)
    if _SURROGATE.search(content):
        _check_pairs(document, place)
    return document


def json_path(steps: Sequence[Step]) -> str:
    """Write a path into a document, such as `$.stages[1].host_id`."""
    return "$" + "".join(_step_text(step) for step in steps)


def show_value(value: object) -> str:
    """Write a value of a document on one short line, in ASCII."""
    if isinstance(value, dict | list | tuple):
        return f"{'an object' if isinstance(value, dict) else 'a list'} of {len(value):,}"
    text = json.dumps(value, default=repr)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def explain(problems: Sequence[Problem]) -> str:
    """Say what is wrong with a document: path, value and rule of the first, how many others.

    Args:
        problems: `ValidationError.errors()` of a pydantic model.
    """
    # A list whose items are wrong counts as empty; that follows from the items.
    real = [problem for problem in problems if not _follows(problem)] or problems
    more = f" (and {len(real) - 1:,} more)" if len(real) > 1 else ""
    return f"{_explain(real[0])}{more}"


def _follows(problem: Problem) -> bool:
    items = problem.get("input")
    return problem.get("type") == "too_short" and isinstance(items, list) and bool(items)


def _explain(problem: Problem) -> str:
    steps = [step for step in _steps(problem) if step != "[key]"]
    kind, context = str(problem.get("type")), problem.get("ctx")
    path, rule = json_path(steps), _rule(kind, context if isinstance(context, dict) else {})
    if kind == "missing":
        return f"{path}: missing"
    if kind == "extra_forbidden":
        return f"{path}: {show_value(problem.get('input'))}, but there is no such key"
    return f"{path}: {show_value(problem.get('input'))}, {rule or problem.get('msg')}"


def _steps(problem: Problem) -> list[Step]:
    found = problem.get("loc")
    return (
        [step for step in found if isinstance(step, str | int)] if isinstance(found, tuple) else []
    )


def _rule(kind: str, context: Mapping[str, object]) -> str:
    wanted = {
        "greater_than": "wanted more than {gt}",
        "greater_than_equal": "wanted >= {ge}",
        "less_than_equal": "wanted <= {le}",
        "string_pattern_mismatch": "wanted text that matches {pattern}",
        "string_too_short": "wanted {min_length} or more characters",
        "string_too_long": "wanted {max_length} characters at most",
        "too_short": "wanted {min_length} or more",
        "too_long": "wanted {max_length} at most",
        "literal_error": "wanted {expected}",
        "finite_number": "wanted a finite number",
        "int_type": "wanted a whole number",
        "int_from_float": "wanted a whole number",
        "float_type": "wanted a number",
        "bool_type": "wanted true or false",
        "string_type": "wanted text",
        "string_unicode": "wanted text without lone surrogates",
        "tuple_type": "wanted a list",
        "dict_type": "wanted an object",
        "model_type": "wanted an object",
    }.get(kind, "")
    return wanted.format_map(context) if wanted else ""


def _step_text(step: Step) -> str:
    if isinstance(step, int):
        return f"[{step}]"
    return f".{step}" if _PLAIN_KEY.match(step) else f"[{show_value(step)}]"


def _check_extent(content: bytes, place: str) -> None:
    """Bound length, number and nesting of values before any of them is built."""

    def check(saw: int, most: int, what: str) -> None:
        if saw > most:
            raise FormatError(f"{saw:,} {what}, wanted {most:,} at most", path=place)

    check(len(content), LARGEST_BYTES, "bytes of JSON")
    unescaped = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    check(unescaped.count(b'"') // 2, MOST_VALUES, "strings")
    bare = _STRINGS.sub(b"", unescaped)
    brackets = bare.translate(None, _NOT_BRACKETS)
    check(bare.count(b",") + len(brackets), MOST_VALUES, "values")
    check(max(accumulate(map(_STEPS.__getitem__, brackets)), default=0), DEEPEST, "nested levels")


def _decode(content: bytes, place: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise FormatError(
            f"line {line}: byte 0x{content[error.start]:02x} is not UTF-8 text",
            path=place,
            offset=error.start,
        ) from error


class _Hooks:
    """What the parser calls for what JSON allows and we may not; remembers what was refused."""

    def __init__(self) -> None:
        self.refused: list[_Refused] = []

    def whole(self, text: str) -> object:
        if len(text) > MOST_DIGITS + text.startswith("-"):
            return self._refuse(text, f"wanted {MOST_DIGITS} digits at most")
        return int(text)

    def constant(self, text: str) -> object:
        return self._refuse(text, "wanted a finite number")

    def pairs(self, items: list[tuple[str, object]]) -> object:
        found = dict(items)
        if len(found) == len(items):
            return found
        seen: set[str] = set()
        for key, _ in items:
            if key in seen:
                found[key] = self._refuse("there twice", "wanted every key once")
            seen.add(key)
        return found

    def _refuse(self, text: str, rule: str) -> _Refused:
        shown = text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."
        self.refused.append(_Refused(shown, rule))
        return self.refused[-1]


def _find(value: object, steps: tuple[Step, ...]) -> Iterator[tuple[tuple[Step, ...], _Refused]]:
    """Walk to the refused values; at least one is always reachable."""
    if isinstance(value, _Refused):
        yield steps, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _find(item, (*steps, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _find(item, (*steps, index))


def _check_pairs(document: object, place: str) -> None:
    """Refuse half of a surrogate pair, which no UTF-8 text can hold."""
    try:
        json.dumps(document, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise FormatError(
            f"text with a lone surrogate \\u{ord(error.object[error.start]):04x}, "
            "wanted both halves of the pair",
            path=place,
        ) from error
