"""What home sent to a part, as it was written: enough to fill the KV cache of another host anew."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from edgert.hosts.hidden_states import TAG_BYTES, join_hidden, read_hidden, write_hidden
from quant.activations.settings import CodecSettings


@dataclass(frozen=True, slots=True)
class Piece:
    """Hidden states of neighbouring positions.

    Attributes:
        first_position: Of the first token.
        n_tokens: Of them.
        message: Tag and rows.
    """

    first_position: int
    n_tokens: int
    message: bytes

    @property
    def end_position(self) -> int:
        """One past the last."""
        return self.first_position + self.n_tokens


class History:
    """The hidden states of every cached position, in order; bounded by the context.

    After a context shift they are those of text that is gone in part: a cache that is filled from
    them is not the shifted one to the bit.

    Args:
        width: Of a hidden state.
        codec: They are written in.
    """

    def __init__(self, width: int, codec: CodecSettings) -> None:
        self._width = width
        self._codec = codec
        self._pieces: list[Piece] = []

    @property
    def n_positions(self) -> int:
        """Cached."""
        return self._pieces[-1].end_position if self._pieces else 0

    @property
    def n_bytes(self) -> int:
        """Taken at home."""
        return sum(len(piece.message) for piece in self._pieces)

    def add(self, first_position: int, n_tokens: int, message: bytes) -> None:
        """Keep what was computed, in place of what was at its positions and after them."""
        self.truncate(first_position)
        self._pieces.append(Piece(first_position, n_tokens, message))

    def truncate(self, n_positions: int) -> None:
        """Forget positions from `n_positions` on."""
        while self._pieces and self._pieces[-1].end_position > n_positions:
            last = self._pieces.pop()
            if last.first_position < n_positions:
                self._pieces.append(self._cut(last, 0, n_positions - last.first_position))

    def shift(self, keep: int, discard: int) -> None:
        """Forget [keep, keep + discard) and renumber."""
        end = keep + discard
        kept: list[Piece] = []
        for piece in self._pieces:
            first = piece.first_position
            if first < keep:
                kept.append(self._cut(piece, 0, min(piece.n_tokens, keep - first)))
            if piece.end_position > end:
                rest = self._cut(piece, max(0, end - first), piece.n_tokens)
                kept.append(Piece(rest.first_position - discard, rest.n_tokens, rest.message))
        self._pieces = kept

    def batches(self, most_tokens: int) -> Iterator[Piece]:
        """Yield everything in as few pieces as may be sent at once."""
        waiting: list[Piece] = []
        for piece in self._pieces:
            if waiting and piece.end_position - waiting[0].first_position > most_tokens:
                yield _joined(waiting)
                waiting = []
            waiting.append(piece)
        if waiting:
            yield _joined(waiting)

    def _cut(self, piece: Piece, first: int, end: int) -> Piece:
        """Return some tokens of a piece, as the other host had read them."""
        if (first, end) == (0, piece.n_tokens):
            return piece
        rows = read_hidden(piece.message, piece.n_tokens, self._width, self._codec)[first:end]
        message = b"".join(write_hidden(rows))
        return Piece(piece.first_position + first, end - first, message)


def history_bytes(n_positions: int, width: int, codec: CodecSettings) -> int:
    """Return the most that a history takes at home; pieces that were cut are f32 in any codec."""
    per_value = 2 if codec.kind == "f16" else 4
    return n_positions * (per_value * width + TAG_BYTES + 1)


def _joined(pieces: list[Piece]) -> Piece:
    if len(pieces) == 1:
        return pieces[0]
    message = join_hidden([(piece.n_tokens, piece.message) for piece in pieces])
    first = pieces[0].first_position
    return Piece(first, pieces[-1].end_position - first, message)
