"""What serves a part to one home: the part itself, or a place in one that many homes share."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.llama.backend import Counters


class Runner(Protocol):
    """See `edgert.llama.part.PartRunner`; not thread-safe, except `cancel`."""

    @property
    def to_hidden(self) -> bool:
        """Whether it ends with hidden states."""

    @property
    def n_batch(self) -> int:
        """Most tokens of one `run`."""

    def run(
        self, hidden: NDArray[np.float32], first_position: int, n_rows: int
    ) -> NDArray[np.float32]:
        """Run hidden states; return the rows of the last `n_rows` of them."""

    def truncate(self, n_positions: int) -> None:
        """Forget positions from `n_positions` on."""

    def shift(self, keep: int, discard: int) -> None:
        """Forget [keep, keep + discard) and renumber."""

    def cancel(self) -> None:
        """Make the running `run` raise `Cancelled`; callable from any thread."""

    def counters(self) -> Counters:
        """Return the counters of the part as they are now."""

    def close(self) -> None:
        """Free what is this home's; calling again does nothing."""
