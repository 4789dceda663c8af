"""What hosts tell each other while they run a model together: payloads of frames.

All integers are little-endian; rows of steps and results are as `edgert.hosts.hidden_states` and
`candidates` write them. Every length is checked before use. Steps and orders to a part are numbered
in one count, so that home and the host can agree on what was done last.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from edgert.errors import FormatError

Floats = NDArray[np.float32]
Buffer = bytes | memoryview

_STEP = struct.Struct("<IIIIII")
_ORDER = struct.Struct("<IIIII")
_NUMBER = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Step:
    """One pass over a part; the hidden states follow it.

    Attributes:
        number: Counts up from 1, orders too; answers carry it.
        first_position: Of the first token.
        n_tokens: Hidden states that enter.
        n_rows: Of how many of the last ones the output is wanted.
        n_candidates: Of each row of logits only so many of the likeliest; 0 for all.
        sequence: Which text; 0 where there is one only.
    """

    number: int
    first_position: int
    n_tokens: int
    n_rows: int
    n_candidates: int = 0
    sequence: int = 0

    def to_bytes(self) -> bytes:
        """Return the head of a step's payload."""
        return _STEP.pack(
            self.number, self.first_position, self.n_tokens, self.n_rows,
            self.n_candidates, self.sequence,
        )  # fmt: skip


class OrderKind(IntEnum):
    """What else a host can be told to do."""

    TRUNCATE = 1  # forget positions from `a` on
    SHIFT = 2  # forget [a, a + b) and renumber
    ABORT = 3  # give up the step numbered `a`
    ABORTED = 4  # answer to it


@dataclass(frozen=True, slots=True)
class Order:
    """Something to do between steps, or about a running one.

    Attributes:
        kind: What.
        a: See `OrderKind`.
        b: See `OrderKind`.
        sequence: Which text.
        number: In the count of steps; 0 for what concerns a step, and where none is kept.
    """

    kind: OrderKind
    a: int = 0
    b: int = 0
    sequence: int = 0
    number: int = 0

    def to_bytes(self) -> bytes:
        """Return the payload."""
        return _ORDER.pack(self.kind, self.a, self.b, self.sequence, self.number)


def read_step(payload: Buffer, most_tokens: int) -> tuple[Step, Buffer]:
    """Return a step and the bytes of its hidden states; FormatError if it is none.

    Args:
        payload: Of a STEP frame.
        most_tokens: Of one step.
    """
    if len(payload) < _STEP.size:
        raise FormatError(f"a step of {len(payload)} bytes, wanted at least {_STEP.size}")
    step = Step(*_STEP.unpack_from(payload))
    if not 1 <= step.n_tokens <= most_tokens or step.n_rows > step.n_tokens:
        raise FormatError(
            f"a step of {step.n_tokens} tokens and {step.n_rows} rows, at most {most_tokens}"
        )
    return step, memoryview(payload)[_STEP.size :]


def read_order(payload: Buffer) -> Order:
    """Return an order; FormatError if it is none."""
    if len(payload) != _ORDER.size:
        raise FormatError(f"an order of {len(payload)} bytes, wanted {_ORDER.size}")
    kind, *fields = _ORDER.unpack(payload)
    try:
        return Order(OrderKind(kind), *fields)
    except ValueError as error:
        raise FormatError(f"an order of the unknown kind {kind}") from error


def rows_bytes(rows: Floats) -> memoryview:
    """View rows as the bytes that travel, without a copy where they are contiguous."""
    return np.ascontiguousarray(rows, np.float32).data.cast("B")


def read_rows(payload: Buffer, n_rows: int, width: int) -> Floats:
    """View bytes as (n_rows, width); FormatError if they are not as many."""
    if len(payload) != 4 * n_rows * width:
        raise FormatError(f"{len(payload):,} bytes for {n_rows} x {width} values")
    return np.frombuffer(payload, "<f4").reshape(n_rows, width)


def result_bytes(number: int) -> bytes:
    """Return the head of a RESULT's payload; tagged rows follow it.

    Args:
        number: Of the step.
    """
    return _NUMBER.pack(number)


def read_result(payload: Buffer) -> tuple[int, memoryview]:
    """Return the number of the step that a RESULT answers, and what it says."""
    if len(payload) < _NUMBER.size:
        raise FormatError(f"a result of {len(payload)} bytes")
    return _NUMBER.unpack_from(payload)[0], memoryview(payload)[_NUMBER.size :]
