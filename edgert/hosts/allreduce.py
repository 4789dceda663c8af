"""Sums over hosts: partial products of every host added up, the same bits everywhere.

A star costs two latencies an exchange whatever the number of hosts, and the hub's link carries the
data of all others; a ring sends less over each link and waits once for every host. Hidden states
of one token are small and latency decides, so the star is the default (TPI-LLM, section 3.2).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from edgert.errors import Cancelled, FormatError, LinkError
from edgert.hosts.frames import FrameKind
from edgert.hosts.link import Frame, Link
from edgert.hosts.steps import OrderKind, read_order, read_rows, rows_bytes

Floats = NDArray[np.float32]

_MOST_AT_ONCE_BYTES = 32 << 10  # half of what any connection holds, in one direction


class Exchange:
    """The sums of one part: joined to other hosts once they are connected; counted and timed.

    Attributes:
        n_exchanges: Sums so far.
        wait_s: Seconds in them, waiting for slower hosts included.
    """

    def __init__(self) -> None:
        self.n_exchanges = 0
        self.wait_s = 0.0
        self._sum: Callable[[Floats], None] | None = None

    def join(self, sum_over_hosts: Callable[[Floats], None]) -> None:
        """Take part in the sums of other hosts from now on."""
        self._sum = sum_over_hosts

    def __call__(self, values: Floats) -> None:
        """Add up (n_tokens, n_embd) over all hosts, in place; LinkError if there are none."""
        if self._sum is None:
            raise LinkError("the other hosts of these layers are not connected")
        started_s = time.perf_counter()
        self._sum(values)
        self.wait_s += time.perf_counter() - started_s
        self.n_exchanges += 1


class StarHub:
    """The host in the middle: adds what the others send, in their order, and answers.

    Args:
        links: To the others, in the order of their shares.
    """

    def __init__(self, links: Sequence[Link]) -> None:
        self._links = links

    def __call__(self, values: Floats) -> None:
        """Add up (n_tokens, n_embd) over all hosts, in place."""
        for link in self._links:
            values += read_rows(expect_sum(link).payload, *values.shape)
        data = rows_bytes(values)
        for link in self._links:
            link.send(FrameKind.TENSOR, data)


class StarSpoke:
    """A host around the hub."""

    def __init__(self, link: Link) -> None:
        self._link = link

    def __call__(self, values: Floats) -> None:
        """Add up (n_tokens, n_embd) over all hosts, in place."""
        self._link.send(FrameKind.TENSOR, rows_bytes(values))
        values[...] = read_rows(expect_sum(self._link).payload, *values.shape)


class Pair:
    """Two hosts: each sends what it has and adds what the other sent, so that nobody answers.

    Adding two numbers gives the same bits in either order. What might not fit into what the
    connection holds on its way is summed by the hub: two that only send would wait for each other.

    Args:
        link: To the other host.
        is_hub: Whether this is the hub.
    """

    def __init__(self, link: Link, *, is_hub: bool) -> None:
        self._link = link
        self._in_turn = StarHub([link]) if is_hub else StarSpoke(link)

    def __call__(self, values: Floats) -> None:
        """Add up (n_tokens, n_embd) over both hosts, in place."""
        if values.nbytes > _MOST_AT_ONCE_BYTES:
            self._in_turn(values)
            return
        self._link.send(FrameKind.TENSOR, rows_bytes(values))
        values += read_rows(expect_sum(self._link).payload, *values.shape)


def sums_at_hub(links: Sequence[Link]) -> Callable[[Floats], None]:
    """Return how the hub adds up with the hosts behind these links."""
    return Pair(links[0], is_hub=True) if len(links) == 1 else StarHub(links)


def sums_at_spoke(link: Link, n_hosts: int) -> Callable[[Floats], None]:
    """Return how another host than the hub, of so many, adds up."""
    return Pair(link, is_hub=False) if n_hosts == 2 else StarSpoke(link)


class Ring:
    """Every host passes parts of the sum to the next one: first to add them up, then to tell.

    Each part is added up in one order, and told as bytes, so all hosts have the same bits.

    Args:
        rank: Place of this host.
        n_hosts: In the ring.
        before: Link from the host before.
        after: Link to the next.
    """

    def __init__(self, rank: int, n_hosts: int, before: Link, after: Link) -> None:
        self._rank = rank
        self._n_hosts = n_hosts
        self._before = before
        self._after = after

    def __call__(self, values: Floats) -> None:
        """Add up (n_tokens, n_embd) over all hosts, in place."""
        flat = values.reshape(-1)
        bounds = np.linspace(0, flat.size, self._n_hosts + 1).astype(int)
        parts = [flat[a:b] for a, b in pairwise(bounds.tolist())]
        n = self._n_hosts
        for step in range(n - 1):
            self._pass_on(parts[(self._rank - step) % n])
            part = parts[(self._rank - step - 1) % n]
            part += self._taken(part.size)
        for step in range(n - 1):
            self._pass_on(parts[(self._rank + 1 - step) % n])
            part = parts[(self._rank - step) % n]
            part[...] = self._taken(part.size)

    def _pass_on(self, part: Floats) -> None:
        self._after.send(FrameKind.TENSOR, rows_bytes(part))

    def _taken(self, size: int) -> Floats:
        return read_rows(expect_sum(self._before).payload, 1, size).reshape(-1)


def expect_sum(link: Link) -> Frame:
    """Wait for values of a running step.

    Raises:
        Cancelled: the other end gave the step up.
        FormatError: something else came.
        LinkError: the link failed, or the peer did.
    """
    frame = link.receive()
    if frame.kind is FrameKind.TENSOR:
        return frame
    if frame.kind is FrameKind.CONTROL and read_order(frame.payload).kind is OrderKind.ABORT:
        raise Cancelled(f"{link.peer} gave the step up")
    raise FormatError(f"{link.peer} sent {frame.kind.name} where a sum was awaited")
