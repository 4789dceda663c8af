"""The tokens that a backend's KV cache holds, kept equal to it through errors and cancellation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError
from edgert.llama.backend import Backend

Progress = Callable[[int, int], None]


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens are equal."""
    length = min(len(first), len(second))
    if length == 0:
        return 0
    differs = np.asarray(first[:length]) != np.asarray(second[:length])
    return int(differs.argmax()) if differs.any() else length


class TokenCache:
    """A backend and the token ids of its cached positions.

    A decode that raises leaves undefined positions behind; they are cut off before the next one.

    Attributes:
        token_ids: One per cached position.
        can_rewind: False once the model's memory refused to forget a part (recurrent models).
    """

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.token_ids: list[int] = []
        self.can_rewind = True
        self._unclean = False

    def decode(self, token_ids: Sequence[int], n_logits: int) -> NDArray[np.float32]:
        """Decode after the cached tokens; see `Backend.decode`."""
        if self._unclean:
            self._cut(len(self.token_ids))
        self._unclean = True  # until the decode returns: it may raise, or be interrupted
        logits = self.backend.decode(token_ids, len(self.token_ids), n_logits)
        self.token_ids.extend(token_ids)
        self._unclean = False
        return logits

    def rewind(self, n_positions: int) -> None:
        """Forget positions from `n_positions` on; if that is impossible, decode the rest again."""
        if n_positions < len(self.token_ids) or self._unclean:
            self._cut(n_positions)

    def catch_up(
        self, token_ids: Sequence[int], progress: Progress | None = None
    ) -> NDArray[np.float32]:
        """Make the cache hold `token_ids`, keeping what it shares with them.

        Args:
            token_ids: At least one token; the last is always decoded.
            progress: Called with (tokens done, tokens to decode) before and after each chunk.

        Returns:
            (1, n_vocab) logits after the last token.
        """
        self.rewind(self.shared(token_ids))
        start, total = len(self.token_ids), len(token_ids)
        logits = np.empty((0, 0), np.float32)
        if progress is not None:
            progress(0, total - start)
        while len(self.token_ids) < total:
            done = len(self.token_ids)
            chunk = token_ids[done : done + self.backend.n_batch]
            logits = self.decode(chunk, 1 if done + len(chunk) == total else 0)
            if progress is not None:
                progress(len(self.token_ids) - start, total - start)
        return logits

    def shared(self, token_ids: Sequence[int]) -> int:
        """Return how many positions `catch_up(token_ids)` would keep."""
        shared = min(common_prefix(self.token_ids, token_ids), len(token_ids) - 1)
        return shared if self.can_rewind or shared == len(self.token_ids) else 0

    def shift(self, keep: int, discard: int) -> None:
        """Drop the tokens [keep, keep + discard) and move the later ones down."""
        self.rewind(len(self.token_ids))
        try:
            self.backend.shift(keep, discard)
            del self.token_ids[keep : keep + discard]
        except BaseException:  # an interrupt may come between the two
            self.forget()
            raise

    def forget(self) -> None:
        """Empty the cache."""
        self.token_ids = []
        self._unclean = False
        self.backend.truncate(0)

    def restore(self, path: Path, token_ids: Sequence[int]) -> None:
        """Load a saved cache; empty afterwards if that fails.

        Raises:
            BackendError: the state does not fit this model and context.
        """
        self.token_ids, self._unclean = [], True  # an interrupt may leave anything cached
        try:
            found = self.backend.load_state_file(path)
        except BaseException:
            self.forget()
            raise
        if found != list(token_ids):
            self.forget()
            raise BackendError(f"the KV cache in {path} holds other tokens than listed")
        self.token_ids, self._unclean = found, False

    def _cut(self, n_positions: int) -> None:
        kept = self.token_ids[:n_positions]
        try:
            self.backend.truncate(n_positions)
        except BackendError:
            self.can_rewind = False
            self.forget()
            for start in range(0, len(kept), self.backend.n_batch):
                self.decode(kept[start : start + self.backend.n_batch], 0)
        self.token_ids = kept
        self._unclean = False
