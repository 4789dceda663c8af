#!/usr/bin/env python3
"""Two replicas of the cloud side behind nginx: many sessions together, and one replica killed.

Every session is a home with a key and a link of its own, in this process; it runs the first half of
tiny-chat, the cloud the second. Compared are replies all at once with replies one after the other,
and replies during which a replica is killed with those of the same sessions undisturbed. The last
line of the output is JSON.

usage: python scripts/bench_replicas.py [--sessions 50] [--tokens 60] [--edges 16]
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import edgert.models
from bench_stream import machine
from edgert.llama.backend import Backend
from hosts_bench.programs import say
from replicas_bench.balancer import NGINX
from replicas_bench.cloud import Cloud, cloud
from replicas_bench.part_rates import part_rates

_MODEL = Path(edgert.models.__file__).parent / "tiny-chat.gguf"
_NEAR = 0.15  # of logits; sums in another order differ by some hundredths
_NAMES = ("Lily", "Tom", "Sara", "Ben", "Mia", "Max", "Anna", "Tim", "Sue", "Jack")
_OPENINGS = (
    "Once upon a time there was a girl named {}",
    "One day {} went to the park with",
    "{} had a big red ball and",
    "It was a sunny day. {} and a little dog",
    "{} was sad because",
)


@dataclass
class Reply:
    """Tokens of a greedy reply.

    Attributes:
        tokens: So far.
        gaps: How far each was ahead of the next best.
        longest_s: The longest wait for one.
    """

    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    longest_s: float = 0.0


def main() -> int:
    """Run everything and print what was found."""
    parser = argparse.ArgumentParser(description="replicas behind nginx")
    parser.add_argument("--sessions", type=int, default=50, help="at most 60")
    parser.add_argument("--tokens", type=int, default=60, help="of each reply")
    parser.add_argument("--edges", type=int, default=16, help="keys")
    arguments = parser.parse_args()
    if NGINX is None:
        parser.error("nginx is not installed: apt-get install nginx")
    edges = [f"edge{index}" for index in range(arguments.edges)]
    load = os.getloadavg()[0]
    with ExitStack() as stack:
        work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-replicas-")))
        place = stack.enter_context(cloud(work, _MODEL, edges, arguments.sessions + 1))
        with ThreadPoolExecutor(8) as pool:
            names = [edges[i % len(edges)] for i in range(arguments.sessions)]
            backends = list(pool.map(place.open, names))
        for backend in backends:
            stack.callback(backend.close)
        say(f"{len(backends)} sessions of {len(edges)} edges are open")
        found = measured(place, backends, arguments.tokens)
        one_by_one, at_once = part_rates(place.part(edges[0]))
    record = {
        "sessions": len(backends), "edges": len(edges), "tokens": arguments.tokens,
        "machine": machine(), "load_before": load, **found,
        "part_one_by_one_tok_s": round(one_by_one), "part_together_tok_s": round(at_once),
        "part_speedup": round(at_once / one_by_one, 2),
    }  # fmt: skip
    print(json.dumps(record))
    return 0 if found["completed"] == len(backends) and not found["wrong"] else 1


def measured(place: Cloud, backends: Sequence[Backend], n_tokens: int) -> dict[str, Any]:
    """Run all replies together, some alone, and all while a replica is killed."""
    prompts = [prompt_of(backend, index) for index, backend in enumerate(backends)]
    together(backends, prompts, 4)  # everything has been touched
    started_s = time.perf_counter()
    calm = together(backends, prompts, n_tokens)
    together_s = time.perf_counter() - started_s
    few = range(0, len(backends), max(1, len(backends) // 10))
    started_s = time.perf_counter()
    for index in few:
        reply(backends[index], prompts[index], n_tokens, Reply())
    alone_s = (time.perf_counter() - started_s) / len(few)
    say(f"together {together_s:.1f} s, one after the other {alone_s * len(backends):.1f} s")
    disturbed = together(
        backends, prompts, n_tokens, lambda: os.kill(place.replicas[0].pid, signal.SIGKILL)
    )
    verdicts = [verdict(saw, wanted) for saw, wanted in zip(disturbed, calm, strict=True)]
    counts = {word: verdicts.count(word) for word in ("equal", "near tie", "wrong")}
    return {
        "completed": sum(len(found.tokens) == n_tokens for found in disturbed),
        "identical": counts["equal"] == len(backends),
        "equal": counts["equal"],
        "near_ties": counts["near tie"],
        "wrong": counts["wrong"],
        "longest_wait_s": round(max(found.longest_s for found in disturbed), 2),
        "longest_wait_median_s": round(
            statistics.median(found.longest_s for found in disturbed), 2
        ),
        "longest_wait_undisturbed_s": round(max(found.longest_s for found in calm), 2),
        "together_tok_s": round(len(backends) * n_tokens / together_s, 1),
        "alone_tok_s": round(n_tokens / alone_s, 1),
        "speedup": round(alone_s * len(backends) / together_s, 2),
    }


def together(
    backends: Sequence[Backend],
    prompts: Sequence[Sequence[int]],
    n_tokens: int,
    in_the_middle: Callable[[], None] | None = None,
) -> list[Reply]:
    """Return the replies of all sessions at once; do something when half of them is there."""
    replies = [Reply() for _ in backends]
    over = threading.Event()

    def watch() -> None:
        half = len(backends) * n_tokens // 2
        while sum(len(found.tokens) for found in replies) < half and not over.wait(0.005):
            pass
        if in_the_middle is not None:
            in_the_middle()

    watcher = threading.Thread(target=watch) if in_the_middle is not None else None
    if watcher is not None:
        watcher.start()
    with ThreadPoolExecutor(len(backends)) as pool:
        done = [
            pool.submit(reply, backend, prompt, n_tokens, found)
            for backend, prompt, found in zip(backends, prompts, replies, strict=True)
        ]
    over.set()
    if watcher is not None:
        watcher.join()
    for future in done:
        if (error := future.exception()) is not None:
            say(f"a reply failed: {error}")
    return replies


def reply(backend: Backend, prompt: Sequence[int], n_tokens: int, found: Reply) -> None:
    """Fill in a greedy reply."""
    backend.truncate(0)
    tokens, position = list(prompt), 0
    while len(found.tokens) < n_tokens:
        started_s = time.perf_counter()
        logits = backend.decode(tokens, position, 1)[0]
        found.longest_s = max(found.longest_s, time.perf_counter() - started_s)
        second, first = np.partition(logits, -2)[-2:]
        position += len(tokens)
        tokens = [int(logits.argmax())]
        found.gaps.append(float(first - second))
        found.tokens.append(tokens[0])


def verdict(saw: Reply, wanted: Reply) -> str:
    """Say whether a reply is the wanted one, or leaves it where two tokens were nearly tied."""
    if saw.tokens == wanted.tokens:
        return "equal"
    pairs = zip(saw.tokens, wanted.tokens, strict=False)
    first = next((index for index, (a, b) in enumerate(pairs) if a != b), None)
    return "near tie" if first is not None and wanted.gaps[first] < _NEAR else "wrong"


def prompt_of(backend: Backend, index: int) -> list[int]:
    """Return a text of its own for each session."""
    opening = _OPENINGS[index % len(_OPENINGS)]
    return backend.vocab.tokenize(opening.format(_NAMES[index // len(_OPENINGS) % len(_NAMES)]))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
