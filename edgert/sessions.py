"""Saved conversations: messages, tokens and KV cache in one checksummed, replaceable file."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import pydantic

from edgert.errors import CapacityError, ConfigError, EdgertError, FormatError
from quant.tensor_file import open_tensor_file

# Layout: magic (8), header length (u32, little-endian), header (JSON), KV state, SHA-256 of all.
MAGIC = b"EDGERTS1"
VERSION: Literal[1] = 1
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 32
_LARGEST_HEADER_BYTES = 64 << 20
_CHUNK_BYTES = 4 << 20
_SAMPLE_BYTES = 4096
_N_SAMPLES = 64


class ModelIdentity(pydantic.BaseModel):
    """What a KV cache belongs to: a model file and the type of cached keys and values."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: int
    sha256: str
    cache_types: str

    @classmethod
    def of(cls, path: Path, name: str, cache_types: str) -> ModelIdentity:
        """Identify a model by the size and a hash of its header and of 64 places in its weights.

        Reading gigabytes for a full hash would take as long as loading the model.
        """
        shards = open_tensor_file(path).shards
        digest = hashlib.sha256()
        for shard in shards:
            with shard.path.open("rb") as file:
                _hash_bytes(file, shard.data_offset_bytes, digest)
                step = max(1, (shard.size_bytes - shard.data_offset_bytes) // _N_SAMPLES)
                for offset in range(shard.data_offset_bytes, shard.size_bytes, step):
                    file.seek(offset)
                    digest.update(file.read(_SAMPLE_BYTES))
        size_bytes = sum(shard.size_bytes for shard in shards)
        return cls(
            name=name,
            size_bytes=size_bytes,
            sha256=digest.hexdigest(),
            cache_types=cache_types,
        )


class _SavedMessage(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _SavedReply(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid", strict=True)

    text: str
    token_ids: list[int]


class _Header(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    version: Literal[1]
    model: ModelIdentity
    messages: list[_SavedMessage]
    replies: list[_SavedReply]
    token_ids: list[int]
    n_past: int
    state_bytes: int = pydantic.Field(ge=0)


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation and the KV cache that holds it.

    Attributes:
        messages: Role and content each.
        replies: Tokens of generated replies by their text.
        token_ids: One per cached position.
        state: The KV cache as the backend wrote it; empty when nothing is cached.
    """

    messages: tuple[dict[str, str], ...]
    replies: dict[str, tuple[int, ...]] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()
    state: bytes = b""


def save_session(path: Path, model: ModelIdentity, session: Session) -> None:
    """Write a session beside its place and move it there; an old file stays until the new is whole.

    Raises:
        ConfigError: the folder is missing or cannot be written.
        CapacityError: the disk is full.
    """
    header = _Header(
        version=VERSION,
        model=model,
        messages=[_SavedMessage.model_validate(message) for message in session.messages],
        replies=[
            _SavedReply(text=text, token_ids=list(ids)) for text, ids in session.replies.items()
        ],
        token_ids=list(session.token_ids),
        n_past=len(session.token_ids),
        state_bytes=len(session.state),
    )
    text = header.model_dump_json().encode()
    parts = (MAGIC, _LENGTH.pack(len(text)), text, session.state)
    try:
        _replace(path, parts)
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"{path}: {reason} while saving the session; an earlier one is untouched",
                needed_bytes=sum(len(part) for part in parts) + _DIGEST_BYTES,
                hint="free some space or save elsewhere",
            ) from error
        raise ConfigError(
            f"{path}: cannot save the session: {reason}; an earlier one is untouched",
            hint="choose a folder that exists and can be written",
        ) from error


def load_session(path: Path, model: ModelIdentity, n_ctx: int) -> Session:
    """Read and check a session completely.

    Args:
        path: A file that `save_session` wrote.
        model: The loaded model; the session must be of the same.
        n_ctx: Positions of the loaded context.

    Raises:
        ConfigError: no such file, another model, or more tokens than the context holds.
        FormatError: damaged, or not a session.
    """
    try:
        with path.open("rb") as file:
            header, state = _read(file, path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the session: {error.strerror or error}",
            hint="/save NAME writes one",
        ) from error
    _check_model(header.model, model, path)
    if header.n_past > n_ctx:
        raise ConfigError(
            f"{path}: the session holds {header.n_past:,} tokens, the context {n_ctx:,}",
            hint=f"use --ctx-size {header.n_past + 512}",
        )
    return Session(
        messages=tuple({"role": m.role, "content": m.content} for m in header.messages),
        replies={reply.text: tuple(reply.token_ids) for reply in header.replies},
        token_ids=tuple(header.token_ids),
        state=state,
    )


def _replace(path: Path, parts: tuple[bytes, ...]) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            digest = hashlib.sha256()
            for chunk in _chunks(parts):
                file.write(chunk)
                digest.update(chunk)
            file.write(digest.digest())
            file.flush()
            os.fsync(file.fileno())
        Path(name).replace(path)
    except BaseException:
        with suppress(OSError):
            Path(name).unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _chunks(parts: tuple[bytes, ...]) -> Iterator[memoryview]:
    for part in parts:
        view = memoryview(part)
        for start in range(0, len(view), _CHUNK_BYTES):
            yield view[start : start + _CHUNK_BYTES]


def _read(file: BinaryIO, path: Path) -> tuple[_Header, bytes]:
    """Read a session whose every length was checked against the size of the file."""
    size_bytes = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256()
    start = file.read(len(MAGIC) + _LENGTH.size)
    if start[: len(MAGIC)] != MAGIC:
        raise FormatError(f"starts with {start[:8]!r}, wanted {MAGIC!r}", path=path, offset=0)
    if len(start) < len(MAGIC) + _LENGTH.size:
        raise _cut_short(path, size_bytes)
    (length,) = _LENGTH.unpack(start[len(MAGIC) :])
    left = size_bytes - len(start) - _DIGEST_BYTES
    if length > min(left, _LARGEST_HEADER_BYTES):
        raise FormatError(
            f"header of {length:,} bytes in a file of {size_bytes:,}", path=path, offset=len(MAGIC)
        )
    text = file.read(length)
    digest.update(start + text)
    try:
        header = _Header.model_validate_json(text)
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"header: {where}: {first['msg']}", path=path) from error
    if header.state_bytes != left - length:
        raise FormatError(
            f"{left - length:,} bytes of KV cache, the header says {header.state_bytes:,}",
            path=path,
            hint="the file was cut short or changed",
        )
    state = file.read(header.state_bytes)
    digest.update(state)
    if file.read(_DIGEST_BYTES) != digest.digest():
        raise FormatError("the checksum is wrong", path=path, hint="the file is damaged")
    if header.n_past != len(header.token_ids) or bool(header.n_past) != bool(header.state_bytes):
        raise FormatError(
            f"{len(header.token_ids)} tokens, {header.n_past} positions and "
            f"{header.state_bytes:,} bytes of KV cache do not belong together",
            path=path,
        )
    return header, state


def _check_model(saved: ModelIdentity, loaded: ModelIdentity, path: Path) -> None:
    if (saved.size_bytes, saved.sha256) != (loaded.size_bytes, loaded.sha256):
        raise ConfigError(
            f"{path}: the session is of {saved.name} ({saved.size_bytes:,} bytes, "
            f"{saved.sha256[:12]}), loaded is {loaded.name} ({loaded.size_bytes:,} bytes, "
            f"{loaded.sha256[:12]})",
            hint="load the model it was saved with",
        )
    if saved.cache_types != loaded.cache_types:
        raise ConfigError(
            f"{path}: the session has a KV cache of {saved.cache_types}, "
            f"loaded is {loaded.cache_types}",
            hint="use the --cache-type-k and --cache-type-v it was saved with",
        )


def _cut_short(path: Path, size_bytes: int) -> EdgertError:
    return FormatError(f"{size_bytes} bytes are too few for a session", path=path)


def _hash_bytes(file: BinaryIO, size_bytes: int, digest: hashlib._Hash) -> None:
    left = size_bytes
    while left > 0:
        chunk = file.read(min(left, _CHUNK_BYTES))
        if not chunk:
            return
        digest.update(chunk)
        left -= len(chunk)
