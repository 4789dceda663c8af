"""Fills memory with the weights that stay: several reads in flight, repacked on the way in."""

from __future__ import annotations

import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as futures_wait
from contextlib import ExitStack
from dataclasses import dataclass

from edgert.events import Listener, LoadProgress
from edgert.llama.lib import LlamaLibrary, tensor_at
from edgert.weights.flash import PAGE_BYTES, Extent, FlashReader, page_end, wait_all
from edgert.weights.memory import Region, span_bytes
from edgert.weights.repack import Repacker
from edgert.weights.source import Place, WeightSource
from edgert.weights.uses import WeightUse

N_REPACKERS = 2


@dataclass(frozen=True, slots=True)
class Pinned:
    """A weight that stays.

    Attributes:
        use: How the graphs use it.
        place: Where its bytes are.
        packed_bytes: Its length when it is repacked on the way in, else None.
    """

    use: WeightUse
    place: Place
    packed_bytes: int | None = None

    @property
    def memory_bytes(self) -> int:
        """Memory it takes."""
        if self.packed_bytes is not None:
            return page_end(self.packed_bytes)
        return span_bytes(self.place.offset_bytes, self.place.size_bytes)


def staging_bytes(weights: Sequence[Pinned]) -> int:
    """Return the memory that repacking takes beside the weights themselves."""
    spans = [
        span_bytes(w.place.offset_bytes, w.place.size_bytes)
        for w in weights
        if w.packed_bytes is not None
    ]
    return N_REPACKERS * max(spans, default=0)


def collect(
    source: WeightSource, uses: Mapping[str, WeightUse], names: Sequence[str]
) -> list[Pinned]:
    """Return weights to pin as they are; viewed ones come from the model's own file."""
    return [
        Pinned(uses[n], source.original(n) if uses[n].viewed else source.place(n)) for n in names
    ]


def pin(
    library: LlamaLibrary,
    reader: FlashReader,
    weights: Sequence[Pinned],
    listener: Listener,
    repacker: Repacker | None = None,
) -> Region:
    """Bind weights to one region and fill it; viewed ones stay where llama.cpp put them.

    Returns:
        The region, owned by the caller.

    Raises:
        FormatError: a weight cannot be read.
    """
    moving = [weight for weight in weights if not weight.use.viewed]
    region = Region(library.libc, sum(weight.memory_bytes for weight in moving), huge=True)
    try:
        progress = _Progress(sum(weight.place.size_bytes for weight in weights), listener)
        cursor = region.address
        extents: list[Extent] = []
        repacked: list[tuple[Pinned, int]] = []
        for weight in moving:
            if weight.packed_bytes is None:
                address = cursor + weight.place.offset_bytes % PAGE_BYTES
                _bind(weight.use, address)
                extents.append(weight.place.at(address))
            else:
                repacked.append((weight, cursor))
            cursor += weight.memory_bytes
        extents += [w.place.at(_home(w.use)) for w in weights if w.use.viewed]
        _read_all(reader, extents, progress)
        if repacked and repacker is not None:
            _repack_all(library, reader, repacker, repacked, progress)
    except BaseException:
        region.close()
        raise
    return region


class _Progress:
    def __init__(self, total_bytes: int, listener: Listener) -> None:
        self._total_bytes = total_bytes
        self._done_bytes = 0
        self._listener = listener

    def add(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        self._listener(LoadProgress(self._done_bytes, self._total_bytes))


def _bind(use: WeightUse, address: int) -> None:
    for tensor in use.addresses:
        tensor_at(tensor).data = address


def _home(use: WeightUse) -> int:
    return tensor_at(min(use.addresses)).data or 0


def _read_all(reader: FlashReader, extents: Sequence[Extent], progress: _Progress) -> None:
    observer = reader.observer
    tickets = [(e, reader.submit(e, observer.reading(e.name, e.size_bytes))) for e in extents]
    try:
        for extent, ticket in tickets:
            ticket.wait()
            progress.add(extent.size_bytes)
    except BaseException:
        reader.stop()
        raise
    finally:
        wait_all([ticket for _, ticket in tickets])


def _repack_all(
    library: LlamaLibrary,
    reader: FlashReader,
    repacker: Repacker,
    weights: Sequence[tuple[Pinned, int]],
    progress: _Progress,
) -> None:
    """Read into a few staging areas and repack from there; ggml's repacking frees the GIL."""
    area_bytes = staging_bytes([weight for weight, _ in weights]) // N_REPACKERS
    areas: queue.SimpleQueue[Region] = queue.SimpleQueue()

    def repack_one(weight: Pinned, target: int) -> int:
        area = areas.get()
        try:
            address = area.address + weight.place.offset_bytes % PAGE_BYTES
            extent = weight.place.at(address)
            reader.read(extent, reader.observer.reading(extent.name, extent.size_bytes))
            repacker.repack(weight.use, address, target)
        finally:
            areas.put(area)
        return weight.place.size_bytes

    with ExitStack() as stack:
        for _ in range(N_REPACKERS):
            area = Region(library.libc, area_bytes, huge=True)
            stack.callback(area.close)
            areas.put(area)
        pool = ThreadPoolExecutor(N_REPACKERS, thread_name_prefix="edgert-repack")
        jobs = [pool.submit(repack_one, weight, target) for weight, target in weights]
        try:
            for job in jobs:
                progress.add(job.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            _wait_for_jobs(jobs)


def _wait_for_jobs(jobs: Sequence[Future[int]]) -> None:
    """Wait through any number of interrupts: running jobs write to memory that goes next."""
    interrupted: KeyboardInterrupt | None = None
    while not all(job.done() for job in jobs):
        try:
            futures_wait(jobs)
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted
