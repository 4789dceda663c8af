"""The script of a single token's graph: learnt in two passes, then another graph is refused."""

from __future__ import annotations

import pytest

from edgert.errors import BackendError
from edgert.experts.script import Script

GRAPH = ("embd", "norm", "router", "ids", "gate", "up", "down", "out")
MATTERS = ("ids", "gate", "up", "down")


def run(script: Script, graph: tuple[str, ...], kind: int | None = 1) -> list[str]:
    """Pass over a graph; returns the nodes that were looked at."""
    script.begin(kind)
    seen = []
    for name in graph:
        if not script.skips():
            seen.append(name)
            script.saw(name.encode(), matters=name in MATTERS)
    script.end(complete=True)
    return seen


def taught() -> Script:
    """Return a script that has seen the graph twice."""
    script = Script()
    run(script, GRAPH)
    run(script, GRAPH)
    return script


def test_two_equal_passes_look_at_all_and_the_next_at_what_matters() -> None:
    script = Script()
    assert run(script, GRAPH) == list(GRAPH)
    assert run(script, GRAPH) == list(GRAPH)
    assert run(script, GRAPH) == ["embd", *MATTERS]  # the first one tells graphs apart


def test_batches_are_looked_at_wholly_and_change_nothing() -> None:
    script = taught()
    assert run(script, ("embd", "other"), kind=None) == ["embd", "other"]
    assert run(script, GRAPH) == ["embd", *MATTERS]


def test_each_number_of_logits_has_a_script_of_its_own() -> None:
    script = taught()
    for _ in range(2):
        assert run(script, GRAPH[:-1], kind=0) == list(GRAPH[:-1])
    assert run(script, GRAPH[:-1], kind=0) == ["embd", *MATTERS]
    assert run(script, GRAPH) == ["embd", *MATTERS]


def test_another_graph_is_an_error_and_the_next_pass_learns_it() -> None:
    script = taught()
    longer = (*GRAPH[:3], "bias", *GRAPH[3:])
    with pytest.raises(BackendError, match="another graph"):
        run(script, longer)
    assert run(script, longer) == list(longer)


def test_graph_that_ends_early_is_an_error() -> None:
    script = taught()
    with pytest.raises(BackendError, match="fewer nodes"):
        run(script, GRAPH[:5])


def test_graph_without_a_token_such_as_of_a_shift_passes_and_is_not_learnt() -> None:
    script = taught()
    script.begin(1)
    script.saw(b"k_shift", matters=False)  # a graph of its own, before the token's
    for name in GRAPH:
        if not script.skips():
            script.saw(name.encode(), matters=name in MATTERS)
    script.end(complete=True)
    assert run(script, GRAPH) == ["embd", *MATTERS]


def test_pass_that_also_shifts_is_not_taken_for_the_graph_of_a_token() -> None:
    script = Script()
    run(script, ("k_shift", *GRAPH))
    for _ in range(2):
        assert run(script, GRAPH) == list(GRAPH)
    assert run(script, GRAPH) == ["embd", *MATTERS]


def test_pass_that_was_not_completed_teaches_nothing() -> None:
    script = Script()
    script.begin(1)
    script.saw(b"embd", matters=False)
    script.end(complete=False)
    for _ in range(2):
        assert run(script, GRAPH) == list(GRAPH)
    script.begin(1)
    script.saw(b"embd", matters=False)
    script.end(complete=False)  # cancelled: fewer nodes, and no error
    assert run(script, GRAPH) == ["embd", *MATTERS]
