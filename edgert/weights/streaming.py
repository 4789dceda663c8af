"""Puts a model that does not fit into a budget: pins what it can, streams the rest."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from edgert.events import Listener, Notice
from edgert.llama.lib import GGML_OP_GET_ROWS_NAME, LlamaLibrary, tensor_at
from edgert.llama.runner import WeightGauges
from edgert.llama.tap import Tap
from edgert.observer import UNOBSERVED, RunObserver
from edgert.units import format_bytes
from edgert.weights.flash import FlashReader
from edgert.weights.loading import LoadedModel
from edgert.weights.memory import Region
from edgert.weights.pinning import collect, pin
from edgert.weights.ring import Ring
from edgert.weights.rows import RowTable
from edgert.weights.source import WeightSource
from edgert.weights.streamer import Operations, Streamed, Streamer, Window
from edgert.weights.uses import WeightUse
from partition.residency import Item, Residency


@dataclass(slots=True)
class StreamedWeights:
    """The `WeightKeeper` of a model that streams."""

    source: WeightSource
    residency: Residency
    streamer: Streamer
    tables: tuple[RowTable, ...]
    tap: Tap
    resources: ExitStack

    def begin_pass(self, n_tokens: int, n_logits: int) -> None:
        """Prepare for a decode."""
        del n_tokens, n_logits
        self.tap.begin()
        self.streamer.begin_pass()

    def end_pass(self, *, complete: bool) -> None:
        """Finish a decode; raises what went wrong while weights moved."""
        del complete
        self.streamer.end_pass()
        self.tap.raise_error()

    def gauges(self) -> WeightGauges:
        """Return what is held and moved so far."""
        rows_bytes = sum(table.kept_bytes for table in self.tables)
        pinned_bytes = self.residency.pinned_bytes + rows_bytes
        return WeightGauges(
            resident_weight_bytes=pinned_bytes + self.residency.ring_bytes,
            pinned_bytes=pinned_bytes,
            bytes_read=self.streamer.bytes_read + sum(t.bytes_read for t in self.tables),
            stall_s=self.streamer.stall_s,
            streaming=True,
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


def place_streaming(
    library: LlamaLibrary,
    loaded: LoadedModel,
    source: WeightSource,
    residency: Residency,
    listener: Listener,
    observer: RunObserver = UNOBSERVED,
) -> StreamedWeights:
    """Fill what stays and set the rest up to stream.

    Raises:
        FormatError: a weight cannot be read.
    """
    with ExitStack() as stack:
        reader = FlashReader(source.paths, source.sizes_bytes, observer=observer)
        stack.callback(reader.close)
        source.prepare(loaded.uses)
        pinned = collect(source, loaded.uses, sorted(residency.pinned))
        stack.callback(pin(library, reader, pinned, listener).close)
        if not reader.direct:
            listener(Notice("no direct I/O on this file system: reading through the page cache"))
        tables = row_tables(library, loaded, source, residency, reader)
        for table in tables.values():
            stack.callback(table.close)
        window = Region(library.libc, residency.ring_bytes, huge=True)
        stack.callback(window.close)
        streamer = Streamer(
            reader,
            Window(Ring(residency.ring_bytes), window.address),
            [streamed_weight(source, loaded.uses[name]) for name in residency.streamed],
            tables,
            operations_of(library),
        )
        loaded.tap.observer = streamer
        return StreamedWeights(
            source, residency, streamer, tuple(tables.values()), loaded.tap, stack.pop_all()
        )


def weights_to_place(source: WeightSource, uses: dict[str, WeightUse]) -> list[Item]:
    """List what is pinned or streamed, in order of use; looked-up weights are neither."""
    ordered = sorted((use for use in uses.values() if not use.rows_only), key=lambda u: u.order)
    return [Item(w.use.name, w.memory_bytes, w.use.stays) for w in
            collect(source, uses, [use.name for use in ordered])]  # fmt: skip


def row_tables(
    library: LlamaLibrary,
    loaded: LoadedModel,
    source: WeightSource,
    residency: Residency,
    reader: FlashReader,
) -> dict[int, RowTable]:
    """Make a table for each weight whose rows are looked up, by its tensor's address."""
    tables: dict[int, RowTable] = {}
    for use in loaded.uses.values():
        if use.lookups and use.name not in residency.pinned:
            tensor = tensor_at(min(use.addresses))
            table = RowTable(reader, library.libc, source.original(use.name).at(0), tensor.nb[1])
            tables.update(dict.fromkeys(use.addresses, table))
    return tables


def operations_of(library: LlamaLibrary) -> Operations:
    """Return ggml's numbers of the operations that a streamer watches."""
    return Operations(
        library.op_number(GGML_OP_GET_ROWS_NAME),
        frozenset(library.op_number(name) for name in (b"MUL_MAT", b"MUL_MAT_ID")),
    )


def streamed_weight(source: WeightSource, use: WeightUse) -> Streamed:
    """Return where a weight that streams is read from, and what is bound to it."""
    place = source.place(use.name)
    return Streamed(
        use.name, place.file_index, place.offset_bytes, place.size_bytes, tuple(use.addresses)
    )
