"""What a manifest remembers of a routing trace: packed numbers, and the rules they follow."""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator, Sequence

from partition.manifest import Manifest, Routing
from partition.manifest_rules import Violation

_SHARE_BYTES, _ID_BYTES = 8, 2

Shares = tuple[float, ...]
Tokens = tuple[tuple[int, ...], ...]


def pack_shares(shares: Sequence[float]) -> str:
    """Return numbers as Base64 of little-endian f64."""
    return base64.b64encode(struct.pack(f"<{len(shares)}d", *shares)).decode()


def pack_tokens(tokens: Sequence[Sequence[int]]) -> str:
    """Return the experts of each token as Base64 of little-endian u16, one after the other."""
    ids = [expert for token in tokens for expert in token]
    return base64.b64encode(struct.pack(f"<{len(ids)}H", *ids)).decode()


def unpack_shares(text: str) -> Shares:
    """Return packed numbers; ValueError if they are none."""
    content = _decode(text, _SHARE_BYTES)
    return struct.unpack(f"<{len(content) // _SHARE_BYTES}d", content)


def unpack_tokens(text: str, n_used: int) -> Tokens:
    """Return the experts of each token; ValueError if they are not `n_used` each."""
    content = _decode(text, _ID_BYTES * n_used)
    ids = struct.unpack(f"<{len(content) // _ID_BYTES}H", content)
    return tuple(ids[start : start + n_used] for start in range(0, len(ids), n_used))


def routing_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that what routers chose are experts, and what tokens want of them shares."""
    routing = manifest.routing
    if routing is None:
        return
    if routing.n_used > routing.n_expert:
        yield Violation(
            "$.routing.n_used", routing.n_used, f"{routing.n_expert} at most, as n_expert says"
        )
    for index, layer in enumerate(routing.layers):
        place = f"$.routing.layers[{index}]"
        if not _are_shares(layer.shares, routing):
            rule = f"Base64 of {routing.n_expert} f64 from 0 to 1, or none"
            yield Violation(f"{place}.shares", layer.shares, rule)
        if not _are_choices(layer.choices, routing):
            rule = f"Base64 of u16 below {routing.n_expert}, {routing.n_used} different a token"
            yield Violation(f"{place}.choices", layer.choices, rule)
        if bool(layer.shares) != bool(layer.choices):
            yield Violation(f"{place}.choices", layer.choices, "as many layers as have shares")


def _are_shares(text: str, routing: Routing) -> bool:
    try:
        shares = unpack_shares(text)
    except ValueError:
        return False
    return len(shares) in (0, routing.n_expert) and all(0 <= share <= 1 for share in shares)


def _are_choices(text: str, routing: Routing) -> bool:
    try:
        tokens = unpack_tokens(text, routing.n_used)
    except ValueError:
        return False
    return all(
        len(set(token)) == routing.n_used and max(token) < routing.n_expert for token in tokens
    )


def _decode(text: str, item_bytes: int) -> bytes:
    try:
        content = base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(str(error)) from error
    if len(content) % item_bytes:
        raise ValueError(f"{len(content)} bytes, wanted a multiple of {item_bytes}")
    return content
