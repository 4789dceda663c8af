"""One drafter with its length controller: what a generation asks for guesses and tells outcomes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from edgert.draft_length import DraftLength
from edgert.sampling import SamplingParams
from edgert.speculative import Draft, Drafter
from edgert.verification import TieGuard

LARGEST_DRAFT = 256


class Speculation:
    """Drafts that are expected to pay; lives as long as the engine, so that it learns once.

    Args:
        drafter: Closed with this.
        longest: Most tokens of a draft.
        clock: Gives seconds.
    """

    def __init__(
        self, drafter: Drafter, longest: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._clock = clock
        self.drafter = drafter
        self.length = DraftLength(longest, drafter.priors)
        self.ties = TieGuard()
        self._draft_class: int | None = None
        self._n_drafted = 0
        self._unused: int | None = None

    def begin(self, params: SamplingParams) -> None:
        """Prepare for one generation."""
        self._draft_class, self._n_drafted, self._unused = None, 0, None
        self.drafter.begin(params)

    def draft(self, history: Sequence[int], room: int) -> Draft:
        """Return a guess of at most `room` tokens, empty when none is expected to pay."""
        self._n_drafted, self._unused = 0, None
        self._draft_class = self.drafter.draft_class(history) if room > 0 else None
        if self._draft_class is None:
            return Draft()
        wanted = self.length.choose(self._draft_class, room)
        if wanted == 0:
            if self.drafter.free:  # score the guess nevertheless: the class may start to pay
                self._unused = next(iter(self.drafter.propose(history, 1).token_ids), None)
            return Draft()
        start_s = self._clock()
        draft = self.drafter.propose(history, wanted)
        self._n_drafted = len(draft.token_ids)
        self.length.observe_drafting(self._n_drafted, self._clock() - start_s)
        return draft

    def observe(
        self, pass_s: float, n_verified: int, n_accepted: int, first_token: int | None
    ) -> None:
        """Take the outcome of the pass after `draft`.

        Args:
            pass_s: Seconds of the pass itself.
            n_verified: Drafted tokens that the pass decided about.
            n_accepted: Drafted tokens that stood.
            first_token: The first token chosen in the pass, None if there was none.
        """
        self.length.cost.observe(1 + self._n_drafted, pass_s)
        if self._draft_class is None:
            return
        if self._n_drafted > 0:
            self.length.observe(self._draft_class, n_verified, n_accepted)
        elif self._unused is not None and first_token is not None:
            self.length.observe(self._draft_class, 1, int(first_token == self._unused))

    def cancel(self) -> None:
        """Make a running draft raise `Cancelled`."""
        self.drafter.cancel()

    def close(self) -> None:
        """Close the drafter."""
        self.drafter.close()
