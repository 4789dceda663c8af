"""A part on another host that outlives its link: attached to again, or filled anew elsewhere.

Home keeps the hidden states that it sent, as they were written. When the link fails, home attaches
to the session again and both agree on what was done last; where the session is lost, another one
is opened and given everything once more, in batches.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.errors import Cancelled, LinkError, LinkTimeout
from edgert.events import Listener, Notice, ignore
from edgert.hosts.hidden_states import write_hidden
from edgert.hosts.history import History
from edgert.hosts.link import Link
from edgert.hosts.remote_part import RemotePart
from edgert.hosts.steps import Order, OrderKind, Step

logger = logging.getLogger(__name__)

Floats = NDArray[np.float32]

# Seconds before each attempt to get a link again.
WAITS_S = (0.0, 0.25, 0.5, 1.0)
_MOST_TRIES = 3  # of one step: who fails it each time does not lack a link


class Reach(Protocol):
    """How to get to a part again."""

    def resume(self) -> tuple[Link, int]:
        """Attach to the session again; return what was done there last. LinkError if it is gone."""

    def renew(self) -> Link:
        """Attach to a new session, whose KV cache is empty; LinkError if there is none."""


class LastingPart:
    """See `RemotePart`; one thread runs steps and orders, another one may stop them.

    Args:
        part: Attached, with an empty KV cache.
        n_embd: Width of what enters.
        n_batch: Most tokens of a step.
        reach: How to get there again; None where a link that failed is the end.
        waits_s: Seconds before each attempt.
        listener: Hears that a link was lost and found.
    """

    def __init__(
        self,
        part: RemotePart,
        n_embd: int,
        n_batch: int,
        reach: Reach | None = None,
        waits_s: Sequence[float] = WAITS_S,
        listener: Listener = ignore,
    ) -> None:
        self.width = part.width
        self.to_hidden = part.to_hidden
        self._part = part
        self._n_batch = n_batch
        self._reach = reach
        self._waits_s = waits_s
        self._listener = listener
        self._history = History(n_embd, part.codecs.there)
        self._pending: list[Order] = []  # sent, and no step after them is known to be done
        self._number = self._n_acked = 0
        self._in_flight: int | None = None
        self._failure: LinkError | None = None
        self._stopped = threading.Event()
        self._is_whole = True  # the other host's cache has all of the history
        self._past = [0, 0]

    @property
    def peer(self) -> str:
        """The host's name, for people."""
        return self._part.link.peer

    @property
    def kept_bytes(self) -> int:
        """What home keeps to fill the part's cache anew."""
        return self._history.n_bytes

    def traffic(self) -> tuple[int, int]:
        """Return bytes sent and received so far, over all its links."""
        link = self._part.link
        return self._past[0] + link.sent_bytes, self._past[1] + link.received_bytes

    def run(self, hidden: Floats, position: int, n_rows: int, n_candidates: int) -> Floats:
        """Run a step; see `PartRunner.run` and `Route.run`.

        Raises:
            LinkError: the host is gone, and was not to be had again.
            Cancelled: `stop` was called.
        """
        self._stopped.clear()
        message = b"".join(write_hidden(hidden, self._part.codecs.there))
        failure, out = self._failure, None
        for _ in range(_MOST_TRIES):
            if failure is not None:
                self._mend(failure)
            try:
                step = Step(self._next(), position, len(hidden), n_rows, n_candidates)
                out = self._attempt(step, message)
                break
            except LinkError as error:
                failure = self._failure = error
        if out is None:
            raise failure or LinkError(f"{self.peer}: does not answer")
        if self._reach is not None:
            self._history.add(position, len(hidden), message)
        return out

    def order(self, order: Order) -> None:
        """Have the part do something between steps, now or once there is a link again."""
        if order.kind is OrderKind.TRUNCATE:
            self._history.truncate(order.a)
        elif order.kind is OrderKind.SHIFT:
            self._history.shift(order.a, order.b)
        numbered = replace(order, number=self._next())
        self._pending.append(numbered)
        if self._failure is None:
            self._say(numbered)

    def stop(self) -> None:
        """Make a running `run` raise Cancelled; callable from any thread that may wait."""
        self._stopped.set()
        number = self._in_flight
        if number is not None:
            try:
                self._part.ask_to_abort(number)
            except LinkError as error:
                logger.debug("%s", error)  # whoever waits for the step hears it

    def close(self) -> None:
        """Say goodbye to its host."""
        self._stopped.set()
        self._part.close()

    def _next(self) -> int:
        self._number += 1
        return self._number

    def _attempt(self, step: Step, message: bytes) -> Floats:
        out = np.empty((step.n_rows, self.width), np.float32)
        self._in_flight = step.number
        try:
            if self._stopped.is_set():
                raise Cancelled("the step was given up")
            self._part.send(step, message)
            self._part.finish(step, out)
        finally:
            self._in_flight = None
        self._n_acked = step.number
        self._pending.clear()
        return out

    def _say(self, order: Order) -> None:
        try:
            self._part.order(order)
        except LinkError as error:
            self._failure = error  # the next step mends it, or raises

    def _mend(self, cause: LinkError) -> None:
        """Get a link again and bring the part to where it was.

        Raises:
            LinkError: the cause, where that is not possible.
        """
        if self._reach is None:
            raise cause
        self._part.close()
        for wait_s in self._waits_s:
            if self._stopped.wait(wait_s):
                raise Cancelled("the step was given up")
            for way in (self._resumed, self._rebuilt):
                try:
                    what = way(self._reach)
                except LinkTimeout as error:  # it takes no link, and would not so soon
                    raise cause from error
                except LinkError as error:
                    logger.debug("%s", error)
                    continue
                self._failure = None
                self._listener(Notice(f"{cause.message}; {what}"))
                return
        raise cause

    def _resumed(self, reach: Reach) -> str:
        if not self._is_whole:
            raise LinkError(f"{self.peer}: its cache is not filled yet")
        link, n_done = reach.resume()
        self._take(link)
        if not self._n_acked <= n_done <= self._number:
            raise self._refused(f"did {n_done} last, home knows of {self._n_acked}")
        for order in self._pending:
            if order.number > n_done:
                self._part.order(order)
        # What is left of a step that was not done, or whose result was lost.
        self._part.order(Order(OrderKind.TRUNCATE, self._history.n_positions, 0, 0, self._next()))
        return "attached again"

    def _rebuilt(self, reach: Reach) -> str:
        link = reach.renew()
        self._take(link)
        self._pending.clear()
        self._number = self._n_acked = 0
        self._is_whole = False
        before = self.traffic()[0]
        for piece in self._history.batches(self._n_batch):
            step = Step(self._next(), piece.first_position, piece.n_tokens, 0)
            self._attempt(step, piece.message)
        self._is_whole = True
        sent = self.traffic()[0] - before
        return f"filled its cache anew, {self._history.n_positions} tokens in {sent:,} bytes"

    def _take(self, link: Link) -> None:
        """Go on over another link; what went over the old one stays counted."""
        part = self._part
        part.close()
        self._past[0] += part.link.sent_bytes
        self._past[1] += part.link.received_bytes
        self._part = RemotePart(link, part.width, to_hidden=part.to_hidden, codecs=part.codecs)

    def _refused(self, what: str) -> LinkError:
        error = LinkError(f"{self.peer}: {what}")
        self._part.link.fail(error)
        return error
