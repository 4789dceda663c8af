"""One part that many sessions use at once: their steps are computed together by one thread."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError, Cancelled, CapacityError, EdgertError, LinkError
from edgert.hosts.cloud.batching import Job, Room, Taken, choose
from edgert.hosts.cloud.step_checks import PiecesRunner, SharedSizes, check_room, check_step
from edgert.llama.backend import Counters

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]


@dataclass(slots=True)
class _Waiting:
    """A job that is not over."""

    job: Job
    result: Future[Floats]


class SharedPart:
    """Owns a part and the thread that computes with it.

    Args:
        runner: Owned from here on; only the thread uses it, except `cancel` and `counters`.
        sizes: As the runner was opened.

    Raises:
        CapacityError: a batch is too small for a token of each session.
    """

    def __init__(self, runner: PiecesRunner, sizes: SharedSizes) -> None:
        least = min(runner.n_batch, runner.n_logits_max)
        if least <= sizes.n_sequences:
            raise CapacityError(
                f"a batch of {least} tokens has no room for {sizes.n_sequences} sessions",
                hint=f"share the part among {least - 1} at most",
            )
        self._runner = runner
        self._sizes = sizes
        self._room = Room(runner.n_batch, runner.n_logits_max, sizes.n_beside)
        self._n_positions = dict.fromkeys(range(sizes.n_sequences), 0)
        self._free = list(range(sizes.n_sequences))
        self._waiting: dict[int, _Waiting] = {}
        self._orders: list[tuple[Callable[[], None], Future[None]]] = []
        self._running: list[Job] = []
        self._turn = 0
        self._n_batches = self._n_pieces = 0
        self._closed = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="shared-part", daemon=True)
        self._thread.start()

    @property
    def n_batch(self) -> int:
        """Most tokens of one step."""
        return self._runner.n_batch

    @property
    def to_hidden(self) -> bool:
        """Whether it puts out hidden states."""
        return self._runner.to_hidden

    @property
    def sessions_per_batch(self) -> float:
        """Sessions whose tokens were computed together, on average."""
        with self._changed:
            return self._n_pieces / max(1, self._n_batches)

    @property
    def n_taken(self) -> int:
        """Places that sessions have."""
        with self._changed:
            return self._sizes.n_sequences - len(self._free)

    @property
    def is_closed(self) -> bool:
        """Whether it was closed, or failed for good."""
        with self._changed:
            return self._closed

    def counters(self) -> Counters:
        """Return the counters of the part."""
        return self._runner.counters()

    def enter(self) -> int:
        """Return a sequence that nobody has; nothing is cached of it.

        Raises:
            CapacityError: all are taken.
        """
        with self._changed:
            if not self._free:
                raise CapacityError(
                    f"all {self._sizes.n_sequences} places of this part are taken",
                    hint="try again when a session has ended, or ask another replica",
                )
            return self._free.pop(0)

    def leave(self, sequence: int) -> None:
        """Forget a sequence, and give it back."""
        self.cancel(sequence)
        self.truncate(sequence, 0)
        with self._changed:
            self._free.append(sequence)

    def run(self, sequence: int, hidden: Floats, first_position: int, n_rows: int) -> Floats:
        """Have a step computed, and wait for it.

        Args:
            sequence: From `enter`; one step of it at a time.
            hidden: (n_tokens, n_embd).
            first_position: How many positions of the sequence are cached.
            n_rows: Of how many of the last tokens the output is wanted.

        Returns:
            (n_rows, width), the caller's own.

        Raises:
            Cancelled: `cancel` was called; what was cached before is.
            LinkError: the step does not continue what is cached here.
            CapacityError: it does not fit, or waited for too long.
            BackendError: llama.cpp failed.
        """
        job = Job(sequence, hidden, first_position, n_rows)
        with self._changed:
            self._check(job)
            job.turn = self._turn
            result: Future[Floats] = Future()
            self._waiting[sequence] = _Waiting(job, result)
            self._changed.notify_all()
        try:
            return result.result(self._sizes.patience_s)
        except TimeoutError:
            late = CapacityError(
                f"a step waited for {self._sizes.patience_s:g} s: too many sessions compute here",
                hint="try again later, or ask another replica",
            )
            self._give_up(sequence, late)
            return result.result()

    def cancel(self, sequence: int) -> None:
        """Give up the step of a sequence, if there is one; does not wait."""
        self._give_up(sequence, Cancelled("cancelled"))

    def truncate(self, sequence: int, n_positions: int) -> None:
        """Forget positions of a sequence from `n_positions` on."""

        def work() -> None:
            self._forget_from(sequence, n_positions)

        self._between(work)

    def shift(self, sequence: int, keep: int, discard: int) -> None:
        """Forget [keep, keep + discard) of a sequence and renumber; LinkError if not cached."""

        def work() -> None:
            there = self._n_positions[sequence]
            if not (keep >= 0 and discard > 0 and keep + discard <= there):
                raise LinkError(f"{keep} + {discard} positions of {there} cannot be forgotten")
            self._runner.shift(keep, discard, sequence)
            with self._changed:
                self._n_positions[sequence] = there - discard

        self._between(work)

    def n_positions(self, sequence: int) -> int:
        """Return how many positions of a sequence are cached."""
        with self._changed:
            return self._n_positions[sequence]

    def close(self) -> None:
        """End every step and free the part; calling again does nothing."""
        with self._changed:
            self._closed = True
            self._runner.cancel()
            self._changed.notify_all()
        self._thread.join()
        self._runner.close()

    def _check(self, job: Job) -> None:
        """Refuse a step before it can do harm; under the lock."""
        if self._closed or job.sequence in self._waiting:
            raise LinkError("the part is closed" if self._closed else "a step is running already")
        taken = sum(self._n_positions.values())
        taken += sum(w.job.n_left for w in self._waiting.values())
        there = self._n_positions[job.sequence]
        check_step(job, there, self._runner)
        check_room(job, there, taken, self._sizes)

    def _give_up(self, sequence: int, why: EdgertError) -> None:
        with self._changed:
            found = self._waiting.get(sequence)
            if found is None:
                return
            found.job.failure = found.job.failure or why
            if self._running == [found.job]:
                self._runner.cancel()  # with others it is computed to the end
            self._changed.notify_all()

    def _between(self, work: Callable[[], None]) -> None:
        """Have the thread do something between two computations, and wait."""
        done: Future[None] = Future()
        with self._changed:
            if self._closed:
                return
            self._orders.append((work, done))
            self._changed.notify_all()
        done.result()

    def _work(self) -> None:
        problem: Exception = LinkError("the part was closed")
        try:
            while self._one_round():
                pass
        except Exception as error:
            logger.exception("a shared part failed")
            problem = BackendError(f"the part failed: {error}")
        with self._changed:
            self._closed = True
            orders, waiting = self._orders, list(self._waiting.values())
            self._orders, self._waiting = [], {}
        for _, done in orders:
            done.set_result(None)  # there is nothing left to forget
        for item in waiting:
            item.result.set_exception(problem)

    def _one_round(self) -> bool:
        """Wait for something to do and do it; False once the part is to be closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._orders or self._waiting)
            if self._closed:
                return False
            orders, self._orders = self._orders, []
            given_up = [w for w in self._waiting.values() if w.job.failure is not None]
        for item in given_up:  # first: an order may follow a step that was given up
            self._fail(item.job, item.job.failure or Cancelled("cancelled"))
        for work, done in orders:
            try:
                work()
            except EdgertError as error:
                done.set_exception(error)
            else:
                done.set_result(None)
        with self._changed:
            jobs = [w.job for w in self._waiting.values() if w.job.failure is None]
            batch = choose(jobs, self._room)
            self._running = [taken.job for taken in batch]
        if batch:
            self._compute(batch)
        with self._changed:
            self._running = []
        return True

    def _compute(self, batch: list[Taken]) -> None:
        hidden = np.concatenate([taken.states for taken in batch])
        try:
            rows = self._runner.run_pieces(hidden, [taken.piece for taken in batch])
        except Cancelled:
            self._undo(batch)  # who was meant goes with the next round, the others go again
        except EdgertError as error:
            self._undo(batch)
            if len(batch) == 1:
                self._fail(batch[0].job, error)
                return
            logger.warning("%s; each session is tried alone", error.message)
            for taken in batch:
                if self._waits(taken.job):
                    self._compute([taken])
        else:
            if np.isfinite(rows.sum(axis=1, dtype=np.float64)).all():
                self._deliver(batch, rows)
            else:
                self._begin_anew()

    def _deliver(self, batch: list[Taken], rows: Floats) -> None:
        first = 0
        finished = []
        with self._changed:
            self._turn += 1
            self._n_batches += 1
            self._n_pieces += len(batch)
            for job, piece in ((taken.job, taken.piece) for taken in batch):
                if piece.n_rows:
                    job.rows.append(rows[first : first + piece.n_rows].copy())
                first += piece.n_rows
                job.n_done += piece.n_tokens
                job.turn = self._turn
                self._n_positions[piece.sequence] = piece.first_position + piece.n_tokens
                if not job.n_left and job.failure is None:
                    finished.append(self._waiting.pop(piece.sequence))
        for item in finished:
            parts = item.job.rows or [np.empty((0, rows.shape[1]), np.float32)]
            item.result.set_result(parts[0] if len(parts) == 1 else np.concatenate(parts))

    def _undo(self, batch: list[Taken]) -> None:
        for taken in batch:
            self._forget_from(taken.piece.sequence, taken.piece.first_position)

    def _waits(self, job: Job) -> bool:
        with self._changed:
            found = self._waiting.get(job.sequence)
            return found is not None and found.job is job

    def _fail(self, job: Job, why: EdgertError) -> None:
        """End a step as if it had not begun."""
        self._forget_from(job.sequence, job.first_position)
        with self._changed:
            item = self._waiting.pop(job.sequence)
        item.result.set_exception(why)

    def _forget_from(self, sequence: int, n_positions: int) -> None:
        self._runner.truncate(n_positions, sequence)
        with self._changed:
            there = self._n_positions[sequence]
            self._n_positions[sequence] = min(there, n_positions)

    def _begin_anew(self) -> None:
        """Forget all: what is no number in one sequence's cache spoils the sums of others."""
        logger.error("a part put out what is no number; every session of it begins anew")
        self._runner.wipe()
        with self._changed:
            self._n_positions = dict.fromkeys(self._n_positions, 0)
            items = list(self._waiting.values())
            self._waiting.clear()
        for item in items:
            item.result.set_exception(
                LinkError("the part put out what is no number", hint="send the text again")
            )
