"""A backend over several hosts that goes on at home alone when another host is gone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgert.errors import EdgertError, LinkError, PlanError
from edgert.events import Listener, Notice
from edgert.llama.backend import Backend, Counters
from edgert.llama.vocab import Vocab
from edgert.receipt import Receipt

Floats = NDArray[np.float32]


class HostsLike(Backend, Protocol):
    """A backend over several hosts."""

    def give_up(self) -> None:
        """Free every part and link; only the vocabulary is used from then on."""


class FallbackBackend:
    """See `Backend`: the hosts' until a link is lost for good, then home's, from that token on.

    Args:
        hosts: Owned from here on.
        open_home: Opens the plan of home alone; its context is as long.
        listener: Hears that home goes on alone.
    """

    def __init__(
        self, hosts: HostsLike, open_home: Callable[[], Backend], listener: Listener
    ) -> None:
        self._hosts = hosts
        self._open_home = open_home
        self._listener = listener
        self._now: Backend = hosts
        self._tokens: list[int] = []  # of the positions that count as cached
        self._n_there = 0  # of them, in home's cache, once it goes on alone
        self._before: Counters | None = None
        self._receipt = Receipt()
        self._n_candidates: int | None = None
        self.n_ctx = hosts.n_ctx
        self.n_batch = hosts.n_batch
        self.n_logits_max = hosts.n_logits_max

    @property
    def vocab(self) -> Vocab:
        """See `Backend`."""
        return self._hosts.vocab

    def decode(self, tokens: Sequence[int], first_position: int, n_logits: int) -> Floats:
        """See `Backend`; raises LinkError where home cannot go on alone either."""
        del self._tokens[first_position:]
        if self._before is None:
            try:
                logits = self._hosts.decode(tokens, first_position, n_logits)
            except LinkError as error:
                self._go_on_alone(error)
            else:
                self._tokens += tokens
                return logits
        self._catch_up()
        logits = self._now.decode(tokens, first_position, n_logits)
        self._tokens += tokens
        self._n_there = len(self._tokens)
        return logits

    def decode_sequences(
        self, tokens: Sequence[int], positions: Sequence[int], sequences: Sequence[int]
    ) -> Floats:
        """See `Backend`."""
        return self._now.decode_sequences(tokens, positions, sequences)

    def expect(self, n_candidates: int | None) -> None:
        """See `Backend`."""
        self._n_candidates = n_candidates
        self._now.expect(n_candidates)

    def truncate(self, n_positions: int) -> None:
        """See `Backend`."""
        del self._tokens[n_positions:]
        if self._before is not None:
            n_positions = min(n_positions, self._n_there)
            self._n_there = n_positions
        self._now.truncate(n_positions)

    def shift(self, keep: int, discard: int) -> None:
        """See `Backend`."""
        if self._before is not None:
            self._catch_up()
            self._n_there -= discard
        self._now.shift(keep, discard)
        del self._tokens[keep : keep + discard]

    def can_shift(self) -> bool:
        """See `Backend`."""
        return self._now.can_shift()

    def embed(self, tokens: Sequence[int]) -> Floats:
        """See `Backend`."""
        return self._now.embed(tokens)

    def save_state_file(self, path: Path, tokens: Sequence[int]) -> None:
        """See `Backend`."""
        if self._before is not None:
            self._catch_up()
        self._now.save_state_file(path, tokens)

    def load_state_file(self, path: Path) -> list[int]:
        """See `Backend`."""
        found = self._now.load_state_file(path)
        self._tokens, self._n_there = list(found), len(found)
        return found

    def cancel(self) -> None:
        """See `Backend`."""
        self._now.cancel()

    def counters(self) -> Counters:
        """See `Backend`: of both, one after the other."""
        now, before = self._now.counters(), self._before
        if before is None:
            return now
        return replace(
            now,
            n_passes=now.n_passes + before.n_passes,
            n_tokens=now.n_tokens + before.n_tokens,
            decode_s=now.decode_s + before.decode_s,
            stall_s=now.stall_s + before.stall_s,
            bytes_read=now.bytes_read + before.bytes_read,
            experts=None,
            receipt=self._receipt,
        )

    def applied(self) -> dict[str, str]:
        """See `Backend`."""
        alone = {} if self._before is None else {"hosts": "home alone, as another one is gone"}
        return {**self._now.applied(), **alone}

    def close(self) -> None:
        """See `Backend`."""
        if self._now is not self._hosts:
            self._now.close()
        self._hosts.close()

    def _go_on_alone(self, cause: LinkError) -> None:
        """Give the hosts up and open home's own plan.

        Raises:
            LinkError: the cause, where that fails.
        """
        before = self._hosts.counters()
        self._hosts.give_up()  # its memory is what home needs now
        try:
            home = self._open_home()
        except EdgertError as error:
            raise LinkError(
                f"{cause.message}; home cannot go on alone: {error.message}", hint=error.hint
            ) from error
        if home.n_ctx < self.n_ctx or home.n_batch < self.n_batch:
            home.close()
            raise PlanError(
                f"the fallback has {home.n_ctx} positions and batches of {home.n_batch}, wanted "
                f"{self.n_ctx} and {self.n_batch}",
                hint="make both again: edgert plan MODEL --fallback",
            ) from cause
        home.expect(self._n_candidates)
        self._receipt = replace(before.receipt or Receipt(), fallback=cause.message)
        self._before, self._now = before, home
        self._listener(
            Notice(f"{cause.message}; home goes on alone, {len(self._tokens)} tokens come first")
        )

    def _catch_up(self) -> None:
        """Bring home's cache to where the hosts' was."""
        while self._n_there < len(self._tokens):
            first = self._n_there
            part = self._tokens[first : first + self._now.n_batch]
            try:
                self._now.decode(part, first, 0)
            except BaseException:
                self._now.truncate(first)
                raise
            self._n_there += len(part)
