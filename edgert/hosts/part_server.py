"""A host's side of a model that several run: takes steps from a link, runs its part, answers."""

from __future__ import annotations

import math
import time

import numpy as np
from numpy.typing import NDArray

from edgert.errors import Cancelled, EdgertError, FormatError, LinkError
from edgert.hosts.candidates import pack_logits
from edgert.hosts.frames import FrameKind
from edgert.hosts.hidden_states import RowsKind, read_hidden, tag, write_hidden
from edgert.hosts.link import Link
from edgert.hosts.remote_part import PLAIN, Codecs
from edgert.hosts.steps import (
    Order,
    OrderKind,
    Step,
    read_order,
    read_step,
    result_bytes,
)
from edgert.llama.part import PartRunner

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

    Attributes:
        n_steps: Steps so far.
        n_tokens: Tokens of them.
        busy_s: Seconds in them.
        is_busy: Whether one is running.
        last_s: When the last one ended, a time of `time.monotonic`.
    """

    def __init__(
        self,
        runner: PartRunner,
        link: Link,
        n_embd: int,
        *,
        answers: bool,
        codecs: Codecs = PLAIN,
    ) -> None:
        self._runner = runner
        self._link = link
        self._n_embd = n_embd
        self._answers = answers
        self._codecs = codecs
        self.n_steps = self.n_tokens = 0
        self.busy_s = 0.0
        self.is_busy = False
        self.last_s = time.monotonic()

    def serve(self) -> None:
        """Run until home says goodbye.

        Raises:
            LinkError: home is gone, or said something that makes no sense.
            EdgertError: the part failed; home has been told.
        """
        try:
            while self._serve_one():
                pass
        except LinkError:
            raise
        except EdgertError as error:
            self._link.fail(error)
            raise

    def _serve_one(self) -> bool:
        frame = self._link.receive(math.inf)
        match frame.kind:
            case FrameKind.STEP:
                step, data = read_step(frame.payload, self._runner.n_batch)
                # The view ends with the next frame, and sums arrive while the step runs.
                hidden = read_hidden(data, step.n_tokens, self._n_embd, self._codecs.there).copy()
                self._run(step, hidden)
            case FrameKind.CONTROL:
                self._obey(read_order(frame.payload))
            case FrameKind.BYE:
                return False
            case _:
                raise FormatError(f"{self._link.peer} sent {frame.kind.name} between steps")
        return True

    def _run(self, step: Step, hidden: Floats) -> None:
        started_s = time.perf_counter()
        self.is_busy = True
        try:
            found = self._runner.run(hidden, step.first_position, step.n_rows)
        except Cancelled:
            self._runner.truncate(step.first_position)
            self._link.send(FrameKind.CONTROL, Order(OrderKind.ABORTED, step.number).to_bytes())
            return
        finally:
            self.is_busy, self.last_s = False, time.monotonic()
            self.busy_s += time.perf_counter() - started_s
            self.n_steps += 1
            self.n_tokens += step.n_tokens
        if not self._answers:
            return
        rows: tuple[bytes, bytes | memoryview]
        if self._runner.to_hidden:
            rows = write_hidden(found, self._codecs.back)
        else:
            rows = tag(RowsKind.LOGITS), pack_logits(found, step.n_candidates)
        self._link.send(FrameKind.RESULT, result_bytes(step.number), *rows)

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
