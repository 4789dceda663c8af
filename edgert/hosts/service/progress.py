"""What a transfer of blobs reports, on both ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TransferProgress:
    """Bytes of one blob that are there, or on their way, so far."""

    sha256: str
    done_bytes: int
    total_bytes: int


TransferListener = Callable[[TransferProgress], None]


def ignore_transfer(progress: TransferProgress) -> None:
    """Drop progress; the listener of callers who do not listen."""
    del progress
