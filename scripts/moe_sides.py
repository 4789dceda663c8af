"""One side of one comparison of expert streaming; `bench_moe.py` runs it under a limit.

usage: moe_sides.py SIDE '{"model": ..., ...}'     prints one JSON line; SIDES lists them
"""

from __future__ import annotations

import hashlib
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from edgert.experts.ids import Ids
from edgert.experts.routed import Turn
from edgert.llama.backend import Backend, Counters
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from stream_sides import stock

Job = dict[str, Any]
N_FIRST = 16


class Recorder:
    """Remembers every choice of single tokens, by token and layer."""

    def __init__(self) -> None:
        self.tokens: list[list[list[int]]] = []

    def routed(self, turn: Turn, experts: Ids) -> None:
        """Take a choice; a batch counts as one token that wanted all of it."""
        if turn.index == 0:
            self.tokens.append([])
        self.tokens[-1].append(sorted({int(e) for e in experts.ravel()}))


def tokens_of(job: Job, n_vocab: int) -> tuple[list[int], list[int]]:
    """Return prompt and tokens, the same for every side; the second half is of another topic."""
    half = n_vocab // 2
    prompt = np.random.default_rng(1).integers(10, half, size=int(job["prompt"]))
    first = np.random.default_rng(2).integers(10, half, size=int(job["tokens"]) // 2)
    second = np.random.default_rng(3).integers(half, n_vocab, job["tokens"] - len(first))
    return [int(t) for t in prompt], [int(t) for t in (*first, *second)]


def expert_side(job: Job) -> Job:
    """Run edgert with `memory` bytes, or without a bound."""
    started_s = time.perf_counter()
    recorder = Recorder()
    backend = open_backend(_options(job), routing=recorder if job.get("record") else None)
    load_s = time.perf_counter() - started_s
    prompt, tokens = tokens_of(job, backend.vocab.n_tokens)
    digest = hashlib.sha256()
    started_s = time.perf_counter()
    digest.update(backend.decode(prompt, 0, 1)[0].tobytes())
    prefill_s = time.perf_counter() - started_s
    times, seen = [], [backend.counters()]
    for index, token in enumerate(tokens):
        started_s = time.perf_counter()
        logits = backend.decode([token], len(prompt) + index, 1)[0]
        times.append(time.perf_counter() - started_s)
        if index < N_FIRST:
            digest.update(logits.tobytes())
        seen.append(backend.counters())
    result = {
        "load_s": load_s, "prefill_s": prefill_s, "times_s": times, "logits": digest.hexdigest(),
        "token_s": statistics.median(times), "applied": backend.applied(),
        **_moved(backend, seen, job["skip"]), "routing": recorder.tokens,
    }  # fmt: skip
    result["token_mean_s"] = statistics.fmean(times[job["skip"] :])
    backend.close()
    return {**result, "max_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def sequences_side(job: Job) -> Job:
    """Run one token of each of `sequences` texts at once, loading experts in `order`."""
    n_sequences = job["sequences"]
    backend = open_backend(replace(_options(job), n_sequences=n_sequences, n_logits_max=64))
    streamer = backend._keeper.streamer  # type: ignore[attr-defined]
    streamer.order = job["order"]
    n_vocab = backend.vocab.n_tokens
    random = np.random.default_rng(5)
    times, seen = [], [backend.counters()]
    for index in range(job["tokens"]):
        tokens: list[int] = random.integers(10, n_vocab, size=(n_sequences,)).tolist()
        started_s = time.perf_counter()
        backend.decode_sequences(tokens, [index] * n_sequences, list(range(n_sequences)))
        times.append(time.perf_counter() - started_s)
        seen.append(backend.counters())
    mean_s = statistics.fmean(times[job["skip"] :])
    result = {"token_mean_s": mean_s, "times_s": times, **_moved(backend, seen, job["skip"])}
    backend.close()
    return result


def _options(job: Job) -> LoadOptions:
    return LoadOptions(
        Path(job["model"]), memory_bytes=job.get("memory"), n_ctx=job["ctx"],
        n_threads=job["threads"], packed=job.get("packed", "off"),
        expert_bits=tuple(job.get("bits", ())), expert_cuts=tuple(job.get("cuts", ())),
    )  # fmt: skip


def _moved(backend: Backend, seen: Sequence[Counters], skip: int) -> Job:
    """Return what moved for each token after the first `skip`."""
    before, after = seen[skip], seen[-1]
    n_tokens = len(seen) - 1 - skip
    moved: Job = {
        "bytes_per_token": (after.bytes_read - before.bytes_read) / n_tokens,
        "stall_s": (after.stall_s - before.stall_s) / n_tokens,
        "resident_weight_bytes": after.resident_weight_bytes,
        "layout": after.layout,
    }
    if after.experts is None:
        return moved
    counts = after.experts.since(before.experts).total
    cache = backend._keeper.cache  # type: ignore[attr-defined]
    return {
        **moved,
        "hit_rate": counts.hit_rate,
        "needed_bytes": (counts.bytes_read - counts.early_bytes + counts.saved_bytes) / n_tokens,
        "wasted_bytes": (counts.early_bytes - counts.saved_bytes) / n_tokens,
        "bits_per_weight": counts.bits_per_weight,
        "expert_bytes_read": counts.bytes_read / n_tokens,
        "n_matrices": sum(pool.n_slots for pool in cache._arena.pools),
    }


def llama_side(job: Job) -> Job:
    """Run stock llama.cpp with everything in memory: experts repacked as edgert does, or plain."""
    decode, n_vocab = stock(job)
    prompt, tokens = tokens_of(job, n_vocab)
    digest = hashlib.sha256(decode(prompt, 0).tobytes())
    times = []
    for index, token in enumerate(tokens):
        started_s = time.perf_counter()
        logits = decode([token], len(prompt) + index)
        times.append(time.perf_counter() - started_s)
        if index < N_FIRST:
            digest.update(logits.tobytes())
    skip = job.get("skip", 0)
    return {
        "token_s": statistics.median(times[skip:]), "logits": digest.hexdigest(),
        "token_mean_s": statistics.fmean(times[skip:]),
    }  # fmt: skip


SIDES: dict[str, Callable[[Job], Job]] = {
    "experts": expert_side,
    "sequences": sequences_side,
    "llama": llama_side,
}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](json.loads(sys.argv[2]))))
