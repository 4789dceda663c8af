"""Anonymous memory for weights: reserved addresses that cost memory only where they are filled."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

from edgert.errors import CapacityError
from edgert.llama.lib import Symbols
from edgert.weights.flash import PAGE_BYTES, page_end

_PROT_READ_WRITE = 0x1 | 0x2
_MAP_PRIVATE, _MAP_FIXED, _MAP_ANONYMOUS, _MAP_NORESERVE = 0x02, 0x10, 0x20, 0x4000
_MADV_DONTNEED, _MADV_HUGEPAGE, _MADV_NOHUGEPAGE = 4, 14, 15
_HUGE_PAGE_BYTES = 2 << 20


class Region:
    """A range of reserved addresses.

    Args:
        libc: With `mmap`, `munmap` and `madvise` prototypes.
        size_bytes: Length; rounded up to huge pages when `huge`.
        huge: Back it with huge pages, aligned to them: an order of magnitude fewer page faults
            while filling, and page tables of a few bytes per MB.
    """

    def __init__(self, libc: Symbols, size_bytes: int, *, huge: bool) -> None:
        grain = _HUGE_PAGE_BYTES if huge else PAGE_BYTES
        self.size_bytes = -(-max(size_bytes, 1) // grain) * grain
        self._libc = libc
        self._length = self.size_bytes + (grain if huge else 0)
        start = libc.mmap(None, self._length, _PROT_READ_WRITE, _flags(), -1, 0)
        if start in (None, ctypes.c_void_p(-1).value):
            raise CapacityError(
                f"cannot reserve {self._length:,} bytes of addresses: errno {ctypes.get_errno()}",
                hint="check ulimit -v",
            )
        self._start: int | None = start
        self.address: int = -(-start // grain) * grain
        advice = _MADV_HUGEPAGE if huge else _MADV_NOHUGEPAGE
        libc.madvise(self.address, self.size_bytes, advice)

    def drop(self) -> None:
        """Give the memory back and keep the addresses; the bytes read as zero from then on."""
        self._libc.madvise(self.address, self.size_bytes, _MADV_DONTNEED)

    def close(self) -> None:
        """Give memory and addresses back; calling again does nothing."""
        if self._start is not None:
            self._libc.munmap(self._start, self._length)
            self._start = None


def cover_twin(libc: Symbols, name: str = "/memfd:edgert-twin") -> None:
    """Put zero pages over every mapping of a sparse twin, so that no address in it can fault.

    The addresses stay llama.cpp's to unmap.
    """
    for start, end in _mappings_of(name):
        address = libc.mmap(start, end - start, _PROT_READ_WRITE, _flags() | _MAP_FIXED, -1, 0)
        if address != start:
            raise CapacityError(f"cannot map over {end - start:,} bytes: {ctypes.get_errno()}")
        libc.madvise(start, end - start, _MADV_NOHUGEPAGE)


def resident_bytes() -> int:
    """Return this process's resident memory, shared file pages included."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * PAGE_BYTES


def virtual_bytes() -> int:
    """Return the size of this process's address space."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    return pages * PAGE_BYTES


def span_bytes(offset_bytes: int, size_bytes: int) -> int:
    """Return the length of the pages around a file range."""
    return page_end(offset_bytes % PAGE_BYTES + size_bytes)


def _mappings_of(name: str) -> Iterator[tuple[int, int]]:
    for line in Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines():
        if name in line:
            start, _, end = line.split(" ", 1)[0].partition("-")
            yield int(start, 16), int(end, 16)


def _flags() -> int:
    return _MAP_PRIVATE | _MAP_ANONYMOUS | _MAP_NORESERVE
