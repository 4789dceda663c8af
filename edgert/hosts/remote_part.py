"""Home's side of a part that another host runs: steps and orders there, results back."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgert.errors import Cancelled, FormatError, LinkError
from edgert.hosts.candidates import unpack_logits
from edgert.hosts.frames import FrameKind
from edgert.hosts.hidden_states import F32, RowsKind, read_hidden, read_tag, write_hidden
from edgert.hosts.link import Link
from edgert.hosts.steps import (
    Order,
    OrderKind,
    Step,
    read_order,
    read_result,
)
from quant.activations.settings import CodecSettings

Floats = NDArray[np.float32]
Buffer = bytes | memoryview


@dataclass(frozen=True, slots=True)
class Codecs:
    """How hidden states travel to a part, and from it."""

    there: CodecSettings = F32
    back: CodecSettings = F32


PLAIN = Codecs()


class RemotePart:
    """A part behind a link.

    Args:
        link: To its host.
        width: Of a row that it answers with: `n_embd`, or its part of the vocabulary.
        to_hidden: Whether it ends with hidden states.
        codecs: Of its links.
    """

    def __init__(self, link: Link, width: int, *, to_hidden: bool, codecs: Codecs = PLAIN) -> None:
        self.link = link
        self.width = width
        self.to_hidden = to_hidden
        self.codecs = codecs

    def start(self, step: Step, hidden: Floats) -> None:
        """Have the part run a step; LinkError if its host is gone."""
        self.send(step, *write_hidden(hidden, self.codecs.there))

    def send(self, step: Step, *rows: Buffer) -> None:
        """Have the part run a step whose hidden states are written already; raises as `start`."""
        self.link.send(FrameKind.STEP, step.to_bytes(), *rows)

    def finish(self, step: Step, out: Floats) -> None:
        """Wait for what the part puts out.

        Args:
            step: As given to `start`.
            out: (n_rows, width), filled.

        Raises:
            LinkError: the host is gone or reports an error, or answers something else.
            Cancelled: the step was given up.
        """
        frame = self.link.receive()
        while frame.kind is FrameKind.CONTROL:
            self._check_aborted(frame.payload, step.number)
            frame = self.link.receive()
        if frame.kind is not FrameKind.RESULT:
            raise self._nonsense(f"{frame.kind.name} where a result was awaited")
        try:
            number, payload = read_result(frame.payload)
        except FormatError as error:
            raise self._nonsense(error.message) from error
        if number != step.number:
            raise self._nonsense(f"the result of step {number}, wanted that of {step.number}")
        try:
            if self.to_hidden:
                out[...] = read_hidden(payload, step.n_rows, self.width, self.codecs.back)
            else:
                unpack_logits(_logits(payload), step.n_rows, out)
        except FormatError as error:
            raise self._nonsense(error.message) from error

    def order(self, order: Order) -> None:
        """Have the part do something between steps."""
        self.link.send(FrameKind.CONTROL, order.to_bytes())

    def ask_to_abort(self, number: int) -> None:
        """Give a step up that another thread waits for; that one hears of it."""
        self.order(Order(OrderKind.ABORT, number))

    def abort(self, number: int) -> None:
        """Give a step up, and wait until its host has; LinkError if the host is gone."""
        self.order(Order(OrderKind.ABORT, number))
        while True:
            frame = self.link.receive()
            if frame.kind is FrameKind.CONTROL:
                answer = read_order(frame.payload)
                if answer.kind is OrderKind.ABORTED and answer.a == number:
                    return

    def _check_aborted(self, payload: memoryview, number: int) -> None:
        """Raise Cancelled for a step that was given up; pass over one that was done before."""
        try:
            answer = read_order(payload)
        except FormatError as error:
            raise self._nonsense(error.message) from error
        if answer.kind is not OrderKind.ABORTED or answer.a > number:
            raise self._nonsense(f"the order {answer.kind.name} where a result was awaited")
        if answer.a == number:
            raise Cancelled("the step was given up")

    def _nonsense(self, message: str) -> LinkError:
        error = LinkError(f"{self.link.peer}: sent {message}")
        self.link.fail(error)
        return error

    def close(self) -> None:
        """Say goodbye to its host."""
        self.link.close()


def _logits(payload: memoryview) -> memoryview:
    kind, body = read_tag(payload)
    if kind is not RowsKind.LOGITS:
        raise FormatError(f"rows as {kind.name.lower()}, wanted logits")
    return body


def abort_all(parts: list[RemotePart], number: int) -> None:
    """Give a step up everywhere; hosts that are gone are passed over."""
    for part in parts:
        with suppress(LinkError):
            part.abort(number)
