"""Ctrl-C while llama.cpp calls back into Python: never lost, never a wrong logit."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from edgert.llama.backend import Backend
from edgert.llama.interrupts import interrupts_deferred
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions

PROMPT = [300, 301, 302, 303] * 8


def decode_until_interrupted(backend: Backend, wanted: bytes, delay_s: float) -> None:
    threading.Timer(delay_s, os.kill, (os.getpid(), signal.SIGINT)).start()
    while True:
        backend.truncate(0)
        assert backend.decode(PROMPT, 0, 1).tobytes() == wanted


@pytest.mark.model
def test_ctrl_c_in_a_streaming_decode_is_raised_and_changes_no_logit(
    random_models: dict[str, Path],
) -> None:
    options = LoadOptions(
        random_models["plain"], weight_memory_bytes=5_500_000, n_ctx=64, n_threads=1
    )
    backend = open_backend(options)
    try:
        wanted = backend.decode(PROMPT, 0, 1).tobytes()
        for round_number in range(20):
            with pytest.raises(KeyboardInterrupt):
                decode_until_interrupted(backend, wanted, 0.01 + round_number / 1500)
        backend.truncate(0)
        assert backend.decode(PROMPT, 0, 1).tobytes() == wanted
    finally:
        backend.close()


def test_an_interrupt_waits_for_the_end_of_the_block() -> None:
    stopped: list[bool] = []
    finished: list[bool] = []

    def interrupted_block() -> None:
        with interrupts_deferred(lambda: stopped.append(True)):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0)
            finished.append(True)

    with pytest.raises(KeyboardInterrupt):
        interrupted_block()
    assert stopped == finished == [True]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_the_host_is_left_alone() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: heard.append(number))
    try:
        with interrupts_deferred(lambda: None):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
    assert heard == [signal.SIGINT]
