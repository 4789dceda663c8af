"""The cloud's part alone, without links: tokens of many sessions together, and one by one."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import replace

import numpy as np

from edgert.hosts.allreduce import Exchange
from edgert.hosts.stage_parts import StagePart, n_embd
from edgert.llama.context import Piece

_N_SESSIONS = 16
_N_STEPS = 40


def part_rates(part: StagePart) -> tuple[float, float]:
    """Return tokens per second one by one and together, for 16 sessions."""
    options = part.options
    n_ctx = options.n_ctx or 0
    asked = replace(
        options, n_sequences=_N_SESSIONS, n_cells=_N_SESSIONS * n_ctx, memory_bytes=None
    )
    rows = np.random.default_rng(1).standard_normal((_N_SESSIONS, n_embd(part.part.file)))
    states = rows.astype(np.float32)
    sequences = range(_N_SESSIONS)
    with closing(replace(part, options=asked).open(Exchange())) as runner:
        alone_s = together_s = 0.0
        for position in range(_N_STEPS):
            pieces = [Piece(sequence, position, 1, 1) for sequence in sequences]
            if position % 2:
                started_s = time.perf_counter()
                runner.run_pieces(states, pieces)
                together_s += time.perf_counter() - started_s
            else:
                started_s = time.perf_counter()
                for piece in pieces:
                    runner.run_pieces(states[piece.sequence : piece.sequence + 1], [piece])
                alone_s += time.perf_counter() - started_s
    n_tokens = _N_SESSIONS * _N_STEPS / 2
    return n_tokens / alone_s, n_tokens / together_s
