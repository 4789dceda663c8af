"""A host's side of a model that several run: takes steps from a link, runs its part, answers."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
from numpy.typing import NDArray

from edgert.errors import Cancelled, EdgertError, FormatError, LinkError
from edgert.hosts.candidates import pack_logits
from edgert.hosts.frames import FrameKind
from edgert.hosts.hidden_states import RowsKind, read_hidden, tag, write_hidden
from edgert.hosts.inbox import Inbox
from edgert.hosts.link import Frame, Link
from edgert.hosts.remote_part import PLAIN, Codecs
from edgert.hosts.runner import Runner
from edgert.hosts.steps import (
    Order,
    OrderKind,
    Step,
    read_order,
    read_step,
    result_bytes,
)

Floats = NDArray[np.float32]


class PartServer:
    """Serves one part to one home, a step at a time.

    Args:
        runner: The part; stays the caller's.
        link: From home. A step that fails there without harm to the part is given up by an order.
        n_embd: Width of hidden states.
        answers: Whether home waits for what the part puts out; hosts that share layers and have
            no part of the head have nothing to say.
        codecs: Of hidden states on the link.
        listens: Whether to receive while a step runs; not where steps receive sums themselves.

    Attributes:
        n_done: The number of the last step or order that was done; one that an earlier server of
            the part has reached may be put in.
        n_steps: Steps so far.
        n_tokens: Tokens of them.
        busy_s: Seconds in them.
        is_busy: Whether one is running.
        last_s: When the last one ended, a time of `time.monotonic`.
    """

    def __init__(
        self,
        runner: Runner,
        link: Link,
        n_embd: int,
        *,
        answers: bool,
        codecs: Codecs = PLAIN,
        listens: bool = False,
    ) -> None:
        self._runner = runner
        self._link = link
        self._n_embd = n_embd
        self._answers = answers
        self._codecs = codecs
        self._listens = listens
        self._lock = threading.Lock()
        self._running: int | None = None
        self._stopped: int | None = None
        self.n_done = self.n_steps = self.n_tokens = 0
        self.busy_s = 0.0
        self.is_busy = False
        self.last_s = time.monotonic()

    def serve(self) -> None:
        """Run until home says goodbye.

        Raises:
            LinkError: home is gone, or said something that makes no sense.
            EdgertError: the part failed; home has been told.
        """
        inbox = Inbox(self._link, self._heard) if self._listens else None
        receive = self._receive if inbox is None else inbox.receive
        try:
            while self._serve_one(receive()):
                pass
        except LinkError:
            raise
        except EdgertError as error:
            self._link.fail(error)
            raise
        finally:
            if inbox is not None:
                inbox.close()

    def _receive(self) -> Frame:
        return self._link.receive(math.inf)

    def _heard(self, found: Frame | LinkError) -> None:
        """Stop the step that runs when home gives it up, or is gone."""
        with self._lock:
            number = self._running
            if number is not None and _ends(found, number):
                self._stopped = number
                self._runner.cancel()

    def _serve_one(self, frame: Frame) -> bool:
        match frame.kind:
            case FrameKind.STEP:
                step, data = read_step(frame.payload, self._runner.n_batch)
                hidden = read_hidden(data, step.n_tokens, self._n_embd, self._codecs.there)
                # The view ends with the next frame, and sums arrive while the step runs.
                self._run(step, hidden if self._listens else hidden.copy())
            case FrameKind.CONTROL:
                self._obey(read_order(frame.payload))
            case FrameKind.BYE:
                return False
            case _:
                raise FormatError(f"{self._link.peer} sent {frame.kind.name} between steps")
        return True

    def _run(self, step: Step, hidden: Floats) -> None:
        started_s = time.perf_counter()
        with self._lock:
            self._running = step.number
        self.is_busy = True
        try:
            found = self._compute(step, hidden)
        except Cancelled:
            self._runner.truncate(step.first_position)
            self._link.send(FrameKind.CONTROL, Order(OrderKind.ABORTED, step.number).to_bytes())
            return
        finally:
            with self._lock:
                self._running = None
            self.is_busy, self.last_s = False, time.monotonic()
            self.busy_s += time.perf_counter() - started_s
            self.n_steps += 1
            self.n_tokens += step.n_tokens
        self.n_done = step.number
        if not self._answers:
            return
        rows: tuple[bytes, bytes | memoryview]
        if self._runner.to_hidden:
            rows = write_hidden(found, self._codecs.back)
        else:
            rows = tag(RowsKind.LOGITS), pack_logits(found, step.n_candidates)
        self._link.send(FrameKind.RESULT, result_bytes(step.number), *rows)

    def _compute(self, step: Step, hidden: Floats) -> Floats:
        """Run a step; what ends with hidden states computes all, and returns what is wanted."""
        n_all = step.n_tokens if self._runner.to_hidden and self._answers else step.n_rows
        try:
            found = self._runner.run(hidden, step.first_position, n_all)
        except Cancelled:
            if not self._listens or self._stopped == step.number:
                raise
            # Of the step before, which was done before it could be stopped.
            self._runner.truncate(step.first_position)
            found = self._runner.run(hidden, step.first_position, n_all)
        return found[len(found) - step.n_rows :] if n_all != step.n_rows else found

    def _obey(self, order: Order) -> None:
        match order.kind:
            case OrderKind.TRUNCATE:
                self._runner.truncate(order.a)
            case OrderKind.SHIFT:
                self._runner.shift(order.a, order.b)
            case OrderKind.ABORT:  # of a step that was done already
                self._link.send(FrameKind.CONTROL, Order(OrderKind.ABORTED, order.a).to_bytes())
            case OrderKind.ABORTED:
                raise FormatError(f"{self._link.peer} gave up a step that nobody asked for")
        self.n_done = order.number or self.n_done


def _ends(found: Frame | LinkError, number: int) -> bool:
    """Whether a frame, or the end of a link, means that a step is wanted no more."""
    if isinstance(found, LinkError) or found.kind is FrameKind.BYE:
        return True
    if found.kind is not FrameKind.CONTROL:
        return False
    try:
        order = read_order(found.payload)
    except FormatError:  # whoever takes the frame says so
        return False
    return order.kind is OrderKind.ABORT and order.a == number
