"""Sessions that share a part compute what each computes alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgert.models
from edgert.errors import CapacityError, LinkError
from edgert.hosts.cloud.lane import Lane
from edgert.hosts.cloud.quota import KeyLimits, Quotas
from edgert.hosts.cloud.shared_part import SharedPart
from edgert.hosts.cloud.step_checks import SharedSizes
from edgert.hosts.entrance import EmbeddingTable
from edgert.llama.context import Piece
from edgert.llama.open import open_part
from edgert.llama.part import PartRunner
from edgert.llama.part_graph import PartRun
from hosts_parts import N_CTX, options
from part_models import make_part
from quant.parts.spec import PartSpec
from quant.tensor_file import open_tensor_file

pytestmark = pytest.mark.model

Floats = NDArray[np.float32]

TINY = Path(edgert.models.__file__).parent / "tiny-chat.gguf"
N_SESSIONS = 6
SIZES = SharedSizes(N_SESSIONS, N_CTX, N_SESSIONS * N_CTX, n_beside=16)
PROMPTS = [[300 + 7 * s + i for i in range(9 + 11 * s)] for s in range(N_SESSIONS)]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("parts")
    specs = {"front": PartSpec(0, 3, embedding=False, head="none")}
    specs["back"] = PartSpec(0, 8, embedding=False, head="whole")
    return {
        name: make_part(TINY, spec, folder / f"{name}.gguf").file.path
        for name, spec in specs.items()
    }


@pytest.fixture(scope="module")
def table() -> Iterator[EmbeddingTable]:
    with closing(EmbeddingTable(open_tensor_file(TINY))) as found:
        yield found


def opened(path: Path, n_sequences: int, *, to_hidden: bool = False) -> PartRunner:
    asked = replace(
        options(path, to_hidden=to_hidden), n_sequences=n_sequences, n_cells=n_sequences * N_CTX
    )
    return open_part(asked, PartRun(to_hidden=to_hidden))


def greedy(part: PartRunner | Lane, table: EmbeddingTable, prompt: list[int], n: int) -> list[int]:
    part.truncate(0)
    position, states = 0, table.rows(prompt)
    logits = np.empty((0, 0), np.float32)
    for first in range(0, len(prompt), 32):
        chunk = states[first : first + 32]
        logits = part.run(chunk, position, 1)
        position += len(chunk)
    tokens = [int(logits[0].argmax())]
    while len(tokens) < n:
        logits = part.run(table.rows(tokens[-1:]), position, 1)
        position += 1
        tokens.append(int(logits[0].argmax()))
    return tokens


def test_sessions_together_answer_token_for_token_as_each_alone(
    parts: dict[str, Path], table: EmbeddingTable
) -> None:
    with closing(opened(parts["back"], 1)) as alone:
        wanted = [greedy(alone, table, prompt, 100) for prompt in PROMPTS]
    with closing(SharedPart(opened(parts["back"], N_SESSIONS), SIZES)) as part:
        quotas = Quotas(KeyLimits())
        lanes = [Lane(part, f"key-{s}", quotas) for s in range(N_SESSIONS)]
        with ThreadPoolExecutor(N_SESSIONS) as pool:
            found = list(
                pool.map(lambda s: greedy(lanes[s], table, PROMPTS[s], 100), range(N_SESSIONS))
            )
        together = part.sessions_per_batch
    assert found == wanted
    assert together > 2


def test_rows_of_hidden_states_come_back_to_their_sessions(
    parts: dict[str, Path], table: EmbeddingTable
) -> None:
    first, second = table.rows(PROMPTS[0]), table.rows(PROMPTS[2])
    with closing(opened(parts["front"], 1, to_hidden=True)) as alone:
        wanted = []
        for states in (first, second):
            alone.truncate(0)
            wanted.append(alone.run(states, 0, len(states)).copy())
    with closing(opened(parts["front"], 2, to_hidden=True)) as both:
        pieces = [Piece(1, 0, len(first), len(first)), Piece(0, 0, len(second), len(second))]
        rows = both.run_pieces(np.concatenate([first, second]), pieces)  # more than a ubatch of 32
    for saw, want in zip((rows[: len(first)], rows[len(first) :]), wanted, strict=True):
        assert np.linalg.norm(saw - want) <= 1e-3 * np.linalg.norm(want)


@pytest.mark.parametrize("rows", [(0, 0), (0, 1), (1, 0), (3, 1)])
def test_hidden_states_of_a_few_tokens_or_none_may_be_wanted(
    parts: dict[str, Path], table: EmbeddingTable, rows: tuple[int, int]
) -> None:
    first, second = table.rows(PROMPTS[3][:40]), table.rows(PROMPTS[1])
    wanted = []
    with closing(opened(parts["front"], 1, to_hidden=True)) as alone:
        for states, n_rows in zip((first, second), rows, strict=True):
            alone.truncate(0)
            wanted.append(alone.run(states, 0, len(states)).copy()[len(states) - n_rows :])
    with closing(opened(parts["front"], 2, to_hidden=True)) as runner:
        pieces = [Piece(0, 0, len(first), rows[0]), Piece(1, 0, len(second), rows[1])]
        found = runner.run_pieces(np.concatenate([first, second]), pieces)
    assert found.shape[0] == sum(rows)
    want = np.concatenate(wanted)
    assert np.linalg.norm(found - want) <= 1e-2 * np.linalg.norm(want)


def test_a_long_step_in_pieces_gives_the_hidden_states_of_its_last_tokens(
    parts: dict[str, Path], table: EmbeddingTable
) -> None:
    states = table.rows(PROMPTS[4])
    with closing(opened(parts["front"], 1, to_hidden=True)) as alone:
        wanted = alone.run(states, 0, len(states))[-2:].copy()
    front = opened(parts["front"], 2, to_hidden=True)
    with closing(SharedPart(front, SharedSizes(2, N_CTX, 2 * N_CTX, n_beside=7))) as part:
        lanes = [Lane(part, "a", Quotas(KeyLimits())) for _ in range(2)]

        def decode() -> None:
            for position in range(40):
                lanes[1].run(states[:1], position, 1)

        beside = threading.Thread(target=decode)
        beside.start()
        assert len(lanes[0].run(states, 0, 0)) == 0
        lanes[0].truncate(0)
        found = lanes[0].run(states, 0, 2)
        beside.join(20)
    assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)


def test_forgetting_and_renumbering_one_sequence_leaves_the_other(
    parts: dict[str, Path], table: EmbeddingTable
) -> None:
    states = table.rows(PROMPTS[3])
    n = len(states)

    def untouched(runner: PartRunner) -> Floats:
        runner.run_pieces(states, [Piece(1, 0, n, 0)])
        return runner.run_pieces(states[:1], [Piece(1, n, 1, 1)]).copy()

    with closing(opened(parts["back"], 2)) as runner:
        wanted = untouched(runner)
    with closing(opened(parts["back"], 2)) as runner:
        runner.run_pieces(states, [Piece(0, 0, n, 0)])
        runner.run_pieces(states, [Piece(1, 0, n, 0)])
        runner.shift(2, 5, 0)
        runner.truncate(4, 0)
        runner.truncate(0, 0)
        found = runner.run_pieces(states[:1], [Piece(1, n, 1, 1)])
        # Other cells, another order of sums in half precision.
        assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)


def test_a_place_is_empty_when_the_next_session_gets_it(
    parts: dict[str, Path], table: EmbeddingTable
) -> None:
    sizes = SharedSizes(1, N_CTX, N_CTX)
    with closing(SharedPart(opened(parts["back"], 1), sizes)) as part:
        quotas = Quotas(KeyLimits())
        first = Lane(part, "a", quotas)
        before = greedy(first, table, PROMPTS[1], 8)
        with pytest.raises(CapacityError, match="all 1 places"):
            Lane(part, "b", quotas)
        first.close()
        assert quotas.taken("a", "positions") == quotas.taken("a", "sessions") == 0
        second = Lane(part, "b", quotas)
        assert second.run(table.rows(PROMPTS[1]), 0, 1).shape[0] == 1  # position 0 is free
        assert greedy(second, table, PROMPTS[1], 8) == before


def test_closing_ends_steps_that_wait(parts: dict[str, Path], table: EmbeddingTable) -> None:
    part = SharedPart(opened(parts["back"], N_SESSIONS), SIZES)
    lanes = [Lane(part, "a", Quotas(KeyLimits())) for _ in range(3)]
    ended: list[str] = []

    def work(lane: Lane) -> None:
        try:
            while True:
                lane.truncate(0)
                lane.run(table.rows(PROMPTS[4]), 0, 0)
        except LinkError as error:
            ended.append(error.message)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in lanes]
    for thread in threads:
        thread.start()
    lanes[0].truncate(0)
    part.close()
    for thread in threads:
        thread.join(20)
    assert len(ended) == 3
    assert all("closed" in message for message in ended)
