"""A basis of hidden states: directions of their own, learnt on a text, and how wide each one is."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from edgert.errors import FormatError

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]

# A product with the matrix costs more than the bits are worth beyond this width.
MOST_WIDTH = 1024
_MAGIC = b"EACB"
_HEAD = struct.Struct("<4sHH")
_VERSION = 1
_LEAST_REACH = 2.0**-7
_MOST_SKEW = 1e-3


@dataclass(frozen=True)
class Basis:
    """Directions in which tokens are coded.

    Attributes:
        matrix: (n_embd, n_embd), orthonormal columns.
        reach: (n_embd,), root mean square of tokens of mean square 1 in each direction.
    """

    matrix: Floats
    reach: Floats

    @property
    def n_embd(self) -> int:
        """Width of a hidden state."""
        return len(self.reach)

    @cached_property
    def shifts(self) -> NDArray[np.int8]:
        """How many bits wider than the mean each direction is, (n_embd,)."""
        bits: NDArray[np.int8] = np.rint(np.log2(self.reach)).astype(np.int8)
        return bits

    @cached_property
    def digest(self) -> bytes:
        """Identify the basis, 32 bytes."""
        return hashlib.sha256(self.to_bytes()).digest()

    def to_bytes(self) -> bytes:
        """Return the file: magic, version, n_embd, reach, matrix; all little-endian."""
        head = _HEAD.pack(_MAGIC, _VERSION, self.n_embd)
        return head + self.reach.astype("<f4").tobytes() + self.matrix.astype("<f4").tobytes()

    @classmethod
    def from_bytes(cls, content: bytes) -> Basis:
        """Read what `to_bytes` wrote.

        Raises:
            FormatError: it is something else, damaged, or not orthonormal.
        """
        if len(content) < _HEAD.size:
            raise FormatError(f"{len(content)} bytes are no basis of hidden states")
        magic, version, n_embd = _HEAD.unpack_from(content)
        if magic != _MAGIC or version != _VERSION:
            raise FormatError(f"not a basis of hidden states of version {_VERSION}")
        wanted = _HEAD.size + 4 * n_embd * (n_embd + 1)
        if not 1 <= n_embd <= MOST_WIDTH or len(content) != wanted:
            raise FormatError(
                f"a basis of width {n_embd} has {len(content):,} bytes, wanted {wanted:,} "
                f"and a width of 1 to {MOST_WIDTH}"
            )
        values = np.frombuffer(content, "<f4", offset=_HEAD.size).astype(np.float32)
        reach, matrix = values[:n_embd], values[n_embd:].reshape(n_embd, n_embd)
        in_range = (reach >= _LEAST_REACH) & (reach <= math.sqrt(n_embd) * (1 + _MOST_SKEW))
        if not in_range.all() or not _is_orthonormal(matrix):
            raise FormatError("the basis of hidden states is damaged")
        return cls(matrix, reach)


class Moments:
    """Adds up how hidden states, each brought to the same length, lie.

    Args:
        n_embd: Their width.
    """

    def __init__(self, n_embd: int) -> None:
        self.n_tokens = 0
        self._sums = np.zeros((n_embd, n_embd))

    def add(self, hidden: Floats) -> None:
        """Take tokens, (n_tokens, n_embd)."""
        states = hidden.astype(np.float64)
        lengths = np.sqrt(np.mean(states * states, axis=1, keepdims=True))
        states /= np.where(lengths > 0, lengths, 1)
        self._sums += states.T @ states
        self.n_tokens += len(states)

    def basis(self) -> Basis:
        """Return the directions, the widest last.

        Raises:
            ValueError: there are fewer tokens than directions.
        """
        n_embd = len(self._sums)
        if self.n_tokens < n_embd:
            raise ValueError(f"{self.n_tokens} tokens for {n_embd} directions")
        powers, matrix = np.linalg.eigh(self._sums / self.n_tokens)
        reach = np.sqrt(np.maximum(powers, _LEAST_REACH**2)).astype(np.float32)
        return Basis(np.ascontiguousarray(matrix, np.float32), np.maximum(reach, _LEAST_REACH))


def _is_orthonormal(matrix: Floats) -> bool:
    if not np.isfinite(matrix).all() or np.abs(matrix).max() > 1 + _MOST_SKEW:
        return False
    skew = matrix.T @ matrix - np.eye(len(matrix), dtype=np.float32)
    return bool(np.abs(skew).max() < _MOST_SKEW)
