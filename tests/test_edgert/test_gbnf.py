"""The syntax check of grammars: positions of mistakes, and agreement with llama.cpp's parser."""

from __future__ import annotations

import random
from typing import Any

import pytest

from edgert.errors import ConfigError
from edgert.gbnf import check_syntax
from edgert.llama.lib import load_library
from edgert.loading import load

PIECES = (
    "root", " ", "::=", '"a"', '""', "[a-z]", "(", ")", "|", "*", "+", "?", "{2}", "{0}", "{2,3}",
    "{1,}", "\n", "b", "#x", ".", "<[1]>", "!", "\\n", '"', "[", "]", "^", "-", "é", "\\x41", "}",
)  # fmt: skip


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("root ::= (", r"line 1, column 11: wanted \)"),
        ('root ::= "a"\nb = "c"', "line 2, column 3: wanted ::="),
        ("root ::= foo", "line 1, column 10: there is no rule named foo"),
        ('root ::= "a', "line 1, column 12: the grammar ends within quotes"),
        ('root ::= "\\q"', r"line 1, column 12: unknown escape \\q"),
        ('root ::= "\\xZ1"', "column 13: wanted 2 hexadecimal digits"),
        ("root ::= *", r"column 10: nothing before \*"),
        ('root ::= "a"{2,x}', "column 16: wanted , or }"),
        ('root ::= "a"{5,3}', "column 13: from 5 to 3 is no number of repetitions"),
        ('root ::= "a"{99999999}', "column 13: 99999999 repetitions, at most 2000"),
        ('root ::= "a"{99999999999}', "column 14: wanted a number of 1 to 9 digits"),
        ('root ::= "a" ]', "column 14: wanted a newline or the end"),
        ('a ::= "x"', "no rule named root"),
        ("", "no rule named root"),
    ],
)
def test_mistakes_are_named_with_their_place(text: str, where: str) -> None:
    with pytest.raises(ConfigError, match=where):
        check_syntax(text)


def accepted(text: str) -> bool:
    try:
        check_syntax(text)
    except ConfigError:
        return False
    return True


@pytest.mark.model
def test_check_and_llama_cpp_accept_the_same_grammars(capfd: pytest.CaptureFixture[str]) -> None:
    library: Any = load_library()
    source = random.Random(5)
    rules = ("".join(source.choices(PIECES, k=1 + n % 9)) for n in range(2000))
    texts = [f"root ::= {rule}\nb ::= [x]" for rule in rules]
    differing = []
    with load(threads=1) as engine:
        vocab: Any = engine._backend.vocab
        for text in texts:
            handle = library.api.llama_sampler_init_grammar(vocab.handle, text.encode(), b"root")
            library.api.llama_sampler_free(handle)
            recursive = not handle and "recursion" in library.log.last_problem()
            if accepted(text) != bool(handle) and not recursive:
                differing.append(text)
    capfd.readouterr()
    assert differing == []


@pytest.mark.model
def test_mistakes_are_not_printed_by_llama_cpp(capfd: pytest.CaptureFixture[str]) -> None:
    from edgert.sampling import SamplingParams

    with load(threads=1) as engine, pytest.raises(ConfigError):
        engine.complete("a", sampling=SamplingParams(grammar="root ::= ("))
    assert capfd.readouterr().err == ""
