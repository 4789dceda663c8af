"""Rows of logits as they travel: whole, or the likeliest tokens and the logarithm of the sum.

Source: Vocabulary Parallelism (arXiv 2411.05288): each part of the vocabulary knows its largest
logits and its share of the softmax; what else it has changes nothing that is sampled.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from edgert.errors import FormatError

Floats = NDArray[np.float32]
Buffer = bytes | memoryview

_HEAD = struct.Struct("<II")


def pack_logits(logits: Floats, n_candidates: int) -> bytes:
    """Return rows as bytes.

    Args:
        logits: (n_rows, n_vocab).
        n_candidates: Of each row; 0 for all of it.
    """
    n_rows, n_vocab = logits.shape
    if not n_candidates or n_candidates >= n_vocab:
        return _HEAD.pack(n_rows, 0) + np.ascontiguousarray(logits, "<f4").tobytes()
    ids = np.argpartition(logits, n_vocab - n_candidates, axis=1)[:, n_vocab - n_candidates :]
    ids = np.sort(ids, axis=1).astype("<u4")
    values = np.take_along_axis(logits, ids.astype(np.int64), axis=1).astype("<f4")
    sums = log_sums(logits).astype("<f4")
    head = _HEAD.pack(n_rows, n_candidates)
    return head + sums.tobytes() + ids.tobytes() + values.tobytes()


def unpack_logits(payload: Buffer, n_rows: int, out: Floats) -> Floats | None:
    """Put rows into a part of the vocabulary.

    Args:
        payload: As `pack_logits` makes it.
        n_rows: That were wanted.
        out: (n_rows, n_vocab) of the part; what did not travel becomes -inf.

    Returns:
        The logarithm of the sum of exponentials of each row, None where all of it travelled.

    Raises:
        FormatError: the bytes are not that many rows, or name tokens that are not there.
    """
    n_vocab = out.shape[1]
    if len(payload) < _HEAD.size:
        raise FormatError(f"logits of {len(payload)} bytes")
    saw_rows, n_candidates = _HEAD.unpack_from(payload)
    n_bytes = 4 * n_rows * ((1 + 2 * n_candidates) if n_candidates else n_vocab)
    if saw_rows != n_rows or n_candidates > n_vocab or len(payload) != _HEAD.size + n_bytes:
        raise FormatError(
            f"{len(payload):,} bytes of {saw_rows} rows, {n_candidates} candidates each; "
            f"wanted {n_rows} rows of {n_vocab}"
        )
    values = np.frombuffer(payload, "<f4", offset=_HEAD.size)
    if not n_candidates:
        out[...] = values.reshape(n_rows, n_vocab)
        return None
    n_ids = n_rows * n_candidates
    ids = np.frombuffer(payload, "<u4", n_ids, _HEAD.size + 4 * n_rows).astype(np.int64)
    if ids.size and int(ids.max()) >= n_vocab:
        raise FormatError(f"a candidate is token {int(ids.max())} of {n_vocab}")
    out[...] = -np.inf
    rows = np.repeat(np.arange(n_rows), n_candidates)
    out[rows, ids] = values[n_rows + n_ids :]
    return values[:n_rows].copy()


def log_sums(logits: Floats) -> Floats:
    """Return the logarithm of the sum of exponentials of each row."""
    most = logits.max(axis=1, keepdims=True)
    sums: Floats = (most + np.log(np.exp(logits - most).sum(axis=1, keepdims=True)))[:, 0]
    return sums
