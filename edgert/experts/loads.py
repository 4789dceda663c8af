"""Brings experts from flash: what is needed now before what may be needed soon."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

from edgert.errors import Cancelled
from edgert.observer import UNOBSERVED, ReadWatch
from edgert.weights.flash import FlashReader

# Few, so that the first stack of a layer arrives first and is computed while the others are read;
# with six at once all of them arrived late. Two requests of a MB keep flash busy.
N_URGENT = 2
# Requests already with the device cannot be overtaken, so few that may turn out useless are.
N_EARLY = 1


class Load:
    """One expert of one stack on its way into a slot.

    Args:
        stack: Index of the stack.
        expert: Which of its experts.
        slot: Where it goes.
        early: Whether nothing has asked for it yet.
        watch: Told when its read begins and ends.
    """

    __slots__ = ("_claim", "_done", "early", "error", "expert", "slot", "stack", "watch")

    def __init__(
        self, stack: int, expert: int, slot: int, *, early: bool, watch: ReadWatch = UNOBSERVED
    ) -> None:
        self.stack = stack
        self.expert = expert
        self.slot = slot
        self.early = early
        self.watch = watch
        self.error: Exception | None = None
        self._claim = threading.Lock()
        self._done = threading.Lock()
        self._done.acquire()

    def claim(self) -> bool:
        """Take the load for oneself, to run it or so that it never runs; once only."""
        return self._claim.acquire(blocking=False)

    @property
    def done(self) -> bool:
        """Whether it ended, well or not."""
        return not self._done.locked()

    def finish(self, error: Exception | None) -> None:
        """Say that it ended; called once, by who claimed it."""
        self.error = error
        self._done.release()

    def wait(self) -> float:
        """Wait until it ended; return the seconds that took."""
        if self.done:
            return 0.0
        started_s = time.perf_counter()
        self._done.acquire()
        self._done.release()
        return time.perf_counter() - started_s


class Loader:
    """Threads that run loads.

    Args:
        reader: Whose observer hears of reads.
        run: Brings one load's bytes to its slot; gets the load and the number of the thread. Any
            exception it raises becomes the load's error.
        n_urgent: Threads for what is needed now.
        n_early: Threads for what may be needed.
    """

    def __init__(
        self,
        reader: FlashReader,
        run: Callable[[Load, int], None],
        n_urgent: int = N_URGENT,
        n_early: int = N_EARLY,
    ) -> None:
        self._reader = reader
        self._run = run
        self._urgent: SimpleQueue[Load | None] = SimpleQueue()
        self._early: SimpleQueue[Load | None] = SimpleQueue()
        self._queues = [self._urgent] * n_urgent + [self._early] * n_early
        self._threads = [
            threading.Thread(
                target=self._serve, args=(queue, i), name=f"edgert-experts-{i}", daemon=True
            )
            for i, queue in enumerate(self._queues)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, load: Load) -> None:
        """Start a load as soon as its turn comes."""
        (self._early if load.early else self._urgent).put(load)

    def urge(self, load: Load) -> None:
        """Make an early load urgent; one that runs already just goes on."""
        if load.early:
            load.early = False
            if not load.done:
                self._urgent.put(load)

    def close(self) -> None:
        """Let loads that have not begun fail, wait for the others."""
        self._reader.stop()
        for queue in self._queues:
            queue.put(None)
        for thread in self._threads:
            thread.join()

    def _serve(self, queue: SimpleQueue[Load | None], number: int) -> None:
        while (load := queue.get()) is not None:
            if load.claim():
                error: Exception | None = None
                try:
                    load.watch.began()
                    self._run(load, number)
                    load.watch.ended()
                except Exception as failure:  # noqa: BLE001  the top of a thread; waiters raise it
                    error = failure
                load.finish(error)


def abandon(load: Load) -> bool:
    """Make sure that a load which has not begun never does; say whether that was so."""
    if not load.claim():
        return False
    load.finish(Cancelled("not needed any more"))
    return True
