"""One reply: streamed to stdout from a worker thread, so that Ctrl-C is heard at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING

from edgert.errors import Cancelled
from edgert.units import format_bytes

if TYPE_CHECKING:
    from types import FrameType

    from edgert.api import Chunk, Engine, GenerationStats
    from edgert.llama.backend import ExpertCounts

_PRESSES_TO_LEAVE = 2


@dataclass(frozen=True, slots=True)
class Spoken:
    """What the model said, and how it ended."""

    text: str
    finish_reason: str
    interrupted: bool


def speak(
    engine: Engine,
    start: Callable[[], Iterator[Chunk]],
    show: Callable[[str], None],
) -> Spoken:
    """Stream a reply; the first Ctrl-C stops it, a second one raises KeyboardInterrupt.

    Args:
        engine: Who replies, to cancel.
        start: Begins the reply.
        show: Takes each piece of text.

    Raises:
        EdgertError: what the engine raised.
    """
    pieces: SimpleQueue[Chunk | None] = SimpleQueue()
    presses = 0

    def work() -> None:
        for chunk in start():
            pieces.put(chunk)

    def pressed(number: int, frame: FrameType | None) -> None:
        del number, frame
        nonlocal presses
        presses += 1
        engine.cancel()
        if presses > 1:
            raise KeyboardInterrupt

    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="reply")
    before = signal.signal(signal.SIGINT, pressed) if _in_main_thread() else None
    try:
        reply = worker.submit(work)
        reply.add_done_callback(lambda _: pieces.put(None))
        text, reason = _collect(pieces, show)
        try:
            reply.result()
        except Cancelled:
            reason = "cancelled"
    except BaseException:
        engine.cancel()
        raise
    finally:
        worker.shutdown(wait=presses < _PRESSES_TO_LEAVE)
        if before is not None:
            signal.signal(signal.SIGINT, before)
    return Spoken(text, reason, presses > 0)


def statistics_line(stats: GenerationStats) -> str:
    """Describe a reply's speed; with what streaming cost when weights were streamed."""
    parts = [
        f"prefill {stats.n_prefilled_tokens} tok at {stats.prefill_tokens_per_s:.1f} tok/s",
        f"decode {stats.n_generated_tokens} tok at {stats.decode_tokens_per_s:.1f} tok/s",
    ]
    if stats.n_drafted:
        parts.append(f"{stats.n_accepted} of {stats.n_drafted} drafted accepted")
    if stats.streaming:
        budget = "" if stats.budget_bytes is None else f" of {format_bytes(stats.budget_bytes)}"
        parts += [
            f"{stats.bytes_read_per_token / 1e6:.1f} MB/token",
            f"stall {100 * stats.stall_share:.0f}%",
            f"resident {format_bytes(stats.resident_weight_bytes)}{budget}",
        ]
    if stats.experts is not None and stats.experts.total.wanted:
        n_tokens = max(1, stats.n_generated_tokens - 1)
        parts.append(experts_line(stats.experts.total, n_tokens, stats.decode_s))
    left_home = None if stats.receipt is None else stats.receipt.describe()
    parts += [] if left_home is None else [left_home]
    return f"[{' · '.join(parts)}]"


def experts_line(counts: ExpertCounts, n_tokens: int, seconds: float) -> str:
    """Describe what routed experts did in `seconds` of decoding `n_tokens` tokens."""
    hits, bits = counts.hit_rate, counts.bits_per_weight
    parts = [
        "" if hits is None else f"{100 * hits:.1f} % hits",
        f"{counts.bytes_read / max(1, n_tokens) / 1e6:.1f} MB/token",
        "" if bits is None else f"{bits:.1f} bits",
        f"stalled {100 * min(1.0, counts.stall_s / seconds):.0f} %" if seconds > 0 else "",
    ]
    return "experts " + ", ".join(part for part in parts if part)


def _collect(pieces: SimpleQueue[Chunk | None], show: Callable[[str], None]) -> tuple[str, str]:
    text: list[str] = []
    reason = "stop"
    while (piece := pieces.get()) is not None:
        text.append(piece.text)
        show(piece.text)
        reason = piece.finish_reason or reason
    return "".join(text), reason


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()
