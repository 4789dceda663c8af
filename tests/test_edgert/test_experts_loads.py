"""Loads: claimed once, abandoned before they begin, urged past others; errors reach waiters."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from edgert.errors import Cancelled, FormatError
from edgert.experts.loads import Load, Loader, abandon


class Stopped:
    """A reader that only knows whether it was stopped."""

    stopped = False

    def stop(self) -> None:
        self.stopped = True


class Gate:
    """Runs loads one at a time, each when it is let through."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.changed = threading.Condition()
        self.let = 0

    def run(self, load: Load, number: int) -> None:
        del number
        with self.changed:
            self.begun.append(load.expert)
            self.changed.notify_all()
            self.changed.wait_for(lambda: self.let > 0)
            self.let -= 1
        if load.expert == 9:
            raise FormatError("cannot be read", path="model.gguf")

    def wait_for(self, n_begun: int) -> None:
        with self.changed:
            self.changed.wait_for(lambda: len(self.begun) >= n_begun)

    def open(self, n: int) -> None:
        with self.changed:
            self.let += n
            self.changed.notify_all()


@contextmanager
def loader(gate: Gate, n_urgent: int = 1, n_early: int = 1) -> Iterator[Loader]:
    made = Loader(Stopped(), gate.run, n_urgent, n_early)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        gate.open(1000)
        made.close()


def load(expert: int, *, early: bool = False) -> Load:
    return Load(0, expert, 0, early=early)


def test_load_is_claimed_once_and_waits_until_it_ended() -> None:
    one = load(1)
    assert (one.claim(), one.claim(), one.done) == (True, False, False)
    one.finish(None)
    assert one.done
    assert one.wait() == 0.0


def test_waiter_hears_of_the_end_and_of_the_error() -> None:
    gate = Gate()
    with loader(gate) as made:
        good, bad = load(1), load(9)
        made.submit(good)
        made.submit(bad)
        gate.open(2)
        good.wait()
        bad.wait()
    assert good.error is None
    assert isinstance(bad.error, FormatError)


def test_abandoned_load_never_runs_and_one_that_began_goes_on() -> None:
    gate = Gate()
    with loader(gate) as made:
        running, waiting = load(1, early=True), load(2, early=True)
        made.submit(running)
        made.submit(waiting)
        gate.wait_for(1)
        assert not abandon(running)
        assert abandon(waiting)
        assert not abandon(waiting)
        assert isinstance(waiting.error, Cancelled)
        gate.open(1)
        running.wait()
    assert gate.begun == [1]
    assert running.error is None


def test_urged_load_passes_the_early_ones_and_runs_once() -> None:
    gate = Gate()
    with loader(gate) as made:
        first, second, third = (load(expert, early=True) for expert in (1, 2, 3))
        for one in (first, second, third):
            made.submit(one)
        gate.wait_for(1)  # the only early thread is busy with the first
        made.urge(third)
        gate.wait_for(2)
        assert gate.begun == [1, 3]
        made.urge(third)
        made.urge(first)
        gate.open(3)
        for one in (first, second, third):
            one.wait()
    assert gate.begun == [1, 3, 2]


def test_closing_stops_the_reader_and_ends_every_thread() -> None:
    reader, gate = Stopped(), Gate()
    made = Loader(reader, gate.run, 2, 2)  # type: ignore[arg-type]
    made.close()
    assert reader.stopped
    assert not [t for t in threading.enumerate() if t.name.startswith("edgert-experts")]


@pytest.mark.parametrize("early", [False, True])
def test_submitted_load_runs(early: bool) -> None:
    gate = Gate()
    with loader(gate) as made:
        one = load(4, early=early)
        made.submit(one)
        gate.open(1)
        one.wait()
    assert gate.begun == [4]
