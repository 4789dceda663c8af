"""The backend of a model that fits: llama.cpp's own fast path, no tap, weights read once."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from edgert.llama.backend import Counters
from edgert.llama.context import LlamaContext
from edgert.llama.model import LlamaModel
from edgert.llama.options import LoadOptions
from edgert.llama.vocab import Vocab


class ResidentBackend:
    """A whole model in memory; see `Backend` for the methods.

    Args:
        model: Loaded with placement "resident"; owned from here on.
        options: As given to `open_backend`.
        budget_bytes: The bound that the caller checked, for display.
    """

    def __init__(
        self, model: LlamaModel, options: LoadOptions, budget_bytes: int | None = None
    ) -> None:
        self._model = model
        self._options = options
        self._budget_bytes = budget_bytes
        self._context = LlamaContext(model, options)
        self._n_passes = 0
        self._n_tokens = 0
        self._decode_s = 0.0

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""
        return self._model.vocab

    @property
    def n_ctx(self) -> int:
        """Positions in the KV cache."""
        return self._context.n_ctx

    @property
    def n_batch(self) -> int:
        """Most tokens of one decode."""
        return self._context.n_batch

    @property
    def n_logits_max(self) -> int:
        """Most logits of one decode."""
        return self._context.n_logits_max

    def decode(
        self, tokens: Sequence[int], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        """Run tokens; see `Backend.decode`."""
        started_s = time.perf_counter()
        try:
            return self._context.decode(tokens, first_position, n_logits)
        finally:
            self._context.abort(stop=False)
            self._n_passes += 1
            self._n_tokens += len(tokens)
            self._decode_s += time.perf_counter() - started_s

    def truncate(self, n_positions: int) -> None:
        """Forget positions from `n_positions` on."""
        self._context.truncate(n_positions)

    def shift(self, keep: int, discard: int) -> None:
        """Forget [keep, keep + discard) and renumber."""
        self._context.shift(keep, discard)

    def can_shift(self) -> bool:
        """Say whether `shift` works."""
        return self._context.can_shift()

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the mean hidden state."""
        return self._context.embed(tokens)

    def save_state(self) -> bytes:
        """Return the KV cache as bytes."""
        return self._context.save_state()

    def load_state(self, state: bytes) -> None:
        """Replace the KV cache."""
        self._context.load_state(state)

    def cancel(self) -> None:
        """Stop the running decode after its node."""
        self._context.abort(stop=True)

    def counters(self) -> Counters:
        """Return the counters as they are now."""
        weight_bytes = self._model.file.weight_bytes
        return Counters(
            n_passes=self._n_passes,
            n_tokens=self._n_tokens,
            decode_s=self._decode_s,
            stall_s=0.0,
            bytes_read=0,
            resident_weight_bytes=weight_bytes,
            pinned_bytes=weight_bytes,
            weight_bytes=weight_bytes,
            budget_bytes=self._budget_bytes,
            streaming=False,
            layout="repacked",
        )

    def applied(self) -> dict[str, str]:
        """Return what was applied, for people."""
        threads, threads_batch = self._options.threads()
        return {
            "weights": "resident, repacked by llama.cpp where it can",
            "threads": f"{threads}, {threads_batch} for batches",
            "kv cache": f"{self._options.type_k}/{self._options.type_v}, {self.n_ctx} positions",
        }

    def close(self) -> None:
        """Free everything."""
        self._context.close()
        self._model.close()
