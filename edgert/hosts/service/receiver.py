"""Takes blobs from peers into a folder: offered ones only, continued where they broke off."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from edgert.errors import ConfigError, FormatError, LinkError
from edgert.hosts.service.handlers import BlobState, OfferedBlob
from edgert.hosts.service.progress import TransferListener, TransferProgress, ignore_transfer
from edgert.model_files import FileHashes
from edgert.packing.blobs import Blob, BlobStore

MARGIN_BYTES = 256 << 20
OFFER_AGAIN = "wait for it, then offer again"


def _unheard(n_bytes: int) -> None:
    del n_bytes


class BlobReceiver:
    """A store of blobs that peers fill; used by several threads.

    Args:
        folder: Blobs are in `sha256/` in it; made when it is missing.
        hashes: Of finished blobs; with a cache folder, whole blobs are hashed once.
        margin_bytes: What uploads leave free on the disk.
        listener: Hears of progress, in the thread of each upload.
    """

    def __init__(
        self,
        folder: Path,
        hashes: FileHashes | None = None,
        margin_bytes: int = MARGIN_BYTES,
        listener: TransferListener = ignore_transfer,
    ) -> None:
        self._folder = folder
        self._hashes = hashes or FileHashes()
        self._margin_bytes = margin_bytes
        self._listener = listener
        self._lock = threading.Lock()
        self._offers: dict[str, dict[str, int]] = {}
        self._running: dict[str, int] = {}

    def place(self, sha256: str) -> Path:
        """Return where a blob is, once it is whole."""
        return self._store().place(_blob(sha256, 0))

    def offer(self, peer: str, blobs: tuple[OfferedBlob, ...]) -> tuple[BlobState, ...]:
        """Look what is there of blobs that a peer wants to upload; its earlier offer is void.

        Raises:
            CapacityError: the disk is too full for what is missing.
            ConfigError: the folder cannot be written to.
        """
        store = self._store()
        states = []
        for offered in blobs:
            blob = _blob(offered.sha256, offered.size_bytes)
            place = store.place(blob)
            is_whole = store.is_whole(place, blob)
            there = blob.size_bytes if is_whole else _begun_bytes(place, blob)
            states.append(BlobState(blob.sha256, blob.size_bytes, there, is_whole))
        missing = {state.sha256: state.size_bytes for state in states if not state.is_whole}
        with self._lock:
            self._check_room(store, missing)
            self._offers[peer] = missing
        return tuple(states)

    def receive(self, peer: str, sha256: str, begin_bytes: int, chunks: Iterator[bytes]) -> None:
        """Store a blob; what arrived before a failure is kept for the next upload.

        Args:
            peer: Who uploads.
            sha256: One that it offered.
            begin_bytes: Where `chunks` begin, as the answer to the offer said.
            chunks: Everything from there on.

        Raises:
            FormatError: what arrived is not the blob; it is deleted.
            CapacityError: the disk is full.
            ConfigError: it was not offered, or the folder cannot be written to.
            LinkError: another upload of it is running, or this one ended too early; and what
                `chunks` raises.
        """
        with self._turn(peer, sha256) as size_bytes:
            done = n_reads = 0

            def advance(n_bytes: int) -> None:
                nonlocal done
                done += n_bytes
                self._listener(TransferProgress(sha256, done, size_bytes))

            def read(offset: int) -> Iterator[bytes]:
                nonlocal n_reads
                n_reads += 1
                _check_begin(offset, begin_bytes, is_first=n_reads == 1)
                return _all_of(chunks, begin_bytes, size_bytes)

            blob = Blob(sha256, size_bytes, f"upload by {peer} of {sha256}", read)
            self._store(advance).put(blob)

    def _store(self, advance: Callable[[int], None] = _unheard) -> BlobStore:
        return BlobStore(self._folder, self._hashes, advance)

    @contextmanager
    def _turn(self, peer: str, sha256: str) -> Iterator[int]:
        """Hold a blob that was offered, and give its size."""
        store = self._store()
        with self._lock:
            size_bytes = self._offers.get(peer, {}).get(sha256)
            if size_bytes is None:
                raise ConfigError(
                    f"{sha256} is not in the last offer of {peer}", hint="offer it, then upload it"
                )
            if sha256 in self._running:
                raise LinkError(f"another upload of {sha256} is running", hint=OFFER_AGAIN)
            self._check_room(store, {sha256: size_bytes})
            self._running[sha256] = size_bytes
        try:
            yield size_bytes
        finally:
            with self._lock:
                del self._running[sha256]

    def _check_room(self, store: BlobStore, missing: dict[str, int]) -> None:
        """Refuse what does not fit beside uploads that are running."""
        wanted = {**self._running, **missing}
        if missing:
            blobs = tuple(_blob(sha256, n_bytes) for sha256, n_bytes in wanted.items())
            store.check_room(blobs, self._margin_bytes)


def _blob(sha256: str, size_bytes: int) -> Blob:
    return Blob(sha256, size_bytes, sha256, lambda _: iter(()))


def _begun_bytes(place: Path, blob: Blob) -> int:
    """Return where an upload continues: behind what the store keeps of an unfinished blob."""
    try:
        return min(place.with_name(f"{place.name}.part").stat().st_size, blob.size_bytes)
    except FileNotFoundError:
        return 0


def _all_of(chunks: Iterator[bytes], begin_bytes: int, size_bytes: int) -> Iterator[bytes]:
    """Refuse an end before the end, which is also what a cancelled call may look like."""
    done = begin_bytes
    for chunk in chunks:
        done += len(chunk)
        yield chunk
    if done < size_bytes:
        raise LinkError(
            f"the upload ended after {done:,} of {size_bytes:,} bytes; what arrived is kept",
            hint="upload again to continue",
        )


def _check_begin(offset: int, begin_bytes: int, *, is_first: bool) -> None:
    """Refuse chunks that begin elsewhere; the store asks again where what it has is wrong."""
    if not is_first:
        raise FormatError(
            "what arrived earlier and now is not the blob that was offered; it is deleted",
            hint="offer it again and send it from its beginning",
        )
    if offset != begin_bytes:
        raise FormatError(
            f"{offset:,} bytes are there, the upload begins after {begin_bytes:,}",
            hint="offer it again",
        )
