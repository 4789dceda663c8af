"""A backend whose passes are recorded; everything else is the inner backend's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from edgert.llama.backend import Backend, Counters
from edgert.llama.vocab import Vocab

if TYPE_CHECKING:
    from edgert.recorder import Recorder


class RecordedBackend:
    """Runs `inner` and records each pass; see `Backend` for the methods.

    Args:
        inner: Owned from here on.
        recorder: Told of every pass, and when all is over.
    """

    def __init__(self, inner: Backend, recorder: Recorder) -> None:
        self._inner = inner
        self._recorder = recorder
        self._closed = False

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""
        return self._inner.vocab

    @property
    def n_ctx(self) -> int:
        """Positions in the KV cache."""
        return self._inner.n_ctx

    @property
    def n_batch(self) -> int:
        """Most tokens of one decode."""
        return self._inner.n_batch

    @property
    def n_logits_max(self) -> int:
        """Most logits of one decode."""
        return self._inner.n_logits_max

    def decode(
        self, tokens: Sequence[int], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        """Run tokens as one span, also when it fails."""
        name = _pass_name(first_position, len(tokens))
        return self._pass(name, lambda: self._inner.decode(tokens, first_position, n_logits))

    def decode_sequences(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> NDArray[np.float32]:
        """Run one token of each of several texts as one span."""
        name = f"token {max(positions)} of {len(tokens)} texts"
        return self._pass(name, lambda: self._inner.decode_sequences(tokens, positions, sequences))

    def expect(self, n_candidates: int | None) -> None:
        """Pass it on."""
        self._inner.expect(n_candidates)

    def truncate(self, n_positions: int) -> None:
        """Forget positions from `n_positions` on."""
        self._inner.truncate(n_positions)

    def shift(self, keep: int, discard: int) -> None:
        """Forget [keep, keep + discard) and renumber."""
        self._inner.shift(keep, discard)

    def can_shift(self) -> bool:
        """Say whether `shift` works."""
        return self._inner.can_shift()

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the mean hidden state; its passes are one span."""
        return self._pass(f"embed {len(tokens)} tokens", lambda: self._inner.embed(tokens))

    def save_state_file(self, path: Path, tokens: Sequence[int]) -> None:
        """Write the KV cache and its tokens to a file."""
        self._inner.save_state_file(path, tokens)

    def load_state_file(self, path: Path) -> list[int]:
        """Replace the KV cache by a file's; return the tokens it holds."""
        return self._inner.load_state_file(path)

    def cancel(self) -> None:
        """Stop the running decode after its node."""
        self._inner.cancel()

    def counters(self) -> Counters:
        """Return the counters as they are now."""
        return self._inner.counters()

    def applied(self) -> dict[str, str]:
        """Return what was applied, for people."""
        return self._inner.applied()

    def close(self) -> None:
        """Free everything, then end the recording; calling again does nothing."""
        if not self._closed:
            self._closed = True
            self._inner.close()
            self._recorder.finish()

    def _pass(self, name: str, work: Callable[[], NDArray[np.float32]]) -> NDArray[np.float32]:
        started_s = self._recorder.tape.clock()
        try:
            return work()
        finally:
            self._recorder.add("compute", name, started_s, self._recorder.tape.clock())
            self._recorder.remember(self._inner)


def _pass_name(first_position: int, n_tokens: int) -> str:
    if n_tokens == 1:
        return f"token {first_position}"
    return f"tokens {first_position} to {first_position + n_tokens - 1}"
