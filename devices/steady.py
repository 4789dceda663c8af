"""Which repetitions of a measurement count: what disturbs only slows down."""

from __future__ import annotations

from collections.abc import Sequence

# Repetitions at most this much slower than the fastest are of the same speed.
STEADY_RATIO = 1.15


def steady(times_s: Sequence[float]) -> list[float]:
    """Return the times that agree with the fastest; none of none."""
    fastest_s = min(times_s, default=0.0)
    return [time_s for time_s in times_s if time_s <= STEADY_RATIO * fastest_s]
