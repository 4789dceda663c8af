"""Popularity of experts: assumed and counted, and the classes made of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgert.errors import ConfigError, EdgertError, FormatError
from partition.popularity import (
    MOST_EXPERT_CLASSES,
    Popularity,
    distinct_experts,
    expert_classes,
    popularity_of,
    read_routing_trace,
    routing_of,
)


@given(st.floats(0, 4), st.integers(1, 64), st.data())
def test_assumed_shares_are_probabilities_that_add_up(
    exponent: float, n_expert: int, data: st.DataObject
) -> None:
    n_used = data.draw(st.integers(1, n_expert))
    shares = Popularity(zipf_exponent=exponent).wanted(0, n_expert, n_used)
    assert len(shares) == n_expert
    assert sum(shares) == pytest.approx(n_used)
    assert all(0 <= share <= 1 for share in shares)
    assert list(shares) == sorted(shares, reverse=True)


def test_law_of_exponent_one_by_hand() -> None:
    # 1 + 1/2 + 1/3 + 1/4 = 25/12, one expert a token.
    shares = Popularity(zipf_exponent=1.0).wanted(0, 4, 1)
    assert shares == pytest.approx((12 / 25, 6 / 25, 4 / 25, 3 / 25))
    # With two a token the first would exceed 1 by exponent 3: it is always wanted.
    assert Popularity(zipf_exponent=3.0).wanted(0, 4, 2)[0] == 1.0


def test_tokens_that_choose_alike_want_few_experts() -> None:
    assert distinct_experts((1.0, 1.0, 0.0), 50) == 2
    assert distinct_experts((0.5, 0.5), 2) == pytest.approx(1.5)
    assert distinct_experts((0.25,) * 8, 1) == pytest.approx(2)


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(1, 1e9)), max_size=80),
    st.integers(1, MOST_EXPERT_CLASSES),
)
def test_classes_descend_lose_no_read_and_are_few(
    experts: list[tuple[float, float]], n_classes: int
) -> None:
    reads, class_of = expert_classes(experts, n_classes)
    assert len(reads) <= n_classes
    assert list(reads) == sorted(reads, reverse=True)
    assert sorted(set(class_of)) == list(range(len(reads)))
    wanted = sum(share * size for share, size in experts)
    classed = sum(reads[c] * experts[i][1] for i, c in enumerate(class_of))
    assert classed == pytest.approx(wanted, rel=1e-9, abs=1e-6)
    for i, (share, _) in enumerate(experts):
        for j, (other, _) in enumerate(experts):
            assert share >= other or class_of[i] >= class_of[j]


def test_equal_experts_are_one_class() -> None:
    assert expert_classes([(0.25, 10.0)] * 40) == ((0.25,), (0,) * 40)


def write(folder: Path, *rows: object) -> Path:
    path = folder / "trace.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_trace_is_counted_by_layer(tmp_path: Path) -> None:
    rows = [{"layer": 1, "experts": [0, 2]}] * 2 + [{"layer": 1, "experts": [2, 3]}]
    trace = read_routing_trace(write(tmp_path, *rows, ""), 2, 4, 2)
    assert trace.kind == "trace"
    assert trace.layers[0] == ()
    # (count + 2/4) / (3 + 1): one more token is taken to want all alike.
    assert trace.layers[1] == (2.5 / 4, 0.5 / 4, 3.5 / 4, 1.5 / 4)
    assert sum(trace.wanted(1, 4, 2)) == 2
    with pytest.raises(ConfigError, match="0 experts in layer 0"):
        trace.wanted(0, 4, 2)


def test_trace_is_kept_by_a_manifest_to_the_bit(tmp_path: Path) -> None:
    random = np.random.default_rng(3)
    rows = [
        {"layer": layer, "experts": random.choice(6, 2, replace=False).tolist()}
        for layer in (0, 2)
        for _ in range(700)
    ]
    trace = read_routing_trace(write(tmp_path, *rows), 3, 6, 2)
    routing = routing_of(trace)
    assert routing is not None
    assert popularity_of(routing, 3, 6, 2) == trace
    assert (routing.layers[1].shares, routing.layers[1].choices) == ("", "")
    assert popularity_of(routing, 3, 6, 1) is None  # of another model
    assert popularity_of(routing, 4, 6, 2) is None
    assert routing_of(Popularity()) is None


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ("{", "line 1: not JSON"),
        ("[" * 5000, "line 1: not JSON"),
        ("[1]", "object"),
        ({"layer": 0}, "exactly"),
        ({"layer": 0, "experts": [0, 1], "more": 1}, "exactly"),
        ({"layer": True, "experts": [0, 1]}, r"\$.layer is no integer"),
        ({"layer": 2, "experts": [0, 1]}, r"\$.layer is 2, wanted 0 to 1"),
        ({"layer": 0, "experts": 3}, r"\$.experts is no list"),
        ({"layer": 0, "experts": [0, 1.0]}, r"\$.experts is no list of integers"),
        ({"layer": 0, "experts": [0]}, "wanted 2 different"),
        ({"layer": 0, "experts": [1, 1]}, "wanted 2 different"),
        ({"layer": 0, "experts": [0, 4]}, "wanted 0 to 3"),
        ({"layer": 0, "experts": [-1, 0]}, "wanted 0 to 3"),
        ("", "empty"),
        (" " * 70_000, "longer than"),
    ],
)
def test_malformed_trace_names_line_and_rule(tmp_path: Path, row: object, problem: str) -> None:
    with pytest.raises(FormatError, match=problem) as caught:
        read_routing_trace(write(tmp_path, row), 2, 4, 2)
    assert "trace.jsonl" in str(caught.value)


def test_trace_that_is_no_file_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none", Path("bad\0name")):
        with pytest.raises(EdgertError):
            read_routing_trace(path, 2, 4, 2)


def test_trace_for_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text('{"layer": 0, "experts": []}\n')
    with pytest.raises(ConfigError, match="the model has none"):
        read_routing_trace(path, n_layer=2, n_expert=0, n_used=0)
