"""What a shared part takes: its sizes, and steps that cannot harm other sessions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.errors import CapacityError, LinkError
from edgert.hosts.cloud.batching import Job
from edgert.llama.backend import Counters
from edgert.llama.context import Piece

Floats = NDArray[np.float32]

# Activations in 8 bits have a half-precision scale for 127 steps.
_LARGEST_STATE = 65504.0 * 127 / 2


class PiecesRunner(Protocol):
    """A part with several sequences; see `edgert.llama.part.PartRunner`."""

    @property
    def to_hidden(self) -> bool:
        """Whether it ends with hidden states."""

    @property
    def n_batch(self) -> int:
        """Most tokens of one run."""

    @property
    def n_logits_max(self) -> int:
        """Most rows of one run."""

    def run_pieces(self, hidden: Floats, pieces: Sequence[Piece]) -> Floats:
        """Run hidden states of several sequences together."""

    def truncate(self, n_positions: int, sequence: int) -> None:
        """Forget positions of a sequence from `n_positions` on."""

    def shift(self, keep: int, discard: int, sequence: int) -> None:
        """Forget [keep, keep + discard) of a sequence and renumber."""

    def wipe(self) -> None:
        """Forget and overwrite everything."""

    def cancel(self) -> None:
        """Make the running run raise `Cancelled`."""

    def counters(self) -> Counters:
        """Return the counters as they are now."""

    def close(self) -> None:
        """Free everything."""


@dataclass(frozen=True, slots=True)
class SharedSizes:
    """How much a shared part holds.

    Attributes:
        n_sequences: Sessions at a time.
        n_ctx: Positions of each.
        n_cells: Positions of all together.
        n_beside: Tokens of prompts in a computation that others wait for with a single token.
        patience_s: Seconds that a step may wait.
    """

    n_sequences: int
    n_ctx: int
    n_cells: int
    n_beside: int = 64
    patience_s: float = 60.0


def check_step(job: Job, n_cached: int, part: PiecesRunner) -> None:
    """Refuse a step that does not continue what is cached, or could harm others; LinkError."""
    n_tokens = len(job.hidden)
    if job.first_position != n_cached:
        raise LinkError(
            f"{n_cached} positions of the session are here, and the step begins at "
            f"{job.first_position}",
            hint="truncate to what is here, or send the text again from its beginning",
        )
    if not 1 <= n_tokens <= part.n_batch or not 0 <= job.n_rows <= n_tokens:
        raise LinkError(f"a step of {n_tokens} tokens and {job.n_rows} rows")
    if job.n_rows > part.n_logits_max:
        raise LinkError(f"{job.n_rows} rows of output, {part.n_logits_max} at most")
    largest = float(np.abs(job.hidden).max(initial=0.0))
    if not largest <= _LARGEST_STATE:  # not a number is refused, too
        raise LinkError(f"hidden states of up to {largest:g}, {_LARGEST_STATE:g} at most")


def check_room(job: Job, n_cached: int, taken: int, sizes: SharedSizes) -> None:
    """Refuse a step whose positions do not fit; CapacityError says what is taken."""
    room = min(sizes.n_ctx - n_cached, sizes.n_cells - taken)
    if len(job.hidden) > room:
        raise CapacityError(
            f"{len(job.hidden)} positions, the session has {n_cached} of {sizes.n_ctx}, all "
            f"sessions {taken:,} of {sizes.n_cells:,}",
            hint="shorten the conversation, or ask another replica",
        )
