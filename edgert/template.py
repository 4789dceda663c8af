"""Chat templates: a model file's Jinja text, run in a sandbox with bounds on what it may cost."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import jinja2
import jinja2.exceptions
import jinja2.sandbox

from edgert.errors import ConfigError, FormatError

Message = dict[str, str]

GENERIC_TEMPLATE = (
    "{% for message in messages %}### {{ message.role | capitalize }}:\n"
    "{{ message.content }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}### Assistant:\n{% endif %}"
)
GENERIC_STOPS = ("\n### ",)
_LARGEST_SOURCE = 256 << 10
_LARGEST_OUTPUT = 4 << 20
_LARGEST_RANGE = 10_000
_LONGEST_REPETITION = 1000
_LONGEST_RENDER_S = 5.0


class _Refused(jinja2.TemplateError):
    """The template itself called raise_exception."""


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Also bounds what multiplication, powers and formatting may build.

    Source: jinja2.sandbox, "Operator Intercepting".
    """

    intercepted_binops = frozenset({"*", "**", "%"})

    def call_binop(
        self,
        context: jinja2.runtime.Context,
        operator: str,
        left: Any,  # noqa: ANN401  any value of a template
        right: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Refuse operators on anything but small numbers."""
        if not _is_small(operator, left, right):
            raise jinja2.exceptions.SecurityError(f"operator {operator} on large or other values")
        return super().call_binop(context, operator, left, right)


def _is_small(operator: str, left: object, right: object) -> bool:
    if isinstance(left, str) and isinstance(right, int) and operator == "*":
        return len(left) * right <= _LONGEST_REPETITION
    if not isinstance(left, int | float) or not isinstance(right, int | float):
        return False
    return abs(left) < 1e9 and abs(right) < (64 if operator == "**" else 1e9)


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The texts of special tokens that templates may print."""

    bos: str
    eos: str


class ChatTemplate:
    """A compiled template.

    Args:
        source: Jinja text from the model file.
        model_name: For error messages.
        special: Texts of BOS and EOS.

    Raises:
        FormatError: too large, or not a Jinja template.
    """

    def __init__(self, source: str, model_name: str, special: SpecialTokens) -> None:
        self._model_name = model_name
        self._special = special
        if len(source) > _LARGEST_SOURCE:
            raise self._error(f"has {len(source):,} characters, at most {_LARGEST_SOURCE:,}")
        environment = _environment()
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise self._error(f"cannot be compiled: {error}") from error

    def render(self, messages: Sequence[Message]) -> str:
        """Render a conversation with the beginning of the answer.

        Raises:
            ConfigError: the template refuses these messages.
            FormatError: the template fails, or its output or time is out of bounds.
        """
        try:
            return self._bounded(messages)
        except _Refused as error:
            raise ConfigError(
                f"the chat template of {self._model_name} refuses the messages: {error}"
            ) from error
        # a template is a program from the model file: any of these is its fault
        except (
            ArithmeticError,
            AttributeError,
            LookupError,
            MemoryError,
            RecursionError,
            TypeError,
            ValueError,
            jinja2.TemplateError,
        ) as error:
            raise self._error(f"fails: {type(error).__name__}: {error}") from error

    def _bounded(self, messages: Sequence[Message]) -> str:
        budget = _LARGEST_OUTPUT + 2 * sum(len(message["content"]) for message in messages)
        deadline_s = time.monotonic() + _LONGEST_RENDER_S
        parts: list[str] = []
        for part in self._template.generate(
            messages=[dict(message) for message in messages],
            add_generation_prompt=True,
            bos_token=self._special.bos,
            eos_token=self._special.eos,
            range=_RangeBudget(),
        ):
            budget -= len(part)
            if budget < 0 or time.monotonic() > deadline_s:
                raise self._error(
                    f"gives more than {_LARGEST_OUTPUT:,} characters or takes longer than "
                    f"{_LONGEST_RENDER_S:g} s"
                )
            parts.append(part)
        return "".join(parts)

    def _error(self, what: str) -> FormatError:
        return FormatError(f"the chat template of {self._model_name} {what}")


class _RangeBudget:
    """`range` for templates; all calls of one rendering together may give 10,000 numbers."""

    def __init__(self) -> None:
        self._left = _LARGEST_RANGE

    def __call__(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._left -= len(numbers)
        if self._left < 0:
            raise jinja2.exceptions.SecurityError(f"more than {_LARGEST_RANGE:,} loop steps")
        return numbers


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    for name in ("center", "indent", "format"):  # may build texts of any size
        environment.filters.pop(name)
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = time.strftime
    environment.globals.pop("lipsum")
    return environment


def _tojson(value: object, indent: int | None = None) -> str:
    if indent is not None and not 0 <= indent <= 16:
        raise ValueError(f"indent is {indent}")
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _refuse(message: object) -> NoReturn:
    raise _Refused(str(message))
