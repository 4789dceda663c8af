"""The Backend over llama.cpp: a context, and a keeper that has the weights in place when needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.errors import ConfigError
from edgert.llama.backend import Counters, ExpertCounters, Layout
from edgert.llama.context import LlamaContext, Piece
from edgert.llama.interrupts import interrupts_deferred
from edgert.llama.model import LlamaModel
from edgert.llama.options import LoadOptions
from edgert.llama.vocab import Vocab
from edgert.receipt import Receipt


@dataclass(frozen=True, slots=True)
class WeightGauges:
    """What a keeper holds and has moved; see `Counters` for the meaning of each."""

    resident_weight_bytes: int
    pinned_bytes: int
    bytes_read: int
    stall_s: float
    streaming: bool
    layout: Layout
    experts: ExpertCounters | None = None


class WeightKeeper(Protocol):
    """Has the weights in place while a decode runs."""

    def begin_pass(self, n_tokens: int, n_logits: int) -> None:
        """Prepare for a decode of so many tokens, of which so many want logits."""
        ...

    def end_pass(self, *, complete: bool) -> None:
        """Finish a decode; raises what went wrong while weights moved."""
        ...

    def gauges(self) -> WeightGauges:
        """Return what is held and moved so far."""
        ...

    def describe(self) -> str:
        """Say for people where the weights are."""
        ...

    def close(self) -> None:
        """Stop moving weights; the context is freed by now, the model is not."""
        ...


class LlamaBackend:
    """Runs a model; see `Backend` for the methods.

    Args:
        model: Owned from here on.
        context: Owned from here on.
        keeper: Owned from here on.
        options: As given to `open_backend`.
    """

    def __init__(
        self,
        model: LlamaModel,
        context: LlamaContext,
        keeper: WeightKeeper,
        options: LoadOptions,
    ) -> None:
        self._model = model
        self._context = context
        self._keeper = keeper
        self._options = options
        self._n_passes = 0
        self._n_tokens = 0
        self._decode_s = 0.0
        self._closed = False

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""
        return self._model.vocab

    @property
    def n_ctx(self) -> int:
        """Positions in the KV cache."""
        return int(self._context.n_ctx)

    @property
    def n_batch(self) -> int:
        """Most tokens of one decode."""
        return self._context.n_batch

    @property
    def n_logits_max(self) -> int:
        """Most logits of one decode."""
        return int(self._context.n_logits_max)

    def decode(
        self, tokens: Sequence[int], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        """Run tokens; see `Backend.decode`."""
        if self._closed:
            raise ConfigError("the backend is closed")
        with interrupts_deferred(self.cancel):
            return self._pass(
                len(tokens),
                n_logits,
                lambda: self._context.decode(tokens, first_position, n_logits),
            )

    def decode_hidden(
        self, hidden: NDArray[np.float32], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        """Run hidden states in place of tokens; see `LlamaContext.decode_hidden`."""
        if self._closed:
            raise ConfigError("the backend is closed")
        with interrupts_deferred(self.cancel):
            return self._pass(
                len(hidden), n_logits,
                lambda: self._context.decode_hidden(hidden, first_position, n_logits),
            )  # fmt: skip

    def decode_pieces(
        self, hidden: NDArray[np.float32], pieces: Sequence[Piece]
    ) -> NDArray[np.float32]:
        """Run hidden states of several texts together; see `LlamaContext.decode_pieces`."""
        if self._closed:
            raise ConfigError("the backend is closed")
        n_rows = sum(piece.n_rows for piece in pieces)
        return self._pass(
            len(hidden), n_rows, lambda: self._context.decode_pieces(hidden, pieces)
        )  # fmt: skip

    def decode_sequences(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> NDArray[np.float32]:
        """Run one token of each of several texts together; see `LlamaContext.decode_sequences`."""
        if self._closed:
            raise ConfigError("the backend is closed")
        with interrupts_deferred(self.cancel):
            return self._pass(
                len(tokens), len(tokens),
                lambda: self._context.decode_sequences(tokens, positions, sequences),
            )  # fmt: skip

    def _pass(
        self, n_tokens: int, n_logits: int, work: Callable[[], NDArray[np.float32]]
    ) -> NDArray[np.float32]:
        started_s = time.perf_counter()
        self._keeper.begin_pass(n_tokens, n_logits)
        complete = False
        try:
            logits = work()
            complete = True
        finally:
            self._context.abort(stop=False)
            self._n_passes += 1
            self._n_tokens += n_tokens
            self._decode_s += time.perf_counter() - started_s
            self._keeper.end_pass(complete=complete)
        return logits

    def expect(self, n_candidates: int | None) -> None:
        """Nothing to spare: all logits are here anyway."""

    def truncate(self, n_positions: int, sequence: int | None = None) -> None:
        """Forget positions of a text from `n_positions` on; None is every text."""
        self._context.truncate(n_positions, sequence)

    def wipe(self) -> None:
        """Forget every text, and overwrite what was kept of them."""
        self._context.clear(wipe=True)

    def shift(self, keep: int, discard: int, sequence: int = 0) -> None:
        """Forget [keep, keep + discard) of a text and renumber."""
        self._context.shift(keep, discard, sequence)

    def can_shift(self) -> bool:
        """Say whether `shift` works."""
        return self._context.can_shift()

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the mean hidden state; forgets all positions."""
        return self._context.embed(tokens, self._decode_for_embedding)

    def save_state_file(self, path: Path, tokens: Sequence[int]) -> None:
        """Write the KV cache and its tokens to a file, a layer at a time."""
        self._context.save_state_file(path, tokens)

    def load_state_file(self, path: Path) -> list[int]:
        """Replace the KV cache by a file's; return the tokens it holds."""
        return self._context.load_state_file(path)

    def cancel(self) -> None:
        """Stop the running decode after its node."""
        self._context.abort(stop=True)

    def counters(self) -> Counters:
        """Return the counters as they are now."""
        gauges = self._keeper.gauges()
        return Counters(
            n_passes=self._n_passes,
            n_tokens=self._n_tokens,
            decode_s=self._decode_s,
            stall_s=gauges.stall_s,
            bytes_read=gauges.bytes_read,
            resident_weight_bytes=gauges.resident_weight_bytes,
            pinned_bytes=gauges.pinned_bytes,
            weight_bytes=self._model.file.weight_bytes,
            budget_bytes=self._options.memory_bytes,
            streaming=gauges.streaming,
            layout=gauges.layout,
            experts=gauges.experts,
            receipt=Receipt(f"{self._options.type_k}/{self._options.type_v}"),
        )

    def applied(self) -> dict[str, str]:
        """Return what was applied, for people."""
        threads, threads_batch = self._options.threads()
        return {
            "weights": self._keeper.describe(),
            "threads": f"{threads}, {threads_batch} for batches",
            "kv cache": f"{self._options.type_k}/{self._options.type_v}, {self.n_ctx} positions",
            "batch": f"{self.n_batch}, computed {self._context.n_ubatch} at once",
        }

    def close(self) -> None:
        """Free everything; calling again does nothing."""
        if not self._closed:
            self._closed = True
            self._context.close()
            self._keeper.close()
            self._model.close()

    def _decode_for_embedding(self, tokens: Sequence[int], position: int) -> None:
        self.decode(tokens, position, len(tokens))
