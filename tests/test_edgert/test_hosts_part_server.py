"""A host that computes a step hears at once that it is wanted no more."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.errors import Cancelled, FormatError, LinkError
from edgert.hosts.frames import FrameKind
from edgert.hosts.memory_link import memory_pair
from edgert.hosts.part_server import PartServer
from edgert.hosts.remote_part import RemotePart
from edgert.hosts.steps import Order, OrderKind, Step
from host_identities import in_thread

Floats = NDArray[np.float32]
ROWS = np.ones((2, 64), np.float32)


class SlowRunner:
    """A part that computes until it is cancelled, or as long as a test lets it."""

    to_hidden = True
    n_batch = 16

    def __init__(self) -> None:
        self.begun = threading.Event()
        self.go_on = threading.Event()
        self.is_cancelled = False
        self.kept: list[int] = []

    def run(self, hidden: Floats, first_position: int, n_rows: int) -> Floats:
        del first_position
        self.begun.set()
        assert self.go_on.wait(10)
        self.go_on.clear()
        if self.is_cancelled:
            self.is_cancelled = False
            raise Cancelled("cancelled")
        return hidden[:n_rows] * 2

    def cancel(self) -> None:
        self.is_cancelled = True
        self.go_on.set()

    def truncate(self, n_positions: int) -> None:
        self.kept.append(n_positions)


def served(runner: SlowRunner) -> tuple[RemotePart, PartServer, Future[None]]:
    home, host = memory_pair(("home", "board"))
    server = PartServer(runner, host, 64, answers=True, listens=True)  # type: ignore[arg-type]
    return RemotePart(home, 64, to_hidden=True), server, in_thread(server.serve)


def test_an_abort_ends_a_step_that_is_being_computed() -> None:
    runner = SlowRunner()
    part, server, ended = served(runner)
    step, out = Step(1, 7, 2, 2), np.empty((2, 64), np.float32)
    part.start(step, ROWS)
    assert runner.begun.wait(10)
    part.ask_to_abort(1)
    with pytest.raises(Cancelled):
        part.finish(step, out)
    assert runner.kept == [7]
    assert server.n_done == 0
    runner.go_on.set()
    part.start(Step(2, 7, 2, 2), ROWS)
    part.finish(Step(2, 7, 2, 2), out)
    assert out.tolist() == (2 * ROWS).tolist()
    assert server.n_done == 2
    part.close()
    ended.result(10)


def test_an_abort_that_comes_too_late_harms_no_later_step() -> None:
    runner = SlowRunner()
    part, _, ended = served(runner)
    out = np.empty((2, 64), np.float32)
    for number in (1, 2):
        step = Step(number, 7, 2, 2)
        part.start(step, ROWS)
        runner.go_on.set()
        part.finish(step, out)
        part.ask_to_abort(number)
    part.start(Step(3, 9, 2, 1), ROWS)
    runner.go_on.set()
    part.finish(Step(3, 9, 2, 1), out[:1])
    part.close()
    ended.result(10)


def test_a_link_that_ends_stops_the_step_that_it_brought() -> None:
    runner = SlowRunner()
    part, server, ended = served(runner)
    part.start(Step(1, 3, 2, 2), ROWS)
    assert runner.begun.wait(10)
    part.link.fail(LinkError("home stops"))
    with pytest.raises(LinkError):
        ended.result(10)
    assert runner.kept == [3]
    assert server.n_done == 0


def test_orders_count_as_done() -> None:
    runner = SlowRunner()
    part, server, ended = served(runner)
    part.order(Order(OrderKind.TRUNCATE, 5, number=4))
    part.link.send(FrameKind.BYE)
    ended.result(10)
    assert (runner.kept, server.n_done) == ([5], 4)


def test_a_home_that_sends_on_after_nonsense_leaves_no_thread_behind() -> None:
    runner = SlowRunner()
    home, host = memory_pair(("home", "board"))
    server = PartServer(runner, host, 64, answers=True, listens=True)  # type: ignore[arg-type]
    before = set(threading.enumerate())
    part = RemotePart(home, 64, to_hidden=True)
    part.start(Step(1, 0, 2, 2), ROWS)
    ended = in_thread(server.serve)
    assert runner.begun.wait(10)
    home.send(FrameKind.TENSOR, b"")
    for _ in range(30):
        part.order(Order(OrderKind.TRUNCATE, 0))
    runner.go_on.set()
    assert isinstance(ended.exception(10), FormatError)
    host.close()
    for thread in [t for t in threading.enumerate() if t not in before and t.name == "inbox"]:
        thread.join(10)
        assert not thread.is_alive()
