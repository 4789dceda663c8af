"""One side of a comparison: a model, here or over several hosts, that stays open between jobs.

usage: side.py '{"model": ..., "manifest": ..., "hosts": {...}}'

Then one job in JSON a line on stdin, and its answer in JSON a line on stdout.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from edgert.config import directories
from edgert.deployment import deploy
from edgert.events import ignore
from edgert.host_deployment import HostsAsk
from edgert.hosts.identity import find_peer, hosts_folder, load_identity, trusted_peers
from edgert.hosts.service import connect_service
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.model_files import FileHashes
from hosts_bench.stamps import write_down
from partition.manifest_file import read_manifest

Job = dict[str, Any]
_SEED = 3
_CANDIDATES = 8  # as a greedy reply needs them


class Side:
    """An open model.

    Args:
        job: `model`; `manifest` and `hosts` (addresses by id) of a split one, or `memory`,
            `threads` and `ctx` of one that is here alone.
    """

    def __init__(self, job: Job) -> None:
        started_s = time.perf_counter()
        self._hosts: dict[str, str] = job.get("hosts", {})
        self.backend = self._open(job)
        self.backend.expect(_CANDIDATES)
        self._position = 0
        self._random = np.random.default_rng(_SEED)
        self.load_s = time.perf_counter() - started_s

    def _open(self, job: Job) -> Backend:
        model = Path(job["model"])
        if "manifest" not in job:
            options = LoadOptions(
                model, memory_bytes=job.get("memory"), n_ctx=job["ctx"], n_batch=128,
                n_threads=job["threads"],
            )  # fmt: skip
            return open_backend(options)
        folders = directories(os.environ)
        ask = HostsAsk(folders, self._hosts, ignore, deadline_s=60.0)
        path = Path(job["manifest"])
        hashes = FileHashes(folders.cache)
        return deploy(read_manifest(path), path, model, hashes, hosts=ask).open()

    def decode(self, job: Job) -> Job:
        """Run `n` random tokens, one at a time, after a prompt of `prompt` if that is named."""
        if "prompt" in job:
            self.backend.truncate(0)
            started_s = time.perf_counter()
            self.backend.decode(self._tokens(job["prompt"]), 0, 1)
            self._position = job["prompt"]
            return {"prefill_s": time.perf_counter() - started_s}
        times = []
        for token in self._tokens(job["n"]):
            if self._position >= self.backend.n_ctx:
                self.backend.truncate(1)
                self._position = 1
            started_s = time.perf_counter()
            self.backend.decode([token], self._position, 1)
            times.append(time.perf_counter() - started_s)
            self._position += 1
        return {"times_s": times}

    def greedy(self, job: Job) -> Job:
        """Continue texts greedily by at most `n` tokens each; `margins` are to the second best."""
        made, margins = [], []
        for text in job["texts"]:
            tokens, gaps = continued_with_margins(self.backend, text, job["n"])
            made.append(tokens)
            margins.append(gaps)
        return {"made": made, "margins": margins}

    def facts(self, _job: Job) -> Job:
        """Say what is held here, and what every other host says of its parts."""
        counters = self.backend.counters()
        folder = hosts_folder(directories(os.environ))
        others = {}
        for name, address in self._hosts.items():
            peer = find_peer(trusted_peers(folder), name)
            with connect_service(address, load_identity(folder), peer) as client:
                others[name] = client.status()
        return {
            "load_s": self.load_s,
            "layout": counters.layout,
            "streaming": counters.streaming,
            "resident_bytes": counters.resident_weight_bytes,
            "bytes_read": counters.bytes_read,
            "rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "others": others,
        }

    def _tokens(self, n_tokens: int) -> list[int]:
        found = self._random.integers(10, self.backend.vocab.n_tokens, n_tokens)
        return [int(token) for token in found]


def continued_with_margins(
    backend: Backend, text: str, n_tokens: int
) -> tuple[list[int], list[float]]:
    """Return a greedy continuation, and how far the second best logit of each token was."""
    prompt = list(backend.vocab.tokenize(text, parse_special=True))
    backend.truncate(0)
    logits = backend.decode(prompt, 0, 1)[0]
    made: list[int] = []
    margins = []
    while len(made) < n_tokens:
        second, first = np.partition(logits, -2)[-2:]
        margins.append(float(first - second))
        made.append(int(logits.argmax()))
        if backend.vocab.is_eog(made[-1]):
            break
        logits = backend.decode([made[-1]], len(prompt) + len(made) - 1, 1)[0]
    return made, margins


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)


def main() -> None:
    asked = json.loads(sys.argv[1])
    signal.signal(signal.SIGTERM, _leave)
    if "stamps" in asked:
        write_down(Path(asked["stamps"]))
    side = Side(asked)
    jobs: dict[str, Callable[[Job], Job]] = {
        "decode": side.decode,
        "greedy": side.greedy,
        "facts": side.facts,
    }
    print(json.dumps({"load_s": side.load_s}), flush=True)
    try:
        for line in sys.stdin:
            job = json.loads(line)
            print(json.dumps(jobs[job.pop("do")](job)), flush=True)
    finally:
        side.backend.close()


if __name__ == "__main__":
    main()
