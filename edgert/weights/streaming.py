"""Puts a model that does not fit into a budget: pins what it can, streams the rest."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from edgert.errors import CapacityError
from edgert.events import Listener, LoadProgress, Notice
from edgert.llama.context import LlamaContext
from edgert.llama.lib import GGML_OP_GET_ROWS_NAME, LlamaLibrary, Tensor
from edgert.llama.model import LlamaModel
from edgert.llama.options import LoadOptions
from edgert.llama.runner import LlamaBackend, WeightGauges
from edgert.llama.tap import Tap
from edgert.units import format_bytes
from edgert.weights.budget import footprint, left_for_weights
from edgert.weights.flash import PAGE_BYTES, Extent, FlashReader
from edgert.weights.memory import Region, cover_twin, span_bytes
from edgert.weights.residency import Item, Residency, choose_residency
from edgert.weights.ring import Ring
from edgert.weights.rows import RowTable
from edgert.weights.source import WeightSource
from edgert.weights.streamer import Streamed, Streamer, Window
from edgert.weights.uses import WeightUse, record_uses
from quant.tensor_file import TensorFile


@dataclass(slots=True)
class StreamedWeights:
    """The `WeightKeeper` of a model that streams."""

    source: WeightSource
    residency: Residency
    streamer: Streamer
    tables: tuple[RowTable, ...]
    tap: Tap
    resources: ExitStack

    def begin_pass(self) -> None:
        """Prepare for a decode."""
        self.tap.begin()
        self.streamer.begin_pass()

    def end_pass(self) -> None:
        """Finish a decode; raises what went wrong while weights moved."""
        self.streamer.end_pass()
        self.tap.raise_error()

    def gauges(self) -> WeightGauges:
        """Return what is held and moved so far."""
        rows_bytes = sum(table.kept_bytes for table in self.tables)
        return WeightGauges(
            resident_weight_bytes=self.residency.pinned_bytes + self.residency.ring_bytes,
            pinned_bytes=self.residency.pinned_bytes + rows_bytes,
            bytes_read=self.streamer.bytes_read + sum(t.bytes_read for t in self.tables),
            stall_s=self.streamer.stall_s,
            streaming=bool(self.residency.streamed),
            layout=self.source.layout,
        )

    def describe(self) -> str:
        """Say where the weights are."""
        return (
            f"{format_bytes(self.residency.pinned_bytes)} pinned, "
            f"{len(self.residency.streamed)} tensors streamed through "
            f"{format_bytes(self.residency.ring_bytes)}, layout {self.source.layout}"
        )

    def close(self) -> None:
        """Stop reading and give the memory back."""
        self.streamer.drain()
        self.resources.close()


def open_streaming(
    library: LlamaLibrary,
    file: TensorFile,
    source: WeightSource,
    options: LoadOptions,
    listener: Listener,
) -> LlamaBackend:
    """Load a model into `options.memory_bytes`.

    Raises:
        CapacityError: the budget is too small for what must be in memory at once.
        FormatError: a weight cannot be read.
    """
    if options.memory_bytes is None:
        raise ValueError("streaming needs a memory budget")
    with ExitStack() as stack:
        model = LlamaModel(library, file, "absent")
        stack.callback(model.close)
        cover_twin(library.libc)
        tap = Tap(library)
        before = footprint()
        context = LlamaContext(model, options, tap.callback)
        stack.callback(context.close)
        after = footprint()
        names = frozenset(entry.name for entry in file.tensors)
        uses = record_uses(library, context, tap, names)
        left = _left(options, before, after)
        keeper = _place(library, _Placing(source, uses, tap, listener), left)
        stack.pop_all()
    return LlamaBackend(model, context, keeper, options)


@dataclass(frozen=True, slots=True)
class _Placing:
    source: WeightSource
    uses: Mapping[str, WeightUse]
    tap: Tap
    listener: Listener


def _left(options: LoadOptions, before: Any, after: Any) -> int:
    try:
        return left_for_weights(options.memory_bytes or 0, before, after)
    except CapacityError:
        if options.load_anyway:
            return 0
        raise


def _place(library: LlamaLibrary, placing: _Placing, left_bytes: int) -> StreamedWeights:
    source, uses = placing.source, placing.uses
    residency = choose_residency(_items(source, uses), left_bytes)
    with ExitStack() as stack:
        reader = FlashReader(source.paths, source.sizes_bytes)
        stack.callback(reader.close)
        if not reader.direct:
            placing.listener(
                Notice("no direct I/O on this file system: reading through the page cache")
            )
        source.prepare(uses)
        _pin(library, placing, residency, reader, stack)
        tables = _tables(library, placing, residency, reader, stack)
        window = Region(library.libc, residency.ring_bytes, huge=True)
        stack.callback(window.close)
        streamer = Streamer(
            reader,
            Window(Ring(residency.ring_bytes), window.address),
            [_streamed(source, uses[name]) for name in residency.streamed],
            tables,
            library.op_number(GGML_OP_GET_ROWS_NAME),
        )
        placing.tap.observer = streamer
        return StreamedWeights(
            source, residency, streamer, tuple(tables.values()), placing.tap, stack.pop_all()
        )


def _items(source: WeightSource, uses: Mapping[str, WeightUse]) -> list[Item]:
    ordered = sorted((u for u in uses.values() if not u.rows_only), key=lambda u: u.order)
    return [Item(use.name, _span(source, use.name), use.stays) for use in ordered]


def _span(source: WeightSource, name: str) -> int:
    place = source.place(name)
    return span_bytes(place.offset_bytes, place.size_bytes)


def _pin(
    library: LlamaLibrary,
    placing: _Placing,
    residency: Residency,
    reader: FlashReader,
    stack: ExitStack,
) -> None:
    """Read the pinned weights into one region, viewed ones where llama.cpp put them."""
    source, uses = placing.source, placing.uses
    moving = [name for name in sorted(residency.pinned) if not uses[name].viewed]
    region = Region(library.libc, sum(_span(source, name) for name in moving), huge=True)
    stack.callback(region.close)
    extents = []
    cursor = region.address
    for name in moving:
        place = source.place(name)
        address = cursor + place.offset_bytes % PAGE_BYTES
        for tensor in uses[name].addresses:
            Tensor.from_address(tensor).data = address
        extents.append(place.at(address))
        cursor += _span(source, name)
    for name in residency.pinned - set(moving):
        home = Tensor.from_address(min(uses[name].addresses)).data
        extents.append(source.original(name).at(home))
    _read_all(reader, extents, placing.listener)


def _read_all(reader: FlashReader, extents: list[Extent], listener: Listener) -> None:
    total = sum(extent.size_bytes for extent in extents)
    done = 0
    tickets = [(extent, reader.submit(extent)) for extent in extents]
    for extent, ticket in tickets:
        ticket.wait()
        if ticket.error is not None:
            raise ticket.error
        done += extent.size_bytes
        listener(LoadProgress(done, total))


def _tables(
    library: LlamaLibrary,
    placing: _Placing,
    residency: Residency,
    reader: FlashReader,
    stack: ExitStack,
) -> dict[int, RowTable]:
    tables: dict[int, RowTable] = {}
    for use in placing.uses.values():
        if not use.lookups or use.name in residency.pinned:
            continue
        place = placing.source.original(use.name)
        tensor: Any = Tensor.from_address(min(use.addresses))
        table = RowTable(reader, library.libc, place.at(0), tensor.nb[1])
        stack.callback(table.close)
        tables.update(dict.fromkeys(use.addresses, table))
    return tables


def _streamed(source: WeightSource, use: WeightUse) -> Streamed:
    place = source.place(use.name)
    return Streamed(
        use.name, place.file_index, place.offset_bytes, place.size_bytes, tuple(use.addresses)
    )
