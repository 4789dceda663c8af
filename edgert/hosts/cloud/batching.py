"""Which waiting steps are computed together. No threads, no model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from edgert.errors import EdgertError
from edgert.llama.context import Piece

Floats = NDArray[np.float32]


@dataclass(eq=False, slots=True)
class Job:
    """A step of one session, which may be computed in several pieces.

    Attributes:
        sequence: The session's.
        hidden: (n_tokens, n_embd) states that enter.
        first_position: Of the first of them.
        n_rows: Of how many of the last ones the output is wanted.
        turn: When the session was served last; the lowest goes first.
        n_done: Tokens that are computed.
        rows: Their output so far.
        failure: Why it is given up.
    """

    sequence: int
    hidden: Floats
    first_position: int
    n_rows: int
    turn: int = 0
    n_done: int = 0
    rows: list[Floats] = field(default_factory=list)
    failure: EdgertError | None = None

    @property
    def n_left(self) -> int:
        """Tokens still to compute."""
        return len(self.hidden) - self.n_done

    def piece(self, n_tokens: int) -> Piece:
        """Return its next tokens."""
        end = self.n_done + n_tokens
        first_row = len(self.hidden) - self.n_rows
        n_rows = max(0, end - max(self.n_done, first_row))
        return Piece(self.sequence, self.first_position + self.n_done, n_tokens, n_rows)

    def fitting(self, n_tokens: int, n_rows: int) -> int:
        """Return how many of its next tokens fit into room for so many tokens and rows."""
        end = min(len(self.hidden), self.n_done + n_tokens)
        first_row = len(self.hidden) - self.n_rows
        return max(0, min(end, max(self.n_done, first_row) + n_rows) - self.n_done)


@dataclass(frozen=True, slots=True)
class Room:
    """What one computation may hold.

    Attributes:
        n_tokens: In all.
        n_rows: Outputs in all.
        n_beside: Tokens of prompts while others wait for a single token, which a long computation
            would hold up.
    """

    n_tokens: int
    n_rows: int
    n_beside: int


@dataclass(frozen=True, slots=True)
class Taken:
    """A piece of a job."""

    job: Job
    piece: Piece

    @property
    def states(self) -> Floats:
        """The hidden states of the piece."""
        return self.job.hidden[self.job.n_done : self.job.n_done + self.piece.n_tokens]


def choose(waiting: Sequence[Job], room: Room) -> list[Taken]:
    """Take a token of each session that decodes, then of prompts what fits.

    Whoever was served longest ago goes first, so that nobody starves.

    Args:
        waiting: One of each session at most.
        room: At least as many tokens and rows as there are sessions, and one more.
    """
    in_turn = sorted(waiting, key=lambda job: job.turn)
    taken: list[Taken] = []
    n_tokens, n_rows = room.n_tokens, room.n_rows
    for job in [job for job in in_turn if job.n_left == 1]:
        if job.fitting(n_tokens, n_rows):
            taken.append(Taken(job, job.piece(1)))
            n_tokens, n_rows = n_tokens - 1, n_rows - taken[-1].piece.n_rows
    left = min(n_tokens, room.n_beside) if taken else n_tokens
    for job in [job for job in in_turn if job.n_left > 1]:
        fits = job.fitting(left, n_rows)
        if fits:
            taken.append(Taken(job, job.piece(fits)))
            left, n_rows = left - fits, n_rows - taken[-1].piece.n_rows
    return taken
