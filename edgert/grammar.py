"""Grammars for sampling: GBNF and JSON Schema, checked before llama.cpp sees them."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ConfigError
from edgert.gbnf import check_syntax
from edgert.llama.lib import load_library
from edgert.llama.vocab import Vocab
from edgert.sampler_chain import TOKEN_DATA

LARGEST_GRAMMAR_BYTES = 256 << 10
_DEEPEST_NESTING = 64
_MOST_RULES = 4096


class Grammar:
    """A compiled grammar and how far it is matched. `close` frees it.

    Never accept a token that is not allowed: llama.cpp ends the process then.
    """

    def __init__(self, text: str, vocab: Vocab) -> None:
        self._api = load_library().api
        self._handle = self._api.llama_sampler_init_grammar(vocab.handle, text.encode(), b"root")
        if not self._handle:
            raise ConfigError(
                f"llama.cpp does not accept the grammar: {load_library().log.last_problem()}",
                hint="see grammars/README.md of llama.cpp for the GBNF syntax",
            )

    def allowed(self, token_ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Say for each token whether it may come next."""
        data = np.zeros(len(token_ids), TOKEN_DATA)
        data["id"] = token_ids
        array = self._api.llama_token_data_array(
            data=data.ctypes.data_as(self._api.llama_token_data_p),
            size=len(data),
            selected=-1,
            sorted=False,
        )
        self._api.llama_sampler_apply(self._handle, ctypes.byref(array))
        allowed: NDArray[np.bool_] = np.isfinite(data["logit"])
        return allowed

    def accept(self, token_id: int) -> None:
        """Move on by one token.

        Raises:
            ConfigError: the grammar does not allow it.
        """
        if not self.allowed(np.array([token_id], np.int32))[0]:
            raise ConfigError(f"token {token_id} is not allowed by the grammar here")
        self._api.llama_sampler_accept(self._handle, token_id)

    def close(self) -> None:
        """Free the grammar; calling again does nothing."""
        if self._handle:
            self._api.llama_sampler_free(self._handle)
        self._handle = None


def compile_grammar(
    grammar: str | None, json_schema: str | Mapping[str, object] | None, vocab: Vocab
) -> Grammar | None:
    """Compile what the caller asked for, None when that is nothing.

    Raises:
        ConfigError: the grammar or schema is wrong.
    """
    if grammar is not None:
        return Grammar(check_grammar(grammar), vocab)
    if json_schema is not None:
        text = schema_to_gbnf(json_schema)
        try:
            check_grammar(text)
        except ConfigError as error:
            raise ConfigError(f"JSON schema becomes a wrong grammar: {error.message}") from error
        return Grammar(text, vocab)
    return None


def check_grammar(text: str) -> str:
    """Return `text` when it is well formed, small and flat enough for llama.cpp's parser.

    Raises:
        ConfigError: too large, too deeply nested, not Unicode, or wrong at a line and column.
    """
    if not isinstance(text, str):
        raise ConfigError(f"grammar is a {type(text).__name__}, wanted GBNF text")
    try:
        size_bytes = len(text.encode())
    except UnicodeEncodeError as error:
        raise ConfigError(f"grammar is not valid Unicode at character {error.start}") from error
    if "\0" in text:
        raise ConfigError("grammar has a NUL character")
    if not 0 < size_bytes <= LARGEST_GRAMMAR_BYTES:
        raise ConfigError(
            f"grammar has {size_bytes:,} bytes, wanted 1 to {LARGEST_GRAMMAR_BYTES:,}"
        )
    n_rules = text.count("::=")
    if n_rules > _MOST_RULES:
        raise ConfigError(f"grammar has {n_rules:,} rules, at most {_MOST_RULES:,}")
    depth = _nesting(text)
    if depth > _DEEPEST_NESTING:
        raise ConfigError(f"grammar nests {depth} groups, at most {_DEEPEST_NESTING}")
    check_syntax(text)
    return text


def schema_to_gbnf(schema: str | Mapping[str, object]) -> str:
    """Translate a JSON Schema; references to other documents are refused.

    Raises:
        ConfigError: not JSON, or not a schema that can be translated.
    """
    if not isinstance(schema, str | Mapping):
        raise ConfigError(f"JSON schema is a {type(schema).__name__}, wanted an object or text")
    try:
        text = schema if isinstance(schema, str) else json.dumps(dict(schema))
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"JSON schema is not JSON: {error}") from error
    if len(text) > LARGEST_GRAMMAR_BYTES:
        raise ConfigError(f"JSON schema has {len(text):,} characters, at most 262,144")
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"JSON schema is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise ConfigError(f"JSON schema is a {type(parsed).__name__}, wanted an object")
    load_library()
    from llama_cpp.llama_grammar import json_schema_to_gbnf  # after the check of the library

    try:
        return str(json_schema_to_gbnf(text))
    # its converter checks nothing: a wrong schema ends in whatever Python makes of it
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        raise ConfigError(
            f"JSON schema cannot be translated: {type(error).__name__}: {error}",
            hint="use type, properties, required, items, enum, const, anyOf and local $ref",
        ) from error


def _nesting(text: str) -> int:
    """Return the deepest nesting of groups, skipping literals, character classes and comments."""
    depth = deepest = index = 0
    closer = ""
    while index < len(text):
        character = text[index]
        if closer:
            index += character == "\\" and closer != "\n"
            closer = "" if character == closer else closer
        elif character in '"[#':
            closer = {'"': '"', "[": "]", "#": "\n"}[character]
        else:
            depth += (character == "(") - (character == ")")
            deepest = max(deepest, depth)
        index += 1
    return deepest
