"""Saved conversations: messages, tokens and KV cache in one checksummed, replaceable file."""

from __future__ import annotations

import errno
import hashlib
import os
import struct
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import pydantic

from edgert.errors import BackendError, CapacityError, ConfigError, FormatError
from quant.tensor_file import TensorFile

# Layout: the KV cache as the backend writes it to a file (so that no second copy of it is ever in
# memory; llama.cpp ignores what follows), a JSON header, then the footer: bytes of the KV cache
# (u64), bytes of the header (u32), magic (8), and the SHA-256 of everything before it (32).
MAGIC = b"EDGERTS1"
VERSION: Literal[1] = 1
_FOOTER = struct.Struct("<QI8s")
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
    def of(cls, file: TensorFile, name: str, cache_types: str) -> ModelIdentity:
        """Identify a model by the size and a hash of its header and of 64 places in its weights.

        Reading gigabytes for a full hash would take as long as loading the model.
        """
        digest = hashlib.sha256()
        for shard in file.shards:
            with shard.path.open("rb") as stream:
                _hash_bytes(stream, digest, shard.data_offset_bytes)
                step = max(1, (shard.size_bytes - shard.data_offset_bytes) // _N_SAMPLES)
                for offset in range(shard.data_offset_bytes, shard.size_bytes, step):
                    stream.seek(offset)
                    digest.update(stream.read(_SAMPLE_BYTES))
        size_bytes = sum(shard.size_bytes for shard in file.shards)
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


@dataclass(frozen=True, slots=True)
class Session:
    """A conversation and the tokens in its KV cache; the cache itself stays in the file.

    Attributes:
        messages: Role and content each.
        replies: Tokens of generated replies by their text.
        token_ids: One per cached position.
    """

    messages: tuple[dict[str, str], ...]
    replies: dict[str, tuple[int, ...]] = field(default_factory=dict)
    token_ids: tuple[int, ...] = ()


def save_session(
    path: Path, model: ModelIdentity, session: Session, write_state: Callable[[Path], None]
) -> None:
    """Write a session beside its place and move it there; an old file stays until the new is whole.

    Args:
        path: The file to write or replace.
        model: What the KV cache belongs to.
        session: What to save.
        write_state: Writes the KV cache to a file; not called when no token is cached.

    Raises:
        ConfigError: the folder is missing or cannot be written.
        CapacityError: the disk is full.
    """
    try:
        _replace(path, model, session, write_state)
    except BackendError as error:
        raise ConfigError(
            f"{path}: cannot save the session: {error.message}; an earlier one is untouched",
            hint="is the disk full?",
        ) from error
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CapacityError(
                f"{path}: {reason} while saving the session; an earlier one is untouched",
                hint="free some space or save elsewhere",
            ) from error
        raise ConfigError(
            f"{path}: cannot save the session: {reason}; an earlier one is untouched",
            hint="choose a folder that exists and can be written",
        ) from error


def load_session(path: Path, model: ModelIdentity, n_ctx: int) -> Session:
    """Read and check a session completely, its KV cache by checksum only.

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
            header = _read(file, path)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the session: {error.strerror or error}",
            hint="/save NAME writes one",
        ) from error
    _check_model(header.model, model, path)
    n_tokens = len(header.token_ids)
    if n_tokens > n_ctx:
        raise ConfigError(
            f"{path}: the session holds {n_tokens:,} tokens, the context {n_ctx:,}",
            hint=f"use --ctx-size {n_tokens + 512}",
        )
    return Session(
        messages=tuple({"role": m.role, "content": m.content} for m in header.messages),
        replies={reply.text: tuple(reply.token_ids) for reply in header.replies},
        token_ids=tuple(header.token_ids),
    )


def _header_json(model: ModelIdentity, session: Session) -> bytes:
    header = _Header(
        version=VERSION,
        model=model,
        messages=[_SavedMessage.model_validate(message) for message in session.messages],
        replies=[
            _SavedReply(text=text, token_ids=list(ids)) for text, ids in session.replies.items()
        ],
        token_ids=list(session.token_ids),
    )
    return header.model_dump_json().encode()


def _replace(
    path: Path, model: ModelIdentity, session: Session, write_state: Callable[[Path], None]
) -> None:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    os.close(handle)
    temporary = Path(name)
    try:
        if session.token_ids:
            write_state(temporary)
        with temporary.open("r+b") as file:
            digest = hashlib.sha256()
            state_bytes = _hash_bytes(file, digest, None)
            text = _header_json(model, session)
            end = text + _FOOTER.pack(state_bytes, len(text), MAGIC)
            digest.update(end)
            file.write(end + digest.digest())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(file: BinaryIO, path: Path) -> _Header:
    """Read a session whose every length was checked against the size of the file."""
    size_bytes = os.fstat(file.fileno()).st_size
    body_bytes = size_bytes - _FOOTER.size - _DIGEST_BYTES
    if body_bytes < 0:
        raise FormatError(f"{size_bytes} bytes are too few for a session", path=path)
    file.seek(body_bytes)
    state_bytes, header_bytes, magic = _FOOTER.unpack(file.read(_FOOTER.size))
    if magic != MAGIC:
        raise FormatError(
            f"ends with {magic!r}, wanted {MAGIC!r}",
            path=path,
            offset=body_bytes,
            hint="not a session, or cut short",
        )
    if header_bytes > _LARGEST_HEADER_BYTES or state_bytes + header_bytes != body_bytes:
        raise FormatError(
            f"KV cache of {state_bytes:,} and header of {header_bytes:,} bytes "
            f"in a file of {size_bytes:,}",
            path=path,
            offset=body_bytes,
        )
    file.seek(0)
    digest = hashlib.sha256()
    _hash_bytes(file, digest, body_bytes + _FOOTER.size)
    if file.read(_DIGEST_BYTES) != digest.digest():
        raise FormatError("the checksum is wrong", path=path, hint="the file is damaged")
    file.seek(state_bytes)
    try:
        header = _Header.model_validate_json(file.read(header_bytes))
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise FormatError(f"header: {where}: {first['msg']}", path=path) from error
    if bool(header.token_ids) != bool(state_bytes):
        raise FormatError(
            f"{len(header.token_ids)} tokens and {state_bytes:,} bytes of KV cache "
            "do not belong together",
            path=path,
        )
    return header


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


def _hash_bytes(file: BinaryIO, digest: hashlib._Hash, size_bytes: int | None) -> int:
    """Hash the next `size_bytes`, None for all there are; return how many that were."""
    done = 0
    while size_bytes is None or done < size_bytes:
        wanted = _CHUNK_BYTES if size_bytes is None else min(size_bytes - done, _CHUNK_BYTES)
        chunk = file.read(wanted)
        if not chunk:
            break
        digest.update(chunk)
        done += len(chunk)
    return done
