"""Hidden states to bytes and back: plain, or each token in the fewest bits that meet a bound.

A message, little-endian, without a length of its own:

    1 byte     from the highest bit: 2 of the version, 2 of the kind, and 4 of the basis' digest, or
               zeros; hosts compare the digests themselves when they meet
    groups     of `GROUP_VALUES // n_embd` tokens, at least one; the last may be shorter. Each but
               the last begins with its length in 4 bytes; the last takes what is left (`group`)

The plain kinds are the first byte and all values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgert.errors import FormatError
from quant.activations.basis import Basis
from quant.activations.group import check_length, read_group, write_group
from quant.activations.settings import CodecSettings

Floats = NDArray[np.float32]

VERSION = 1
_F32, _F16, _ADAPTIVE, _IN_BASIS = range(4)
# So that what a group needs while it is computed stays in the cache of a core.
GROUP_VALUES = 1 << 15


def encode(hidden: Floats, settings: CodecSettings) -> bytes:
    """Write hidden states.

    Args:
        hidden: (n_tokens, n_embd).
        settings: How; ValueError where its basis is of another width.

    Raises:
        FormatError: a value is not finite, or too large for the kind.
    """
    if hidden.ndim != 2:
        raise ValueError(f"hidden states of shape {hidden.shape}, wanted (n_tokens, n_embd)")
    states = np.ascontiguousarray(hidden, np.float32)
    largest = np.abs(states).max(axis=1, initial=0)
    if not np.isfinite(largest).all():
        token = int(np.flatnonzero(~np.isfinite(largest))[0])
        raise FormatError(
            f"hidden state {token} holds values that are not finite",
            hint="the model is damaged, or overflows: try --cache-type-k f16 --cache-type-v f16",
        )
    if settings.kind == "f32":
        return _start(_F32) + states.astype("<f4").tobytes()
    if settings.kind == "f16":
        return _start(_F16) + _halves(states).tobytes()
    basis = settings.basis
    if basis is not None and basis.n_embd != states.shape[1]:
        raise ValueError(f"a basis of width {basis.n_embd}, hidden states of {states.shape[1]}")
    message = [_start(_ADAPTIVE) if basis is None else _start(_IN_BASIS, basis)]
    groups = _groups(*states.shape)
    for group in groups:
        content = write_group(states[group], largest[group], settings)
        if group is not groups[-1]:
            message.append(len(content).to_bytes(4, "little"))
        message.append(content)
    return b"".join(message)


def decode(data: bytes, n_tokens: int, n_embd: int, basis: Basis | None = None) -> Floats:
    """Read what `encode` wrote.

    Args:
        data: One message.
        n_tokens: That it must hold.
        n_embd: Their width.
        basis: The one that it was written in, if it was.

    Returns:
        (n_tokens, n_embd), all finite.

    Raises:
        FormatError: it is anything else.
    """
    if not data:
        raise FormatError("no byte of hidden states has come")
    version, kind, tag = data[0] >> 6, data[0] >> 4 & 3, data[0] & 15
    if version != VERSION or (kind != _IN_BASIS and tag):
        raise FormatError(f"hidden states begin with {data[0]:#04x}: not known here")
    if kind in (_F32, _F16):
        dtype = np.dtype("<f4" if kind == _F32 else "<f2")
        check_length(data, 1 + n_tokens * n_embd * dtype.itemsize)
        states = np.frombuffer(data, dtype, offset=1).reshape(n_tokens, n_embd)
    else:
        states = _read_groups(data, n_tokens, n_embd, _basis_of(data[0], n_embd, basis))
    if not np.isfinite(states).all():
        raise FormatError("hidden states that came hold values that are not finite")
    return states.astype(np.float32, copy=kind == _F32)


def _groups(n_tokens: int, n_embd: int) -> list[slice]:
    step = max(1, GROUP_VALUES // max(1, n_embd))
    return [slice(start, min(start + step, n_tokens)) for start in range(0, n_tokens, step)]


def _start(kind: int, basis: Basis | None = None) -> bytes:
    tag = 0 if basis is None else basis.digest[0] & 15
    return bytes((VERSION << 6 | kind << 4 | tag,))


def _halves(states: Floats) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        halves: NDArray[np.float16] = states.astype("<f2")
    if not np.isfinite(halves).all():
        raise FormatError(
            f"a hidden value of {np.abs(states).max():g} is too large for f16",
            hint="use the codec f32 or adaptive",
        )
    return halves


def _basis_of(head: int, n_embd: int, basis: Basis | None) -> Basis | None:
    """Return the basis that a message is in; FormatError where it is not the one here."""
    if head >> 4 & 3 == _ADAPTIVE:
        return None
    if basis is None or basis.n_embd != n_embd or head & 15 != basis.digest[0] & 15:
        raise FormatError(
            "hidden states came in a basis that is not here",
            hint="copy what was calibrated to both hosts",
        )
    return basis


def _read_groups(data: bytes, n_tokens: int, n_embd: int, basis: Basis | None) -> Floats:
    start = 1
    groups = _groups(n_tokens, n_embd)
    states = np.empty((n_tokens, n_embd), np.float32)
    for group in groups:
        end = len(data)
        if group is not groups[-1]:
            start += 4
            end = start + int.from_bytes(data[start - 4 : start], "little")
        if end > len(data):
            raise FormatError(f"hidden states end after {len(data):,} bytes, wanted {end:,}")
        states[group] = read_group(data[start:end], group.stop - group.start, n_embd, basis)
        start = end
    if start != len(data):
        raise FormatError(f"hidden states end after {start:,} of {len(data):,} bytes")
    return states
