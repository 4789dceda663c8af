"""Token embeddings and the like: only the rows that a batch looks up are read."""

from __future__ import annotations

import ctypes

from edgert.errors import BackendError
from edgert.llama.lib import Symbols, tensor_at
from edgert.weights.flash import PAGE_BYTES, Extent, FlashReader, page_end, wait_all
from edgert.weights.memory import Region
from partition.residency import MOST_ROWS_BYTES


class RowTable:
    """A weight of which only looked-up rows are in memory, at the addresses they would have.

    Rows stay until they exceed a few MB together; then all are dropped and the batch's own rows are
    read again, so a long text costs no more than a short one.

    Args:
        reader: Reads the file.
        libc: For the reserved addresses.
        extent: The whole weight in the file; its address is ignored.
        row_bytes: Length of a row.
    """

    def __init__(self, reader: FlashReader, libc: Symbols, extent: Extent, row_bytes: int) -> None:
        self._reader = reader
        self._extent = extent
        self._row_bytes = row_bytes
        skew = extent.offset_bytes % PAGE_BYTES
        self._region = Region(libc, page_end(skew + extent.size_bytes), huge=False)
        self.address = self._region.address + skew
        self._kept: set[int] = set()
        self.bytes_read = 0

    @property
    def kept_bytes(self) -> int:
        """Memory that rows take now."""
        return min(len(self._kept) * self._pages_of_a_row(), self._region.size_bytes)

    def fill(self, node: int) -> None:
        """Read the rows that a GET_ROWS node is about to look up.

        Raises:
            FormatError: they cannot be read.
        """
        wanted = set(_row_ids(node))
        missing = wanted - self._kept
        if (len(missing) + len(self._kept)) * self._pages_of_a_row() > MOST_ROWS_BYTES:
            self._region.drop()
            self._kept.clear()
            missing = wanted
        if not missing:
            return
        n_bytes = len(missing) * self._pages_of_a_row()
        watch = self._reader.observer.reading(self._extent.name, n_bytes)
        watch.began()
        wait_all([self._reader.submit(self._row(row)) for row in sorted(missing)])
        watch.ended()
        self._kept |= missing
        self.bytes_read += n_bytes

    def close(self) -> None:
        """Give the addresses back."""
        self._region.close()

    def _row(self, row: int) -> Extent:
        first = self._extent.offset_bytes + row * self._row_bytes
        return Extent(
            self._extent.file_index,
            first,
            self._row_bytes,
            self.address + row * self._row_bytes,
            self._extent.name,
        )

    def _pages_of_a_row(self) -> int:
        return page_end(self._row_bytes) + PAGE_BYTES


def _row_ids(node: int) -> list[int]:
    """Return the ids (int32) that a GET_ROWS node reads from its second operand."""
    tensor = tensor_at(node)
    ids = tensor_at(tensor.src[1] or 0)
    count = ids.ne[0] * ids.ne[1] * ids.ne[2] * ids.ne[3]
    row_ids = list((ctypes.c_int32 * count).from_address(ids.data or 0))
    n_rows = tensor_at(tensor.src[0] or 0).ne[1]
    wrong = [row for row in row_ids if not 0 <= row < n_rows]
    if wrong:
        raise BackendError(f"row {wrong[0]} is looked up in a table of {n_rows}")
    return row_ids
