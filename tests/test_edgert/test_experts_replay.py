"""Replays: the least possible is the least, models run with the same policies, one is kept."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgert.errors import CapacityError, ConfigError, FormatError
from edgert.events import Notice
from edgert.experts.kept_policy import KeptPolicy, PolicyStore
from edgert.experts.replay import NOBODY, belady_misses, by_token, compare, replay_ahead
from edgert.experts.scores import POLICIES
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.weights.packed import model_key
from make_model import Request, make_model
from planned_models import outcome
from quant.tensor_file import open_tensor_file

N_EXPERTS, N_LAYERS, N_USED = 5, 2, 2

choices_of = st.lists(
    st.lists(
        st.lists(st.integers(0, N_EXPERTS - 1), min_size=N_USED, max_size=N_USED, unique=True),
        min_size=N_LAYERS, max_size=N_LAYERS,
    ),
    min_size=1, max_size=5,
)  # fmt: skip


def fewest_misses(steps: list[frozenset[tuple[int, int]]], capacity: int) -> int:
    """Try every way to drop."""

    @cache
    def fewest(step: int, held: frozenset[tuple[int, int]]) -> int:
        if step == len(steps):
            return 0
        wanted = steps[step]
        n_kept = capacity - len(wanted)
        rest = sorted(held - wanted)
        missed = len(wanted - held)
        ways = itertools.combinations(rest, min(n_kept, len(rest)))
        return missed + min(fewest(step + 1, wanted | frozenset(kept)) for kept in ways)

    return fewest(0, frozenset())


@settings(max_examples=40, deadline=None)
@given(choices=choices_of, capacity=st.integers(N_USED, 6))
def test_clairvoyant_is_what_trying_everything_finds(
    choices: list[list[list[int]]], capacity: int
) -> None:
    array = np.array(choices, np.int32)
    steps = [
        frozenset((layer, expert) for expert in row)
        for token in choices
        for layer, row in enumerate(token)
    ]
    found = replay_ahead(array, capacity, 0).misses_per_token * len(choices)
    assert found == pytest.approx(fewest_misses(steps, capacity))


@settings(max_examples=40, deadline=None)
@given(choices=choices_of, capacity=st.integers(N_USED, 12))
def test_no_policy_misses_less_than_the_clairvoyant(
    choices: list[list[list[int]]], capacity: int
) -> None:
    found = compare(np.array(choices, np.int32), N_EXPERTS, capacity)
    for one in found.policies.values():
        assert one.misses_per_token >= found.best.misses_per_token
    assert found.winner in POLICIES
    if capacity >= N_LAYERS * N_EXPERTS:
        assert {one.misses_per_token for one in found.policies.values()} == {
            found.best.misses_per_token
        }


def test_recency_of_three_in_two_places_worked_by_hand() -> None:
    # One layer, one expert a token: 0 1 2 0 1 2 through two places; recency always drops the next.
    choices = np.array([0, 1, 2, 0, 1, 2], np.int32).reshape(6, 1, 1)
    found = compare(choices, 3, 2)
    assert found.policies["recency"].misses_per_token == 1.0
    assert found.policies["recency"].hit_rate == 0.0
    # Seeing ahead: 0 1 2 are read (2 in the place of 1), 0 is there, 1 is read over 0, 2 is there.
    assert replay_ahead(choices, 2, 0).misses_per_token == pytest.approx(4 / 6)


def test_fewest_misses_of_a_trace_whose_first_pass_wants_more_than_fits() -> None:
    tokens = [[[0, 1, 2, 3], [0, 1]], [[0], [1]], [[3], [1]], [[0], [0]]]
    assert belady_misses(tokens, 2, 0) == 10
    assert belady_misses(tokens, 8, 1) == 0


def test_smaller_than_one_token_is_refused() -> None:
    with pytest.raises(CapacityError, match="smaller than the 2"):
        compare(np.zeros((3, 1, 2), np.int32), 4, 1)


def test_lines_of_batches_are_arranged_by_token() -> None:
    lines = [(1, [0, 1]), (1, [2, 3]), (1, [4, 5]), (3, [6, 7]), (1, [8, 9]), (3, [1, 0])]
    choices = by_token(lines)
    assert choices[:, 0].tolist() == [[0, 1], [2, 3], [4, 5], [8, 9]]
    # The last layer computed only the last token of the batch.
    assert choices[:, 1].tolist() == [[NOBODY] * 2, [NOBODY] * 2, [6, 7], [1, 0]]
    found = compare(choices, 10, 4)
    assert found.best.misses_per_token == pytest.approx(12 / 4)


def test_one_layer_is_a_token_a_line() -> None:
    assert by_token([(0, [1]), (0, [2]), (0, [1])]).reshape(-1).tolist() == [1, 2, 1]


def kept(path: Path, **changes: object) -> KeptPolicy:
    values: dict[str, object] = {
        "model": model_key(open_tensor_file(path)), "policy": "recency", "n_tokens": 100,
        "n_experts": (8,), "misses_per_token": {"recency": (1.5,)},
    }  # fmt: skip
    return KeptPolicy.model_validate(values | changes)


def test_kept_policy_is_read_again(random_models: dict[str, Path], tmp_path: Path) -> None:
    file = open_tensor_file(random_models["experts"])
    store = PolicyStore(tmp_path / "new")
    assert store.load(file) is None
    store.save(file, kept(random_models["experts"]))
    assert store.load(file) == kept(random_models["experts"])
    with pytest.raises(ConfigError, match="another model"):
        store.save(file, kept(random_models["plain"]))


@pytest.mark.parametrize(
    "change",
    [
        b"", b"{", b"[]", b'{"policy": "mixed"}', b"\xff", b"x" * 70_000,
        {"policy": "oldest"}, {"model": "0" * 64}, {"format_version": 2}, {"more": 1},
        {"n_tokens": 0}, {"misses_per_token": {"oldest": [1.0]}},
    ],
)  # fmt: skip
@pytest.mark.model
def test_damaged_or_foreign_policy_is_a_notice_and_the_default(
    random_models: dict[str, Path], tmp_path: Path, change: bytes | dict[str, object]
) -> None:
    path = random_models["experts"]
    file = open_tensor_file(path)
    store = PolicyStore(tmp_path)
    place = store.save(file, kept(path))
    if isinstance(change, bytes):
        place.write_bytes(change)
    else:
        place.write_text(json.dumps(json.loads(place.read_bytes()) | change))
    with pytest.raises(FormatError):
        store.load(file)
    heard: list[object] = []
    options = LoadOptions(
        path, weight_memory_bytes=6 << 20, n_ctx=64, n_threads=1, policy_folder=tmp_path
    )
    backend = open_backend(options, heard.append)
    try:
        assert "dropped by mixed" in backend.applied()["weights"]
    finally:
        backend.close()
    assert any(isinstance(one, Notice) and "as by default" in one.text for one in heard)


@pytest.mark.model
def test_model_opens_with_its_kept_policy_and_says_why(
    random_models: dict[str, Path], tmp_path: Path
) -> None:
    path = random_models["experts"]
    PolicyStore(tmp_path).save(open_tensor_file(path), kept(path, policy="steady"))
    heard: list[object] = []
    options = LoadOptions(path, weight_memory_bytes=6 << 20, n_ctx=64, n_threads=1)
    for folder, policy in ((tmp_path, "steady"), (None, "mixed")):
        backend = open_backend(replace(options, policy_folder=folder), heard.append)
        try:
            assert f"dropped by {policy}" in backend.applied()["weights"]
        finally:
            backend.close()
    notices = [one.text for one in heard if isinstance(one, Notice) and "steady" in one.text]
    assert notices == [
        "experts are dropped by steady: it missed least of 4 policies in a replay of 100 tokens"
    ]


@pytest.mark.model
def test_nested_model_drops_experts_by_its_kept_policy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = make_model(Request("tiny-moe", tmp_path / "source.gguf", weight_type="Q8_0"))[0]
    path = tmp_path / "nested.gguf"
    assert outcome(capsys, "quantize", str(source), "--nested", "4..8", "-o", str(path))[0] == 0
    PolicyStore(tmp_path).save(open_tensor_file(path), kept(path, policy="frequency"))
    options = LoadOptions(path, n_ctx=64, n_threads=1)
    for folder, policy in ((tmp_path, "frequency"), (None, "mixed")):
        backend = open_backend(replace(options, policy_folder=folder))
        try:
            assert f"dropped by {policy}" in backend.applied()["weights"]
        finally:
            backend.close()


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Of the random mixture of experts: 4 layers of 8, 2 for each token."""
    random = np.random.default_rng(1)
    path = tmp_path / "routing.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for _ in range(60):
            for layer in range(4):
                experts = random.choice(8, 2, replace=False, p=np.arange(1, 9) / 36).tolist()
                file.write(json.dumps({"layer": layer, "experts": experts}) + "\n")
    return path


def test_command_compares_and_keeps(
    random_models: dict[str, Path], trace: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path / "home"))
    path = str(random_models["experts"])
    code, out, err = outcome(capsys, "experts", path, str(trace))
    assert (code, out.count(" of 32 |")) == (0, 3)
    assert "misses least in 60 tokens" in err
    code, out, _ = outcome(
        capsys, "experts", "-m", path, str(trace), "--experts", "12", "--keep", "--json"
    )
    found = json.loads(out)
    assert code == 0
    assert set(found["replays"][0]["policies"]) == set(POLICIES)
    assert found["replays"][0]["n_warm_tokens"] == 6
    stored = PolicyStore(tmp_path / "home" / "cache" / "experts").load(open_tensor_file(Path(path)))
    assert stored is not None
    assert (stored.policy, stored.n_experts) == (found["winner"], (12,))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["TRACE", "--experts", "1"], 4),
        (["TRACE", "--cache", "1K"], 4),
        (["TRACE", "--cache", "1M", "--experts", "4"], 2),
        (["missing.jsonl"], 2),
    ],
)
def test_command_refuses_what_makes_no_sense(
    random_models: dict[str, Path], trace: Path, arguments: list[str], code: int,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    named = [str(trace) if one == "TRACE" else one for one in arguments]
    found, _, err = outcome(capsys, "experts", str(random_models["experts"]), *named)
    assert found == code
    assert "hint: " in err or "no such" in err.lower()
