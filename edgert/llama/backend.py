"""The seam between the engine and what runs the model: the Backend protocol, its counters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.llama.vocab import Vocab
from edgert.receipt import Receipt

Layout = Literal["file", "packed", "repacked", "nested"]


@dataclass(frozen=True, slots=True)
class ExpertCounts:
    """What the experts of one layer, or of all of them, did.

    Attributes:
        wanted: Experts of single tensors that passes wanted.
        missed: Of those, neither in memory nor on their way.
        bytes_read: Bytes read, guessed or needed.
        early_bytes: Of those, read because they were guessed.
        saved_bytes: Of the guessed ones, those that were then needed.
        stall_s: Seconds that computing waited for them.
        used_weights: Weights that tokens were computed with; twice if by two tokens.
        used_bits: Their bits in the file, as far as they were read.
    """

    wanted: int = 0
    missed: int = 0
    bytes_read: int = 0
    early_bytes: int = 0
    saved_bytes: int = 0
    stall_s: float = 0.0
    used_weights: int = 0
    used_bits: float = 0.0

    @property
    def hit_rate(self) -> float | None:
        """Share of what was wanted that was there or on its way; None where nothing was."""
        return 1.0 - self.missed / self.wanted if self.wanted else None

    @property
    def bits_per_weight(self) -> float | None:
        """Mean bits of a weight that was used, weighted by use; None where none was."""
        return self.used_bits / self.used_weights if self.used_weights else None

    def plus(self, other: ExpertCounts, sign: int = 1) -> ExpertCounts:
        """Return the sum, or the difference where `sign` is -1."""
        names = ExpertCounts.__slots__
        return ExpertCounts(*(getattr(self, n) + sign * getattr(other, n) for n in names))


@dataclass(frozen=True, slots=True)
class ExpertCounters:
    """What a model's experts did, in all and by layer.

    Attributes:
        total: All layers together.
        by_layer: Each layer with experts, in order.
        layers: Their numbers; None where the graph names none.
    """

    total: ExpertCounts
    by_layer: tuple[ExpertCounts, ...]
    layers: tuple[int | None, ...]

    def since(self, before: ExpertCounters | None) -> ExpertCounters:
        """Return what was added after `before`; None is the beginning."""
        if before is None:
            return self
        pairs = zip(self.by_layer, before.by_layer, strict=True)
        by_layer = tuple(now.plus(then, -1) for now, then in pairs)
        return ExpertCounters(self.total.plus(before.total, -1), by_layer, self.layers)


@dataclass(frozen=True, slots=True)
class Counters:
    """Cumulative counters of a backend, and gauges of what it holds now.

    Attributes:
        n_passes: Decode calls.
        n_tokens: Tokens decoded.
        decode_s: Seconds inside decode calls.
        stall_s: Seconds of those spent waiting for flash.
        bytes_read: Weight bytes read by decode calls.
        resident_weight_bytes: Weight bytes in memory: pinned ones and the window.
        pinned_bytes: Weight bytes that never leave memory.
        weight_bytes: Weight bytes of the model.
        budget_bytes: Bound on the process, None when there is none.
        streaming: Whether weights move during decode.
        layout: How weights lie in memory; "repacked" is llama.cpp's own repacking.
        experts: What routed experts did, where they come and go; None for other models.
        receipt: Which hosts were used, and what went to them; None where that is not known.
    """

    n_passes: int
    n_tokens: int
    decode_s: float
    stall_s: float
    bytes_read: int
    resident_weight_bytes: int
    pinned_bytes: int
    weight_bytes: int
    budget_bytes: int | None
    streaming: bool
    layout: Layout
    experts: ExpertCounters | None = None
    receipt: Receipt | None = None


class Backend(Protocol):
    """A model with a KV cache. Not thread-safe, except `cancel`."""

    @property
    def vocab(self) -> Vocab:
        """The model's vocabulary."""
        ...

    @property
    def n_ctx(self) -> int:
        """Positions in the KV cache."""
        ...

    @property
    def n_batch(self) -> int:
        """Most tokens of one `decode` call."""
        ...

    @property
    def n_logits_max(self) -> int:
        """Most tokens of one `decode` call that may want logits."""
        ...

    def decode(
        self, tokens: Sequence[int], first_position: int, n_logits: int
    ) -> NDArray[np.float32]:
        """Run `tokens` at positions `first_position` and up.

        Args:
            tokens: 1 to `n_batch` token ids.
            first_position: Position of the first; everything before it is cached.
            n_logits: How many of the last tokens to return logits for, 0 to len(tokens)
                and at most `n_logits_max`.

        Returns:
            (n_logits, n_vocab) raw logits, a view that the next decode overwrites.

        Raises:
            Cancelled: `cancel` was called; positions from `first_position` on are undefined.
            FormatError: the file changed or cannot be read any more.
            BackendError: llama.cpp failed.
        """
        ...

    def decode_sequences(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> NDArray[np.float32]:
        """Run one token of each of several texts together, where the context was made for them.

        Args:
            tokens: One for each.
            positions: Of each in its own text.
            sequences: Which text, all different.

        Returns:
            (n_tokens, n_vocab) raw logits, a view that the next decode overwrites.
        """
        ...

    def expect(self, n_candidates: int | None) -> None:
        """Say what of the next logits will be looked at.

        Args:
            n_candidates: So many of the largest of each row, at least; the others may be -inf then.
                None is all of them.
        """
        ...

    def truncate(self, n_positions: int) -> None:
        """Forget positions from `n_positions` on; BackendError where the model's memory cannot."""
        ...

    def shift(self, keep: int, discard: int) -> None:
        """Forget positions [keep, keep + discard) and renumber the later ones."""
        ...

    def can_shift(self) -> bool:
        """Say whether `shift` works for this model."""
        ...

    def embed(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Return the mean hidden state, (n_embd,); forgets all positions."""
        ...

    def save_state_file(self, path: Path, tokens: Sequence[int]) -> None:
        """Write the KV cache and its tokens to `path` without a second copy in memory."""
        ...

    def load_state_file(self, path: Path) -> list[int]:
        """Replace the KV cache by a file's and return its tokens; BackendError if it misfits."""
        ...

    def cancel(self) -> None:
        """Make the running decode raise `Cancelled`; callable from any thread."""
        ...

    def counters(self) -> Counters:
        """Return the counters as they are now."""
        ...

    def applied(self) -> dict[str, str]:
        """Return what was applied, for people: layout, budget, threads, KV types."""
        ...

    def close(self) -> None:
        """Free everything; calling again does nothing."""
        ...
