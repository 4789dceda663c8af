"""Who is computed when in a part that many share, what each may take, and whom errors reach."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgert.errors import BackendError, Cancelled, CapacityError, EdgertError, LinkError
from edgert.hosts.cloud.batching import Job, Room, choose
from edgert.hosts.cloud.lane import Lane
from edgert.hosts.cloud.quota import KeyLimits, Quotas
from edgert.hosts.cloud.shared_part import SharedPart
from edgert.hosts.cloud.step_checks import SharedSizes
from edgert.llama.backend import Counters
from edgert.llama.context import Piece
from host_identities import in_thread
from service_hosts import eventually

Floats = NDArray[np.float32]
WIDTH = 4


def states(n: int, value: float = 1.0) -> Floats:
    return np.full((n, WIDTH), value, np.float32)


class FakeRunner:
    """Puts out what enters, notes what it was asked, and can be held up or made to fail."""

    to_hidden = False
    n_batch = 16
    n_logits_max = 16

    def __init__(self) -> None:
        self.batches: list[list[Piece]] = []
        self.cached: dict[int, int] = {}
        self.fails_for: set[int] = set()
        self.spoils = False
        self.wiped = 0
        self.gate = threading.Event()
        self.gate.set()
        self.stopped = threading.Event()

    def run_pieces(self, hidden: Floats, pieces: Sequence[Piece]) -> Floats:
        self.batches.append(list(pieces))
        while not self.gate.wait(0.005):
            if self.stopped.is_set():
                self.stopped.clear()
                raise Cancelled("cancelled")
        first, rows = 0, []
        if self.fails_for & {piece.sequence for piece in pieces}:
            raise BackendError("llama_decode failed")
        for piece in pieces:
            assert piece.first_position == self.cached.get(piece.sequence, 0)
            self.cached[piece.sequence] = piece.first_position + piece.n_tokens
            first += piece.n_tokens
            rows.append(hidden[first - piece.n_rows : first])
        found = np.concatenate(rows)
        return found * np.float32("nan") if self.spoils else found

    def truncate(self, n_positions: int, sequence: int) -> None:
        self.cached[sequence] = min(self.cached.get(sequence, 0), n_positions)

    def shift(self, keep: int, discard: int, sequence: int) -> None:
        del keep
        self.cached[sequence] -= discard

    def wipe(self) -> None:
        self.wiped += 1
        self.cached.clear()

    def cancel(self) -> None:
        self.stopped.set()

    def counters(self) -> Counters:
        raise NotImplementedError

    def close(self) -> None:
        pass


@contextmanager
def shared(n: int = 3, **sizes: float) -> Iterator[tuple[FakeRunner, SharedPart, list[Lane]]]:
    runner = FakeRunner()
    asked = {"n_ctx": 64, "n_cells": 64 * n, "n_beside": 4, **sizes}
    part = SharedPart(runner, SharedSizes(n, **asked))  # type: ignore[arg-type]
    quotas = Quotas(KeyLimits())
    try:
        yield runner, part, [Lane(part, f"key-{index}", quotas) for index in range(n)]
    finally:
        runner.gate.set()
        part.close()


def held(runner: FakeRunner, lane: Lane) -> Future[Floats]:
    """Have a step computed that does not end until the gate opens."""
    runner.gate.clear()
    future = in_thread(lambda: lane.run(states(2), 0, 0))
    eventually(lambda: len(runner.batches) == 1)
    return future


def queued(part: SharedPart, n: int) -> Callable[[], bool]:
    return lambda: len(part._waiting) == n


def test_single_tokens_of_all_sessions_go_first_and_prompts_fill_what_is_left() -> None:
    with shared(3) as (runner, part, lanes):
        for lane in lanes[1:]:
            lane.run(states(3), 0, 0)
        runner.batches.clear()
        first = held(runner, lanes[0])
        later = [
            in_thread(lambda: lanes[1].run(states(1, 5), 3, 1)),
            in_thread(lambda: lanes[2].run(states(1, 7), 3, 1)),
        ]
        eventually(queued(part, 3))
        runner.gate.set()
        first.result(20)
        assert [float(f.result(20)[0, 0]) for f in later] == [5, 7]
        assert sorted(piece.sequence for piece in runner.batches[1]) == [1, 2]


def test_a_prompt_is_cut_while_others_wait_for_a_token_and_its_rows_are_joined() -> None:
    with shared(2) as (runner, part, lanes):
        lanes[1].run(states(3), 0, 0)
        runner.batches.clear()
        runner.gate.clear()
        token = in_thread(lambda: lanes[1].run(states(1), 3, 1))
        eventually(lambda: len(runner.batches) == 1)
        rows = np.arange(10 * WIDTH, dtype=np.float32).reshape(10, WIDTH)
        prompt = in_thread(lambda: lanes[0].run(rows, 0, 7))
        eventually(queued(part, 2))
        part._waiting[1].job.n_done = 0
        runner.gate.set()
        token.result(20)
        assert prompt.result(20).tobytes() == rows[3:].tobytes()


jobs = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 40), st.integers(0, 9)), max_size=7)


@given(jobs, st.integers(8, 40), st.integers(8, 20), st.integers(1, 16))
def test_what_is_computed_together_fits_and_somebody_always_gets_on(
    facts: list[tuple[int, int, int]], n_tokens: int, n_rows: int, n_beside: int
) -> None:
    waiting = [
        Job(index, states(n), 0, min(n, rows), turn) for index, (n, rows, turn) in enumerate(facts)
    ]
    taken = choose(waiting, Room(n_tokens, n_rows, n_beside))
    pieces = [item.piece for item in taken]
    assert sum(piece.n_tokens for piece in pieces) <= n_tokens
    assert sum(piece.n_rows for piece in pieces) <= n_rows
    assert len({piece.sequence for piece in pieces}) == len(pieces)
    assert all(piece.n_tokens > 0 for piece in pieces)
    assert {job.sequence for job in waiting if job.n_left == 1} <= {p.sequence for p in pieces}
    assert bool(pieces) == bool(waiting)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=6))
def test_every_job_ends_however_many_compete(sizes: list[int]) -> None:
    waiting = [Job(index, states(n), 0, min(n, 16)) for index, n in enumerate(sizes)]
    room, turn = Room(16, 8, 4), 0
    while waiting:
        turn += 1
        assert turn <= sum(sizes)
        for item in choose(waiting, room):
            item.job.n_done += item.piece.n_tokens
            item.job.turn = turn
        waiting = [job for job in waiting if job.n_left]


def test_whoever_was_served_longest_ago_gets_the_room() -> None:
    late, early = Job(0, states(30), 0, 0, turn=5), Job(1, states(30), 0, 0, turn=2)
    assert [item.job for item in choose([late, early], Room(16, 16, 4))] == [early]


def test_a_step_that_waits_can_be_given_up_and_others_go_on() -> None:
    with shared(2) as (runner, part, lanes):
        first = held(runner, lanes[0])
        second = in_thread(lambda: lanes[1].run(states(2), 0, 2))
        eventually(queued(part, 2))
        lanes[1].cancel()
        runner.gate.set()
        assert isinstance(second.exception(20), Cancelled)
        assert len(first.result(20)) == 0
        assert lanes[1].run(states(2), 0, 2).shape == (2, WIDTH)


def test_a_step_alone_is_stopped_in_the_middle_and_undone() -> None:
    with shared(2) as (runner, _, lanes):
        first = held(runner, lanes[0])
        lanes[0].cancel()
        assert isinstance(first.exception(20), Cancelled)
        runner.gate.set()
        assert runner.cached[0] == 0
        assert len(lanes[0].run(states(2), 0, 2)) == 2


def test_a_step_that_waits_too_long_is_an_error_that_says_so() -> None:
    with shared(2, patience_s=0.05) as (runner, _, lanes):
        first = held(runner, lanes[0])
        second = in_thread(lambda: lanes[1].run(states(2), 0, 2))
        for future in (first, second):  # nothing is computed as long as the gate is closed
            error = future.exception(20)
            assert isinstance(error, CapacityError)
            assert "waited" in error.message
        runner.gate.set()
        assert not runner.cached[0]
        assert not runner.cached[1]


def test_an_error_of_one_session_does_not_reach_another() -> None:
    with shared(3) as (runner, part, lanes):
        first = held(runner, lanes[0])
        later = [in_thread(lambda lane=lane: lane.run(states(1, 3), 0, 1)) for lane in lanes[1:]]
        eventually(queued(part, 3))
        runner.fails_for = {2}
        runner.gate.set()
        assert later[0].result(20).tolist() == [[3.0] * WIDTH]
        assert isinstance(later[1].exception(20), BackendError)
        assert runner.cached[2] == 0
        first.result(20)


@pytest.mark.parametrize(
    ("n_tokens", "first", "n_rows", "value", "words"),
    [
        (2, 5, 0, 1.0, "begins at 5"),
        (17, 0, 0, 1.0, "a step of 17"),
        (2, 0, 3, 1.0, "3 rows"),
        (2, 0, 1, np.nan, "nan"),
        (2, 0, 1, np.inf, "inf"),
        (2, 0, 1, 1e9, "at most"),
    ],
)
def test_a_step_that_could_do_harm_is_never_computed(
    n_tokens: int, first: int, n_rows: int, value: float, words: str
) -> None:
    with shared(2) as (runner, _, lanes):
        with pytest.raises(LinkError, match=words):
            lanes[0].run(states(n_tokens, value), first, n_rows)
        assert not runner.batches


def test_positions_have_an_end_for_each_session_and_for_all() -> None:
    with shared(2, n_ctx=20, n_cells=24) as (_, _, lanes):
        lanes[0].run(states(16), 0, 0)
        with pytest.raises(CapacityError, match="has 16 of 20"):
            lanes[0].run(states(5), 16, 0)
        with pytest.raises(CapacityError, match="16 of 24"):
            lanes[1].run(states(9), 0, 0)
        lanes[0].truncate(3)
        assert len(lanes[1].run(states(9), 0, 9)) == 9


def test_what_is_no_number_ends_in_an_error_and_an_empty_cache_for_all() -> None:
    with shared(2) as (runner, _, lanes):
        lanes[1].run(states(2), 0, 0)
        runner.spoils = True
        with pytest.raises(LinkError, match="no number"):
            lanes[0].run(states(2), 0, 2)
        runner.spoils = False
        assert runner.wiped == 1
        with pytest.raises(LinkError, match="0 positions of the session are here"):
            lanes[1].run(states(1), 2, 1)
        assert len(lanes[1].run(states(3), 0, 3)) == 3


def test_a_key_gets_no_more_than_its_share_and_gets_it_back() -> None:
    runner = FakeRunner()
    part = SharedPart(runner, SharedSizes(4, 64, 256))
    quotas = Quotas(KeyLimits(sessions=2, positions=10, tokens=8))
    lanes = [Lane(part, "greedy", quotas) for _ in range(2)]
    with pytest.raises(CapacityError, match="2 sessions of the 2"):
        Lane(part, "greedy", quotas)
    other = Lane(part, "other", quotas)
    lanes[0].run(states(6), 0, 0)
    with pytest.raises(CapacityError, match="6 positions of the 10"):
        lanes[1].run(states(5), 0, 0)
    with pytest.raises(CapacityError, match="tokens of the 8"):
        other.run(states(9), 0, 0)
    assert len(other.run(states(8), 0, 8)) == 8
    lanes[0].truncate(1)
    lanes[1].run(states(5), 0, 0)
    assert quotas.taken("greedy", "positions") == 6
    for lane in (*lanes, other):
        lane.close()
        lane.close()
    counts = [quotas.taken(k, w) for k in ("greedy", "other") for w in ("sessions", "positions")]
    assert counts == [0, 0, 0, 0]
    part.close()


def test_fewer_tokens_in_a_batch_than_sessions_are_refused() -> None:
    with pytest.raises(CapacityError, match="no room for 16 sessions"):
        SharedPart(FakeRunner(), SharedSizes(16, 64, 64))


def test_many_threads_get_what_is_theirs() -> None:
    with shared(8) as (_, part, lanes), ThreadPoolExecutor(8) as pool:

        def work(index: int) -> list[float]:
            lane, seen = lanes[index], []
            for step in range(60):
                try:
                    rows = lane.run(states(1, 100 * index + step), step, 1)
                except EdgertError as error:
                    pytest.fail(error.message)
                seen.append(float(rows[0, 0]))
            return seen

        found = list(pool.map(work, range(8)))
        assert found == [[100.0 * i + step for step in range(60)] for i in range(8)]
        assert part.sessions_per_batch >= 1
