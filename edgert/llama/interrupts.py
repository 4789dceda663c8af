"""Keeps Ctrl-C out of native code that calls back into Python."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interrupts_deferred(stop: Callable[[], None]) -> Iterator[None]:
    """Turn Ctrl-C into `stop` while the block runs, and raise KeyboardInterrupt after it.

    Python raises KeyboardInterrupt between any two instructions of the main thread. Inside a ctypes
    callback it is printed and dropped, the callback returns false, and what it should have done
    never happens: a weight that is not bound, a log line that is not heard. A handler of the host's
    own is left alone; it must not raise.

    Args:
        stop: Ends the native work early; called from a signal handler.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    pressed: list[int] = []

    def note(number: int, _frame: FrameType | None) -> None:
        pressed.append(number)
        stop()

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if pressed:
            raise KeyboardInterrupt
