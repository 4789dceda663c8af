"""How many tokens to draft, from observed acceptance and pass times. Pure: no clock, no model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

_SMOOTHING = 0.2
_PRIOR_RATE = 0.6
_FIRST_PROBE_AFTER = 8
_LAST_PROBE_AFTER = 512
_PROBE_LENGTH = 4
_PLAIN_EVERY = 128


@dataclass(slots=True)
class PassCost:
    """Seconds of a pass by its number of tokens, from measured passes.

    Between two measured sizes the cost is interpolated. Beyond the largest it stays flat while
    nothing is known, so that longer passes are tried, and then grows as between the last two.
    A larger pass never counts as cheaper than a smaller one.
    """

    measured_s: dict[int, float] = field(default_factory=dict)
    n_measured: dict[int, int] = field(default_factory=dict)

    def observe(self, n_tokens: int, duration_s: float) -> None:
        """Take a measured pass; later ones weigh less at first, then all weigh the same."""
        count = self.n_measured[n_tokens] = self.n_measured.get(n_tokens, 0) + 1
        known = self.measured_s.get(n_tokens, duration_s)
        bounded = min(duration_s, 4 * known)  # an outlier is not forgotten soon
        self.measured_s[n_tokens] = known + max(_SMOOTHING, 1 / count) * (bounded - known)

    def seconds(self, n_tokens: int) -> float:
        """Estimate a pass over `n_tokens`; 1 when nothing is known."""
        points = self._points()
        if not points:
            return 1.0
        if n_tokens <= points[0][0]:
            return points[0][1]
        for (low, low_s), (high, high_s) in itertools.pairwise(points):
            if n_tokens <= high:
                return low_s + (high_s - low_s) * (n_tokens - low) / (high - low)
        if len(points) == 1:
            return points[0][1]
        (low, low_s), (high, high_s) = points[-2:]
        return high_s + (high_s - low_s) / (high - low) * (n_tokens - high)

    def _points(self) -> list[tuple[int, float]]:
        points: list[tuple[int, float]] = []
        for n_tokens in sorted(self.measured_s):
            floor_s = points[-1][1] if points else 0.0
            points.append((n_tokens, max(floor_s, self.measured_s[n_tokens])))
        return points


@dataclass(slots=True)
class DraftLength:
    """Chooses draft lengths for one drafter and model.

    Drafts come in classes (for n-grams: how long the match was), each with its own acceptance rate.
    With rate a, a draft of k gives 1 + a + ... + a^k tokens per pass in expectation.

    Attributes:
        longest: Upper bound of a draft.
        priors: Acceptance rates of classes before anything was observed.
        draft_token_s: Seconds to draft one token, smoothed.
    """

    longest: int
    priors: Mapping[int, float] = field(default_factory=dict)
    cost: PassCost = field(default_factory=PassCost)
    draft_token_s: float = 0.0
    _n_in_row: int = 0
    _rates: dict[int, float] = field(default_factory=dict)
    _skipped: dict[int, int] = field(default_factory=dict)
    _probe_after: dict[int, int] = field(default_factory=dict)

    def choose(self, draft_class: int, room: int) -> int:
        """Return how many tokens to draft, 0 for none.

        A class that does not pay is left out, and tried again after 8, 16, ... 512 chances. Every
        128th pass is a plain one, since what drafts are compared with has to stay measured.

        Args:
            draft_class: The class of the draft at hand.
            room: Upper bound from the context and the tokens still wanted.
        """
        longest = min(self.longest, room)
        if longest <= 0:
            return 0
        self._n_in_row += 1
        if 1 not in self.cost.measured_s or self._n_in_row > _PLAIN_EVERY:
            self._n_in_row = 0
            return 0
        best = max(range(longest + 1), key=lambda k: (self._tokens_per_s(draft_class, k), -k))
        if best > 0:
            self._skipped[draft_class] = 0
            return best
        skipped = self._skipped.get(draft_class, 0) + 1
        self._skipped[draft_class] = skipped
        if skipped < self._probe_after.get(draft_class, _FIRST_PROBE_AFTER):
            return 0
        self._skipped[draft_class] = 0
        self._probe_after[draft_class] = min(
            _LAST_PROBE_AFTER, 2 * self._probe_after.get(draft_class, _FIRST_PROBE_AFTER)
        )
        return min(_PROBE_LENGTH, longest)

    def observe(self, draft_class: int, n_drafted: int, n_accepted: int) -> None:
        """Take the outcome of a verified draft: each accepted token, and the one that was not."""
        rate = self.rate(draft_class)
        n_trials = min(n_drafted, n_accepted + 1)
        for index in range(n_trials):
            rate += _SMOOTHING * (float(index < n_accepted) - rate)
        self._rates[draft_class] = rate
        if n_accepted == n_drafted > 0:
            self._probe_after.pop(draft_class, None)

    def observe_drafting(self, n_tokens: int, duration_s: float) -> None:
        """Take the seconds that drafting took."""
        if n_tokens > 0:
            self.draft_token_s += _SMOOTHING * (duration_s / n_tokens - self.draft_token_s)

    def rate(self, draft_class: int) -> float:
        """Return the share of drafted tokens that are accepted when reached."""
        return self._rates.get(draft_class, self.priors.get(draft_class, _PRIOR_RATE))

    def _tokens_per_s(self, draft_class: int, length: int) -> float:
        rate = min(self.rate(draft_class), 0.999)
        expected = (1 - rate ** (length + 1)) / (1 - rate)
        return expected / (self.cost.seconds(1 + length) + length * self.draft_token_s)
