"""Sends blobs to a host: one upload, and all that it lacks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import grpc

from edgert.errors import Cancelled, EdgertError, LinkError, LinkTimeout
from edgert.hosts.service.handlers import BlobState, OfferedBlob
from edgert.hosts.service.limits import CHUNK_BYTES, disk_s
from edgert.hosts.service.messages import Metadata, encode
from edgert.hosts.service.progress import TransferListener, TransferProgress, ignore_transfer
from edgert.packing.blobs import Blob

if TYPE_CHECKING:
    from edgert.hosts.service.client import ServiceClient

_LOOK_S = 0.2


def _never() -> bool:
    return False


def send_blobs(
    client: ServiceClient,
    blobs: Sequence[Blob],
    listener: TransferListener = ignore_transfer,
    stopped: Callable[[], bool] = _never,
) -> None:
    """Send what a host lacks of some blobs; called again after a failure, it continues.

    Args:
        client: Of the host.
        blobs: Each once.
        listener: Hears of progress.
        stopped: Asked now and then whether to give up.

    Raises:
        LinkError, LinkTimeout, Cancelled, ConfigError, FormatError: as `ServiceClient.upload`.
    """
    offered = [OfferedBlob(blob.sha256, blob.size_bytes) for blob in blobs]
    for blob, state in zip(blobs, client.offer(offered), strict=True):
        if not state.is_whole:
            try:
                _send(client, blob, state, listener, stopped)
            except LinkTimeout:
                raise  # it would not answer the next offer either
            except LinkError:
                again = {found.sha256: found for found in client.offer(offered)}[blob.sha256]
                if state.there_bytes == 0 or again.there_bytes:
                    raise
                # What was there was damaged, and is deleted now.
                _send(client, blob, again, listener, stopped)
        else:
            listener(TransferProgress(blob.sha256, blob.size_bytes, blob.size_bytes))


def _send(
    client: ServiceClient,
    blob: Blob,
    state: BlobState,
    listener: TransferListener,
    stopped: Callable[[], bool],
) -> None:
    done = state.there_bytes

    def advance(n_bytes: int) -> None:
        nonlocal done
        done += n_bytes
        listener(TransferProgress(blob.sha256, done, blob.size_bytes))

    advance(0)
    client.upload(blob, state.there_bytes, advance, stopped)


class Upload:
    """One blob on its way.

    Args:
        blob: What.
        begin_bytes: From where on.
        advance: Told how many bytes more are on their way, in a thread of gRPC's.
    """

    def __init__(self, blob: Blob, begin_bytes: int, advance: Callable[[int], None]) -> None:
        self._blob = blob
        self._begin_bytes = begin_bytes
        self._advance = advance
        self._n_sent = 0
        self._over = threading.Event()
        self._problem: EdgertError | None = None

    def send(
        self,
        method: grpc.StreamUnaryMultiCallable[bytes, bytes],
        peer: str,
        stall_s: float,
        stopped: Callable[[], bool],
        metadata: Metadata,
    ) -> None:
        """Send it, and wait until the host has it.

        Raises:
            grpc.RpcError: the call failed.
            EdgertError: as `ServiceClient.upload`.
        """
        call = method.future(self._messages(), metadata=metadata)
        call.add_done_callback(lambda _: self._over.set())
        patience_s = stall_s + disk_s(self._blob.size_bytes)
        n_sent, waited_s = 0, 0.0
        try:
            while not self._over.wait(_LOOK_S):
                waited_s = waited_s + _LOOK_S if self._n_sent == n_sent else 0.0
                n_sent = self._n_sent
                if self._problem is not None:
                    raise self._problem
                if stopped():
                    raise Cancelled("the upload was stopped", hint="start again to continue it")
                if waited_s >= patience_s:
                    raise LinkTimeout(f"{peer}: takes no more of an upload for {patience_s:.3g} s")
        finally:
            call.cancel()
        if self._problem is not None:
            raise self._problem
        call.result()

    def _messages(self) -> Iterator[bytes]:
        yield encode({"sha256": self._blob.sha256, "begin_bytes": self._begin_bytes})
        try:
            for content in self._blob.read(self._begin_bytes):
                for start in range(0, len(content), CHUNK_BYTES):
                    chunk = content[start : start + CHUNK_BYTES]
                    yield chunk
                    self._n_sent += len(chunk)
                    self._advance(len(chunk))
        except EdgertError as error:
            self._problem = error
            self._over.wait()  # ending here would look like the end of the blob
