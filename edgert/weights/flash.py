"""Reads weight bytes from flash past the page cache: direct I/O, several requests in flight."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import Cancelled, ConfigError, FormatError
from edgert.observer import UNOBSERVED, ReadWatch, RunObserver

PAGE_BYTES = mmap.PAGESIZE
REQUEST_BYTES = 2 << 20
N_IN_FLIGHT = 8


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes of a file that belong at an address.

    Attributes:
        file_index: Which file of the reader.
        offset_bytes: Where in the file; congruent to `address` modulo the page size.
        size_bytes: How many.
        address: Where in memory; the pages around it belong to the reader while it reads.
        name: What these bytes are, for error messages.
    """

    file_index: int
    offset_bytes: int
    size_bytes: int
    address: int
    name: str


class Ticket:
    """The reads of one extent: done when every request is."""

    __slots__ = ("_done", "_left", "_lock", "error", "watch")

    def __init__(self, n_requests: int, watch: ReadWatch = UNOBSERVED) -> None:
        self.watch = watch
        self._left = n_requests
        self._lock = threading.Lock()
        self._done = threading.Event()
        self.error: Exception | None = None
        if n_requests == 0:
            self._done.set()

    @property
    def done(self) -> bool:
        """Whether nothing is left to read."""
        return self._done.is_set()

    def finish_one(self, error: Exception | None) -> None:
        """Count one request as finished."""
        with self._lock:
            self.error = self.error or error
            self._left -= 1
            if self._left == 0:
                self._finish()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until done, at most `timeout_s`; say whether it is."""
        return self._done.wait(timeout_s)

    def _finish(self) -> None:
        try:
            if self.error is None:
                self.watch.ended()
        finally:
            self._done.set()


def wait_all(tickets: Sequence[Ticket]) -> None:
    """Wait until nothing is in flight any more, then raise the first error there was.

    Memory that is being read into must not be given back, so every ticket is waited for even when
    an earlier one failed or the wait is interrupted.
    """
    interrupted: KeyboardInterrupt | None = None
    for ticket in tickets:
        while not ticket.done:
            try:
                ticket.wait()
            except KeyboardInterrupt as error:
                interrupted = error
    if interrupted is not None:
        raise interrupted
    for ticket in tickets:
        if ticket.error is not None:
            raise ticket.error


class FlashReader:
    """A pool of threads that read extents of a few files.

    A file system without direct I/O is read through the page cache, which is told to drop each
    piece at once; `direct` says which.

    Args:
        paths: The files.
        sizes_bytes: Their lengths as validated; a file that shrank since is an error.
        n_in_flight: Requests at once.
        direct: Try direct I/O.
        observer: Told of reads by those who ask for them.

    Raises:
        ConfigError: a file cannot be opened.
        FormatError: a file is not as long as it was when it was validated.
    """

    def __init__(
        self,
        paths: list[Path],
        sizes_bytes: list[int],
        n_in_flight: int = N_IN_FLIGHT,
        *,
        direct: bool = True,
        observer: RunObserver = UNOBSERVED,
    ) -> None:
        self.observer = observer
        self._paths = paths
        self._sizes_bytes = sizes_bytes
        self._descriptors: list[int] = []
        self._retired: list[int] = []  # direct ones that other threads may still be reading from
        self.direct = direct
        self._stopped = False
        try:
            for path, size_bytes in zip(paths, sizes_bytes, strict=True):
                self._descriptors.append(self._open(path))
                _check_size(self._descriptors[-1], path, size_bytes)
        except FormatError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise ConfigError(f"cannot read {error.filename}: {error.strerror}") from error
        self._pool = ThreadPoolExecutor(n_in_flight, thread_name_prefix="edgert-flash")
        self._lock = threading.Lock()

    def submit(self, extent: Extent, watch: ReadWatch = UNOBSERVED) -> Ticket:
        """Start reading an extent, split into page-aligned requests."""
        requests = list(_requests(extent))
        ticket = Ticket(len(requests), watch)
        for offset, size in requests:
            address = extent.address + offset - extent.offset_bytes
            self._pool.submit(self._run, extent, offset, size, address, ticket)
        return ticket

    def read(self, extent: Extent, watch: ReadWatch = UNOBSERVED) -> None:
        """Read an extent now.

        Raises:
            FormatError: the file is shorter than it was, or the device failed.
        """
        wait_all([self.submit(extent, watch)])

    def read_here(self, extent: Extent) -> None:
        """Read an extent in the calling thread.

        Raises:
            FormatError: as `read`.
            Cancelled: reading was stopped.
        """
        for offset, size in _requests(extent):
            address = extent.address + offset - extent.offset_bytes
            self._read_named(extent, offset, size, address)

    def stop(self) -> None:
        """Let every read that has not begun fail at once; for whoever gives up."""
        self._stopped = True

    def close(self) -> None:
        """Wait for running reads and close the files."""
        pool = getattr(self, "_pool", None)
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)
        for number in (*self._descriptors, *self._retired):
            os.close(number)
        self._descriptors, self._retired = [], []

    def _open(self, path: Path) -> int:
        flags = os.O_RDONLY | os.O_CLOEXEC
        if self.direct:
            try:
                return os.open(path, flags | os.O_DIRECT)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self.direct = False
        return os.open(path, flags)

    def _run(self, extent: Extent, offset: int, size: int, address: int, ticket: Ticket) -> None:
        error: Exception | None = None
        try:
            ticket.watch.began()
            self._read_named(extent, offset, size, address)
        except Exception as failure:  # noqa: BLE001  the top of a thread; whoever waits raises it
            error = failure
        ticket.finish_one(error)

    def _read_named(self, extent: Extent, offset: int, size: int, address: int) -> None:
        try:
            self._read_or_fall_back(extent, offset, size, address)
        except OSError as failure:
            raise FormatError(
                f"cannot be read: {failure.strerror}",
                path=self._paths[extent.file_index], offset=offset, tensor=extent.name,
                hint="the device reported an error; check the disk, then the file's checksum",
            ) from failure  # fmt: skip

    def _read_or_fall_back(self, extent: Extent, offset: int, size: int, address: int) -> None:
        """Read; some file systems allow direct I/O when opening and refuse it when reading."""
        if self._stopped:
            raise Cancelled("reading was stopped")
        direct = self.direct
        try:
            self._read_exactly(extent, offset, size, address)
        except OSError as error:
            if error.errno != errno.EINVAL or not direct:
                raise
            self._go_buffered()
            self._read_exactly(extent, offset, size, address)

    def _go_buffered(self) -> None:
        with self._lock:
            if self.direct:
                self.direct = False
                self._retired = self._descriptors
                self._descriptors = [self._open(path) for path in self._paths]

    def _read_exactly(self, extent: Extent, offset: int, size: int, address: int) -> None:
        number = self._descriptors[extent.file_index]
        wanted = min(size, self._sizes_bytes[extent.file_index] - offset)
        view = memoryview((ctypes.c_char * size).from_address(address)).cast("B")
        got = 0
        while got < wanted:
            count = os.preadv(number, [view[got:]], offset + got)
            if count == 0:
                raise FormatError(
                    f"file ended early: {wanted - got:,} bytes are missing; it shrank while in use",
                    path=self._paths[extent.file_index], offset=offset + got, tensor=extent.name,
                    hint="restore the file and load it again",
                )  # fmt: skip
            got += count
        if not self.direct:
            os.posix_fadvise(number, offset, size, os.POSIX_FADV_DONTNEED)


def _check_size(number: int, path: Path, size_bytes: int) -> None:
    """Refuse a file that is not the one whose headers were validated."""
    now_bytes = os.fstat(number).st_size
    if now_bytes != size_bytes:
        raise FormatError(
            f"file has {now_bytes:,} bytes, {size_bytes:,} when it was checked: it changed",
            path=path,
            hint="load it again",
        )


def page_start(offset_bytes: int) -> int:
    """Round down to a page."""
    return offset_bytes // PAGE_BYTES * PAGE_BYTES


def page_end(offset_bytes: int) -> int:
    """Round up to a page."""
    return -(-offset_bytes // PAGE_BYTES) * PAGE_BYTES


def _requests(extent: Extent) -> list[tuple[int, int]]:
    """Cut an extent's pages into requests of about equal size, at most `REQUEST_BYTES`."""
    first = page_start(extent.offset_bytes)
    end = page_end(extent.offset_bytes + extent.size_bytes)
    n_requests = max(1, -(-(end - first) // REQUEST_BYTES))
    step = page_end(-(-(end - first) // n_requests))
    return [(start, min(step, end - start)) for start in range(first, end, step)]
