"""The messages of service links: bounded JSON, versions, errors. No gRPC, no sockets."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence

import edgert
from edgert.errors import EdgertError, FormatError, LinkError
from edgert.hosts.frames import decode_error, encode_error
from edgert.hosts.service.handlers import BlobState, OfferedBlob
from edgert.hosts.service.limits import MOST_JSON_BYTES
from edgert.strict_json import read_json

SERVICE = "edgert.v1.Hosts"
PROTOCOL = 1

ERROR_KEY = "edgert-error-bin"
MOST_BLOBS = 4096
MOST_BLOB_BYTES = 1 << 50
LONGEST_SESSION = 128

ROUTE_KEY = "edgert-session"
CLIENT_CERTIFICATE_KEY = "edgert-client-certificate"  # PEM, percent-encoded; from gateways only
_ROUTE_DIGITS = 32

_PROTOCOL_KEY, _VERSION_KEY = "edgert-protocol", "edgert-version"
_SHA256 = re.compile(r"[0-9a-f]{64}")
_LONGEST_SHOWN = 200
_UPGRADE = "install the same version of edgert on both hosts"

Metadata = tuple[tuple[str, str | bytes], ...]


def path_of(method: str) -> str:
    """Return the path of a method of the service."""
    return f"/{SERVICE}/{method}"


def own_versions() -> Metadata:
    """Return what both ends say first, as metadata."""
    return ((_PROTOCOL_KEY, str(PROTOCOL)), (_VERSION_KEY, edgert.__version__))


def routed(session: str | None) -> Metadata:
    """Return what a caller says first: versions, and what balancers keep a session together by.

    Args:
        session: Its name, which stays between the two ends; None for calls of no session.
    """
    if session is None:
        return own_versions()
    route = hashlib.sha256(session.encode()).hexdigest()[:_ROUTE_DIGITS]
    return (*own_versions(), (ROUTE_KEY, route))


def check_versions(metadata: Iterable[tuple[str, str | bytes]]) -> None:
    """Refuse a peer of another version.

    Raises:
        LinkError: what differs, without the peer's name.
    """
    saw = dict(metadata)
    for key, mine in dict(own_versions()).items():
        other = saw.get(key, "unknown")
        if other != mine:
            what = key.removeprefix("edgert-")
            raise LinkError(
                f"{what} of service links is {clean(str(other))}, wanted {mine!s}", hint=_UPGRADE
            )


def error_metadata(error: EdgertError) -> Metadata:
    """Return an error as trailing metadata, with its class, message and hint."""
    return ((ERROR_KEY, encode_error(error)),)


def told_error(metadata: Iterable[tuple[str, str | bytes]]) -> LinkError | None:
    """Return the error in trailing metadata, without the peer's name; None if there is none."""
    for key, value in metadata:
        if key == ERROR_KEY and isinstance(value, bytes):
            return decode_error(value)
    return None


def clean(text: str) -> str:
    """Cut foreign text short and leave out what a terminal might obey."""
    return "".join(c if c.isprintable() else " " for c in text[:_LONGEST_SHOWN])


def encode(document: Mapping[str, object]) -> bytes:
    """Write a message.

    Raises:
        LinkError: it is too large; without the peer's name.
    """
    content = json.dumps(document, ensure_ascii=False, allow_nan=False).encode()
    check_size(len(content))
    return content


def decode(content: bytes, what: str) -> dict[str, object]:
    """Read a message.

    Raises:
        LinkError: it is too large or no JSON object; without the peer's name.
    """
    check_size(len(content))
    try:
        document = read_json(content, what)
    except FormatError as error:
        raise LinkError(error.message, hint=error.hint) from error
    if not isinstance(document, dict):
        raise LinkError(f"{what}: not an object")
    return document


def check_size(n_bytes: int) -> None:
    """Refuse a message that is too large; LinkError without the peer's name."""
    if n_bytes > MOST_JSON_BYTES:
        raise LinkError(f"a message of {n_bytes:,} bytes, wanted {MOST_JSON_BYTES:,} at most")


def encode_offer(blobs: Sequence[OfferedBlob]) -> bytes:
    """Write what is offered."""
    rows = [{"sha256": blob.sha256, "size_bytes": blob.size_bytes} for blob in blobs]
    return encode({"blobs": rows})


def decode_offer(content: bytes) -> tuple[OfferedBlob, ...]:
    """Read what is offered, every blob once; LinkError without the peer's name."""
    rows = _rows(decode(content, "Offer"))
    blobs = tuple(OfferedBlob(hash_of(row, "Offer"), size_of(row, "size_bytes")) for row in rows)
    if len({blob.sha256 for blob in blobs}) != len(blobs):
        raise LinkError("Offer: the same blob twice")
    return blobs


def encode_states(states: Sequence[BlobState]) -> bytes:
    """Write the answer to an offer."""
    rows = [{"there_bytes": state.there_bytes, "is_whole": state.is_whole} for state in states]
    return encode({"blobs": rows})


def decode_states(content: bytes, offered: Sequence[OfferedBlob]) -> tuple[BlobState, ...]:
    """Read the answer to an offer; LinkError without the peer's name."""
    rows = _rows(decode(content, "answer to Offer"))
    if len(rows) != len(offered):
        raise LinkError(f"answer to Offer: {len(rows)} blobs, wanted {len(offered)}")
    states = []
    for blob, row in zip(offered, rows, strict=True):
        there, is_whole = size_of(row, "there_bytes"), row.get("is_whole")
        if not isinstance(is_whole, bool) or there > blob.size_bytes:
            raise LinkError("answer to Offer: a field is not what was wanted")
        states.append(BlobState(blob.sha256, blob.size_bytes, there, is_whole))
    return tuple(states)


def hash_of(facts: Mapping[str, object], what: str) -> str:
    """Return the hash in a message; LinkError without the peer's name."""
    sha256 = facts.get("sha256")
    if not isinstance(sha256, str) or not _SHA256.fullmatch(sha256):
        raise LinkError(f"{what}: sha256 is not 64 hexadecimal digits")
    return sha256


def size_of(facts: Mapping[str, object], key: str) -> int:
    """Return a number of bytes in a message; LinkError without the peer's name."""
    n_bytes = facts.get(key)
    if type(n_bytes) is not int or not 0 <= n_bytes <= MOST_BLOB_BYTES:
        raise LinkError(f"{key} is not a number of bytes")
    return n_bytes


def session_of(facts: Mapping[str, object]) -> str:
    """Return the session in a message; LinkError without the peer's name."""
    session = facts.get("session")
    is_one = isinstance(session, str) and 0 < len(session) <= LONGEST_SESSION
    if not isinstance(session, str) or not is_one or not session.isprintable():
        raise LinkError(f"Close: session is not a text of {LONGEST_SESSION} characters at most")
    return session


def _rows(document: Mapping[str, object]) -> list[dict[str, object]]:
    rows = document.get("blobs")
    if not isinstance(rows, list) or len(rows) > MOST_BLOBS:
        raise LinkError(f"blobs is not a list of {MOST_BLOBS:,} at most")
    if not all(isinstance(row, dict) for row in rows):
        raise LinkError("blobs: an item is not an object")
    return rows
