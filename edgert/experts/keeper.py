"""Keeps weights of which experts come and go; everything else stays, or streams beside them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from edgert.experts.routed import Turn
from edgert.experts.tally import Tally
from edgert.llama.backend import Layout
from edgert.llama.runner import WeightGauges
from edgert.llama.tap import Tap
from edgert.units import format_bytes
from edgert.weights.rows import RowTable
from edgert.weights.streamer import Streamer
from partition.residency import Residency


class _Plan(Protocol):
    @property
    def turns(self) -> Sequence[Turn]: ...

    @property
    def residency(self) -> Residency: ...


class _Cache(Protocol):
    tally: Tally

    @property
    def held_bytes(self) -> int: ...


class _Streamer(Protocol):
    def begin_pass(self, n_tokens: int, n_logits: int) -> None: ...

    def end_pass(self, *, complete: bool) -> None: ...


PlanT = TypeVar("PlanT", bound=_Plan)
CacheT = TypeVar("CacheT", bound=_Cache)
StreamerT = TypeVar("StreamerT", bound=_Streamer)


@dataclass(slots=True)
class ExpertWeights(Generic[PlanT, CacheT, StreamerT]):
    """The `WeightKeeper` of a model whose experts come and go.

    Attributes:
        plan: What was decided.
        layout: How weights lie in memory.
        cache: Who is there.
        streamer: Watches routers and routed products.
        beside: Moves the weights that are not routed.
        tables: Looked-up rows.
        tap: Where the streamer watches.
        words: What the cache holds and how, for people.
        resources: Frees everything.
    """

    plan: PlanT
    layout: Layout
    cache: CacheT
    streamer: StreamerT
    beside: Streamer
    tables: tuple[RowTable, ...]
    tap: Tap
    words: str
    resources: ExitStack

    def begin_pass(self, n_tokens: int, n_logits: int) -> None:
        """Prepare for a decode."""
        self.tap.begin()
        self.beside.begin_pass()
        self.streamer.begin_pass(n_tokens, n_logits)

    def end_pass(self, *, complete: bool) -> None:
        """Finish a decode; raises what went wrong while weights moved."""
        self.beside.end_pass()
        self.streamer.end_pass(complete=complete and self.tap.error is None)
        self.tap.raise_error()

    def gauges(self) -> WeightGauges:
        """Return what is held and moved so far."""
        rows_bytes = sum(table.kept_bytes for table in self.tables)
        pinned_bytes = self.plan.residency.pinned_bytes + rows_bytes
        tally = self.cache.tally
        moving = self.cache.held_bytes + self.plan.residency.ring_bytes
        rows_read = sum(table.bytes_read for table in self.tables)
        return WeightGauges(
            resident_weight_bytes=pinned_bytes + moving,
            pinned_bytes=pinned_bytes,
            bytes_read=self.beside.bytes_read + tally.bytes_read + rows_read,
            stall_s=self.beside.stall_s + tally.stall_s,
            streaming=True,
            layout=self.layout,
            experts=tally.counters([turn.layer for turn in self.plan.turns]),
        )

    def describe(self) -> str:
        """Say where the weights are."""
        residency = self.plan.residency
        beside = f", {len(residency.streamed)} tensors streamed" if residency.streamed else ""
        pinned = format_bytes(residency.pinned_bytes)
        return f"{pinned} pinned{beside}, {self.words}"

    def close(self) -> None:
        """Stop reading and give the memory back."""
        self.beside.drain()
        self.resources.close()
