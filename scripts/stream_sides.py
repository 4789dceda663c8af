"""One side of one comparison, in a process of its own; `bench_stream.py` runs it under a limit.

usage: stream_sides.py SIDE '{"model": ..., ...}'     prints one JSON line; SIDES lists them
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.events import ignore
from edgert.generation import Generation, Request
from edgert.llama.lib import load_library
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.sampling import SamplingParams
from edgert.speculation import Speculation
from edgert.speculative import NgramDrafter
from edgert.token_cache import TokenCache
from edgert.weights.flash import PAGE_BYTES, Extent, FlashReader, Ticket
from edgert.weights.memory import Region
from edgert.weights.repack import AVOIDED_BUFFERS

Decode = Callable[[Sequence[int], int], NDArray[np.float32]]
Job = dict[str, Any]


def tokens_of(n_tokens: int, n_vocab: int, seed: int = 1) -> list[int]:
    """Return the same random tokens for every side."""
    return [int(t) for t in np.random.default_rng(seed).integers(10, n_vocab, n_tokens)]


def measure(
    decode: Decode, job: Job, n_vocab: int, prefilled: Callable[[], None] = lambda: None
) -> Job:
    """Time a prefill and single tokens; hash every logit on the way.

    Args:
        decode: Runs tokens at a position, returns the last token's logits.
        job: `prompt` and `tokens`: how many.
        n_vocab: Size of the vocabulary.
        prefilled: Called between the prefill and the first single token.
    """
    prompt = tokens_of(job["prompt"], n_vocab)
    digest = hashlib.sha256()
    started_s = time.perf_counter()
    logits = decode(prompt, 0)
    digest.update(logits.tobytes())
    prefill_s = time.perf_counter() - started_s
    prefilled()
    times = []
    for index, token in enumerate(tokens_of(job["tokens"], n_vocab, seed=2)):
        started_s = time.perf_counter()
        logits = decode([token], len(prompt) + index)
        times.append(time.perf_counter() - started_s)
        digest.update(logits.tobytes())
    return {
        "prefill_s": prefill_s,
        "token_s": statistics.median(times) if times else None,
        "token_mean_s": statistics.fmean(times) if times else None,
        "times_s": times,
        "logits": digest.hexdigest(),
    }


def llama_side(job: Job) -> Job:
    """Run stock llama.cpp: mmap without repacking, or resident with repacking that runs here."""
    started_s = time.perf_counter()
    decode, n_vocab = stock(job)
    load_s = time.perf_counter() - started_s
    return {"load_s": load_s, **measure(decode, job, n_vocab), "max_rss_bytes": _max_rss()}


def stock(job: Job) -> tuple[Decode, int]:
    """Load a model with llama.cpp alone; return what decodes, and the vocabulary's size."""
    os.environ["GOMP_SPINCOUNT"] = "300000"  # libgomp's own default, which edgert lowers
    library = load_library()
    api = library.api
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    params.use_extra_bufts = False
    params.load_mode = api.LLAMA_LOAD_MODE_MMAP
    overrides = _repack_overrides(library) if job.get("repack") else None
    if overrides is not None:
        params.load_mode = api.LLAMA_LOAD_MODE_NONE
        params.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    model = api.llama_model_load_from_file(job["model"].encode(), params)
    if not model:
        raise RuntimeError(library.log.last_problem())
    context_params = api.llama_context_default_params()
    context_params.n_ctx, context_params.n_batch, context_params.n_ubatch = job["ctx"], 512, 512
    context_params.n_threads = context_params.n_threads_batch = job["threads"]
    context = api.llama_init_from_model(model, context_params)
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))

    def decode(tokens: Sequence[int], _position: int) -> NDArray[np.float32]:
        ids = (ctypes.c_int32 * len(tokens))(*tokens)
        if api.llama_decode(context, api.llama_batch_get_one(ids, len(tokens))):
            raise RuntimeError("llama_decode failed")
        pointer = api.llama_get_logits_ith(context, -1)
        logits: NDArray[np.float32] = np.ctypeslib.as_array(pointer, shape=(n_vocab,))
        return logits

    return decode, n_vocab


def edgert_side(job: Job) -> Job:
    """Run edgert with `memory` bytes, or without a bound."""
    started_s = time.perf_counter()
    backend = open_backend(
        LoadOptions(
            Path(job["model"]), memory_bytes=job.get("memory"), n_ctx=job["ctx"],
            n_threads=job["threads"], packed=job.get("packed", "off"),
            packed_folder=Path(job["packed_folder"]) if "packed_folder" in job else None,
        )
    )  # fmt: skip
    load_s = time.perf_counter() - started_s

    def decode(tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        logits: NDArray[np.float32] = backend.decode(tokens, position, 1)[0]
        return logits

    seen = [backend.counters()]
    result = measure(decode, job, backend.vocab.n_tokens, lambda: seen.append(backend.counters()))
    loaded, before, after = seen[0], seen[1], backend.counters()
    n_passes = max(1, after.n_passes - before.n_passes)
    measured: Job = {
        "load_s": load_s,
        **result,
        "bytes_per_token": (after.bytes_read - before.bytes_read) / n_passes,
        "stall_s": (after.stall_s - before.stall_s) / n_passes,
        "pinned_bytes": loaded.pinned_bytes,
        "resident_weight_bytes": after.resident_weight_bytes,
        "streaming": after.streaming,
        "layout": after.layout,
        "applied": backend.applied(),
    }
    backend.close()
    return {**measured, "max_rss_bytes": _max_rss()}


def llama_greedy_side(job: Job) -> Job:
    """Continue a prompt greedily with stock llama.cpp, memory-mapped."""
    decode, _ = stock(job)
    tokens = list(job["prompt_ids"])
    made: list[int] = []
    started_s = time.perf_counter()
    for _ in range(job["tokens"] + 1):
        tokens = [int(decode(tokens, 0).argmax())]
        if not made:
            started_s = time.perf_counter()
        made += tokens
    return {"token_s": (time.perf_counter() - started_s) / job["tokens"], "made": made}


def edgert_greedy_side(job: Job) -> Job:
    """Continue a prompt greedily with edgert's engine, with n-gram drafts or without."""
    n_drafted = job.get("draft_max", 0)
    backend = open_backend(
        LoadOptions(
            Path(job["model"]), memory_bytes=job.get("memory"), n_ctx=job["ctx"],
            n_threads=job["threads"], n_logits_max=n_drafted + 1,
        )
    )  # fmt: skip
    request = Request(
        tuple(job["prompt_ids"]), SamplingParams(temperature=0.0), job["tokens"] + 1, (), 0
    )
    speculation = Speculation(NgramDrafter(), n_drafted) if n_drafted else None
    generation = Generation(TokenCache(backend), request, speculation, "error", ignore)
    made = [token for chunk in generation.run() for token in chunk.token_ids]
    stats = generation.stats()
    backend.close()
    return {
        "token_s": stats.decode_s / max(1, stats.n_generated_tokens - 1),
        "made": made,
        "tokens_per_pass": stats.tokens_per_pass,
        "n_rechecked": stats.n_rechecked,
    }


def flash_side(job: Job) -> Job:
    """Measure sequential direct reads of the model file, as the streamer issues them."""
    path = Path(job["model"])
    size = min(job.get("bytes", 4 << 30), path.stat().st_size) // PAGE_BYTES * PAGE_BYTES
    piece = 32 << 20
    region = Region(load_library().libc, 2 * piece, huge=True)
    reader = FlashReader([path], [path.stat().st_size])
    started_s = time.perf_counter()
    tickets: list[Ticket] = []
    for index, offset in enumerate(range(0, size - piece + 1, piece)):
        if len(tickets) >= 2:
            tickets[index - 2].wait()
        address = region.address + index % 2 * piece
        tickets.append(reader.submit(Extent(0, offset, piece, address, "probe")))
    for ticket in tickets:
        ticket.wait()
    elapsed_s = time.perf_counter() - started_s
    reader.close()
    return {"flash_bytes_per_s": len(tickets) * piece / elapsed_s}


def _repack_overrides(library: Any) -> Any:  # noqa: ANN401
    """Place the matrices of a llama model in the repacking buffer that edgert uses."""
    from edgert.weights.repack import Repacker

    repacker = Repacker(library)
    if AVOIDED_BUFFERS and not repacker.types:
        raise RuntimeError("no repacking buffer here")

    class Override(ctypes.Structure):
        _fields_ = [("pattern", ctypes.c_char_p), ("buft", ctypes.c_void_p)]

    pattern = rb"(attn_(q|k|v|output)|ffn_(gate|up|down)(_exps)?)\.weight|^output\.weight"
    return (Override * 2)(Override(pattern, repacker.types[0]), Override(None, None))


def _max_rss() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


SIDES: dict[str, Callable[[Job], Job]] = {
    "llama": llama_side,
    "edgert": edgert_side,
    "flash": flash_side,
    "llama-greedy": llama_greedy_side,
    "edgert-greedy": edgert_greedy_side,
}

if __name__ == "__main__":
    print(json.dumps(SIDES[sys.argv[1]](json.loads(sys.argv[2]))))
