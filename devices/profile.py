"""Measured facts about devices; a rate keeps its origin."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Origin = Literal["measured", "declared", "assumed"]


@dataclass(frozen=True, slots=True)
class Rate:
    """A throughput and how it is known."""

    bytes_per_s: float
    origin: Origin
