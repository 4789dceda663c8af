"""The `Backend` of a model that several hosts run: text enters and leaves here."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgert.errors import BackendError, ConfigError, LinkError
from edgert.hosts.entrance import Entrance
from edgert.hosts.route import Route
from edgert.hosts.steps import Order, OrderKind
from edgert.llama.backend import Counters
from edgert.llama.interrupts import interrupts_deferred
from edgert.llama.vocab import Vocab
from edgert.receipt import HostUse, Receipt

Floats = NDArray[np.float32]

_NOTHING = Counters(
    n_passes=0, n_tokens=0, decode_s=0.0, stall_s=0.0, bytes_read=0, resident_weight_bytes=0,
    pinned_bytes=0, weight_bytes=0, budget_bytes=None, streaming=False, layout="file",
)  # fmt: skip


def _unnamed(n_parts: int) -> list[HostUse]:
    return [HostUse("another host", "a part")] * n_parts


@dataclass(frozen=True, slots=True)
class Sizes:
    """What every host was opened with: positions, tokens of a decode, logits of a decode."""

    n_ctx: int
    n_batch: int
    n_logits_max: int


def _nothing() -> None:
    """An order is short; it is not given up."""


class HostsBackend:
    """See `Backend`.

    Args:
        entrance: Owned from here on.
        route: Owned from here on.
        sizes: Of context and batches, on every host.
        shown: What was applied, for people.
        receipt: Of the other hosts, a part each, in the order of the route's traffic.
        resources: Closed last.
    """

    def __init__(
        self,
        entrance: Entrance,
        route: Route,
        sizes: Sizes,
        shown: Mapping[str, str],
        receipt: Receipt | None = None,
        resources: ExitStack | None = None,
    ) -> None:
        self._entrance = entrance
        self._route = route
        self._resources = resources or ExitStack()
        self.n_ctx = sizes.n_ctx
        self.n_batch = sizes.n_batch
        self.n_logits_max = sizes.n_logits_max
        self._shown = dict(shown)
        self._receipt = receipt or Receipt()
        self._closed = self._is_given_up = False
        self._n_passes = self._n_tokens = 0
        self._decode_s = 0.0
        self.n_candidates = 0

    @property
    def vocab(self) -> Vocab:
        """See `Backend`."""
        return self._entrance.vocab

    def decode(self, tokens: Sequence[int], first_position: int, n_logits: int) -> Floats:
        """See `Backend`; raises LinkError besides, if another host is gone."""
        if self._closed:
            raise ConfigError("the backend is closed")
        if self._is_given_up:
            raise LinkError("the other hosts were given up", hint="open the model anew")
        started_s = time.perf_counter()
        try:
            with interrupts_deferred(self.cancel):
                hidden = self._entrance.hidden(tokens)
                return self._route.run(hidden, first_position, n_logits, self.n_candidates)
        finally:
            self._n_passes += 1
            self._n_tokens += len(tokens)
            self._decode_s += time.perf_counter() - started_s

    def decode_sequences(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> Floats:
        """Refuse: texts are decoded together on one host only."""
        del tokens, positions, sequences
        raise BackendError("several texts at once are decoded on one host only")

    def expect(self, n_candidates: int | None) -> None:
        """See `Backend`; other hosts send no more of their parts of the vocabulary."""
        self.n_candidates = n_candidates or 0

    def truncate(self, n_positions: int) -> None:
        """See `Backend`."""
        self._order(Order(OrderKind.TRUNCATE, n_positions))

    def shift(self, keep: int, discard: int) -> None:
        """See `Backend`."""
        self._order(Order(OrderKind.SHIFT, keep, discard))

    def can_shift(self) -> bool:
        """See `Backend`."""
        here = self._route.here
        return here is not None and not self._is_given_up and here.can_shift()

    def embed(self, tokens: Sequence[int]) -> Floats:
        """Refuse: the last hidden states are not at home."""
        del tokens
        raise BackendError(
            "embeddings of texts are computed on one host only", hint="run the model without hosts"
        )

    def save_state_file(self, path: Path, tokens: Sequence[int]) -> None:
        """Refuse: every host has a part of the KV cache."""
        del tokens
        raise BackendError(
            f"cannot save to {path}: every host has a part of the KV cache",
            hint="save the conversation as text",
        )

    def load_state_file(self, path: Path) -> list[int]:
        """Refuse: every host has a part of the KV cache."""
        raise BackendError(f"cannot load {path}: every host has a part of the KV cache")

    def _order(self, order: Order) -> None:
        if self._is_given_up:
            return  # nothing is cached any more
        with interrupts_deferred(_nothing):  # half a frame would end the link
            self._route.order(order)

    def cancel(self) -> None:
        """See `Backend`."""
        self._route.cancel()

    def counters(self) -> Counters:
        """See `Backend`; what other hosts hold and read is not in it."""
        here = self._route.here
        own = _NOTHING if here is None else here.counters()
        traffic = self._route.traffic()
        uses = (*self._receipt.hosts, *_unnamed(len(traffic) - len(self._receipt.hosts)))
        hosts = [use.plus(*counts) for use, counts in zip(uses, traffic, strict=True)]
        return replace(
            own,
            n_passes=self._n_passes,
            n_tokens=self._n_tokens,
            decode_s=self._decode_s,
            receipt=replace(self._receipt, hosts=tuple(hosts)),
        )

    def applied(self) -> dict[str, str]:
        """See `Backend`."""
        here = self._route.here
        return {**({} if here is None else here.applied()), **self._shown}

    def give_up(self) -> None:
        """Free every part and link; the vocabulary stays."""
        self._is_given_up = True
        self._route.close()

    def close(self) -> None:
        """See `Backend`."""
        if not self._closed:
            self._closed = True
            self._route.close()
            self._entrance.close()
            self._resources.close()
