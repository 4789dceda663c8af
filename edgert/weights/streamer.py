"""Moves streamed weights through a window while llama.cpp computes: the tap's primitive *resident*.

A streamed tensor has no home: just before the node that reads it, its data pointer is set to the
place in the window where its bytes have arrived. The window is recycled, never unmapped, so no page
fault and no zeroing is paid after the first turn.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgert.errors import BackendError
from edgert.llama.lib import tensor_at
from edgert.weights.flash import PAGE_BYTES, Extent, FlashReader, Ticket, page_end
from edgert.weights.ring import Ring
from edgert.weights.rows import RowTable


@dataclass(frozen=True, slots=True)
class Streamed:
    """A weight that streams.

    Attributes:
        name: The tensor.
        file_index: Which file of the reader.
        offset_bytes: Where in it.
        size_bytes: How many bytes.
        addresses: Its `ggml_tensor` structures.
    """

    name: str
    file_index: int
    offset_bytes: int
    size_bytes: int
    addresses: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Window:
    """Memory that weights pass through: a ring of places, from `address` on."""

    ring: Ring
    address: int


@dataclass(frozen=True, slots=True)
class Operations:
    """Numbers of ggml operations: row look-ups, and what is worth computing while waiting."""

    get_rows: int
    products: frozenset[int]


@dataclass(slots=True)
class _Arrival:
    """A weight on its way into the window, or there; `pass_number` is when it was asked for."""

    weight: Streamed
    extent: Extent
    ticket: Ticket
    pass_number: int


class Streamer:
    """Loads weights in order of use, as far ahead as the window allows (`GraphObserver`).

    The graph is split after each node that reads a streamed weight, so that its place can be filled
    again; and after every matrix product while the next weight has not arrived, so that what can be
    computed meanwhile is.

    Args:
        reader: Reads the files.
        window: Where weights pass through.
        order: Streamed weights in order of use.
        tables: Row tables by the addresses of their tensors.
        operations: ggml's numbers of the operations to watch for.
    """

    def __init__(
        self,
        reader: FlashReader,
        window: Window,
        order: Sequence[Streamed],
        tables: Mapping[int, RowTable],
        operations: Operations,
    ) -> None:
        self._reader = reader
        self._observer = reader.observer
        self._ring = window.ring
        self._window_address = window.address
        self._order = order
        self._tables = tables
        self._operations = operations
        self._by_address = {a: weight for weight in order for a in weight.addresses}
        self._arrivals: deque[_Arrival] = deque()
        self._in_use: _Arrival | None = None
        self._next_load = 0
        self._position = 0
        self._pass_number = 0
        self.bytes_read = 0
        self.stall_s = 0.0

    def begin_pass(self) -> None:
        """Start at the first weight; what was read ahead for it is kept."""
        if self._position % max(1, len(self._order)):
            self._drop_arrivals()
        self._position = 0
        self._pass_number += 1
        self._top_up()

    def end_pass(self) -> None:
        """Give back the last weight's place, also after a pass that ended early."""
        self._release()
        self._top_up()

    def before(self, node: int) -> bool:
        """Bind what `node` reads, waiting for it to arrive; True where the graph must split."""
        tensor = tensor_at(node)
        first, second = tensor.src[0] or 0, tensor.src[1] or 0
        table = self._tables.get(first)
        if table is not None and tensor.op == self._operations.get_rows:
            table.fill(node)
            tensor_at(first).data = table.address
            return True
        weight = self._by_address.get(first) or self._by_address.get(second)
        if weight is not None:
            self._bind(weight)
            return True
        return tensor.op in self._operations.products and not self._has_arrived()

    def after(self, node: int) -> None:
        """Give back the place of what was read, and read further ahead."""
        del node
        self._release()
        self._top_up()

    def drain(self) -> None:
        """Wait for running reads; nothing is in the window afterwards."""
        self._release()
        self._drop_arrivals()

    def _bind(self, weight: Streamed) -> None:
        if self._in_use is not None:
            raise BackendError(f"{weight.name} is read before {self._in_use.weight.name} is done")
        arrival = self._next_arrival(weight)
        self._wait(arrival)
        if arrival.ticket.error is not None and arrival.pass_number < self._pass_number:
            # It was read ahead of this pass, and what failed then may be well again.
            arrival.ticket = self._submit(weight, arrival.extent)
            self._wait(arrival)
        self._in_use = arrival
        if arrival.ticket.error is not None:
            raise arrival.ticket.error
        for address in weight.addresses:
            tensor_at(address).data = arrival.extent.address

    def _wait(self, arrival: _Arrival) -> None:
        if arrival.ticket.done:
            return
        started_s = time.perf_counter()
        arrival.ticket.wait()
        ended_s = time.perf_counter()
        self.stall_s += ended_s - started_s
        self._observer.waited(arrival.weight.name, started_s, ended_s)

    def _next_arrival(self, weight: Streamed) -> _Arrival:
        """Return the arrival of `weight`, passing over weights that this graph does not read."""
        for _ in range(2 * len(self._order) + 1):
            if not self._arrivals:
                self._top_up()
            if not self._arrivals:
                break
            arrival = self._arrivals.popleft()
            self._position = (self._position + 1) % len(self._order)
            if arrival.weight is weight:
                return arrival
            arrival.ticket.wait()
            self._ring.give_back()
        raise BackendError(f"{weight.name} is not among the streamed weights")

    def _release(self) -> None:
        if self._in_use is not None:
            self._in_use = None
            self._ring.give_back()

    def _has_arrived(self) -> bool:
        return not self._arrivals or self._arrivals[0].ticket.done

    def _top_up(self) -> None:
        """Start reading the next weights while the window has room."""
        while self._order and len(self._arrivals) < len(self._order):
            weight = self._order[self._next_load]
            skew = weight.offset_bytes % PAGE_BYTES
            place = self._ring.take(page_end(skew + weight.size_bytes))
            if place is None:
                return
            address = self._window_address + place + skew
            extent = Extent(
                weight.file_index, weight.offset_bytes, weight.size_bytes, address, weight.name
            )
            ticket = self._submit(weight, extent)
            self._arrivals.append(_Arrival(weight, extent, ticket, self._pass_number))
            self._next_load = (self._next_load + 1) % len(self._order)

    def _submit(self, weight: Streamed, extent: Extent) -> Ticket:
        watch = self._observer.reading(weight.name, weight.size_bytes)
        self.bytes_read += weight.size_bytes
        return self._reader.submit(extent, watch)

    def _drop_arrivals(self) -> None:
        for arrival in self._arrivals:
            arrival.ticket.wait()
            self._ring.give_back()
        self._arrivals.clear()
        self._next_load = 0
        self._position = 0
