"""Many requests of many edges, links cut, the worker frozen: right text, flat memory."""

from __future__ import annotations

import os
import random
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cloud_edges import Edges, check_same, greedy, prompt_of, with_gaps
from edgert.errors import LinkError
from edgert.hosts.backend import HostsBackend
from edgert.hosts.lasting_part import LastingPart
from edgert.hosts.stages import Stages
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from worker_processes import TINY, Cluster

pytestmark = [pytest.mark.model, pytest.mark.slow]

N_EDGES, N_REQUESTS, N_TOKENS = 16, 1000, 8


def link_of(backend: Backend) -> LastingPart:
    """Return the part of a session in the cloud."""
    assert isinstance(backend, HostsBackend)
    route = backend._route
    assert isinstance(route, Stages)
    return next(part for part in route._parts if isinstance(part, LastingPart))


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_thousand_requests_with_cut_links_and_a_freezing_worker(cluster: Cluster) -> None:
    edges = Edges(cluster, "stages")
    names = [f"soak{index}" for index in range(N_EDGES)]
    for name in names:
        edges.make(name)
    with closing(open_backend(LoadOptions(TINY, n_ctx=1024, n_threads=1))) as backend:
        wanted = [with_gaps(backend, prompt_of(index), N_TOKENS) for index in range(40)]
    over, sizes = threading.Event(), []
    with ExitStack() as stack:
        worker, host = stack.enter_context(
            cluster.worker("w1", "--shared", str(N_EDGES), "--key-sessions", "2")
        )
        address = host.partition("=")[2]
        backends = [stack.enter_context(edges.opened(name, address)) for name in names]

        def disturb() -> None:
            chance = random.Random(7)
            while not over.wait(0.05):
                part = link_of(chance.choice(backends))
                part._part.link.fail(LinkError("cut"))
                if chance.random() < 0.05:
                    worker.signal(signal.SIGSTOP)
                    over.wait(0.3)
                    worker.signal(signal.SIGCONT)
                sizes.append(resident_bytes(worker.process.pid))

        disturber = threading.Thread(target=disturb)
        disturber.start()

        def requests(index: int) -> int:
            done = 0
            for number in range(index, N_REQUESTS, N_EDGES):
                which = number % len(wanted)
                check_same(greedy(backends[index], prompt_of(which), N_TOKENS), wanted[which])
                done += 1
            return done

        try:
            with ThreadPoolExecutor(N_EDGES) as pool:
                assert sum(pool.map(requests, range(N_EDGES), timeout=240)) == N_REQUESTS
        finally:
            over.set()
            disturber.join()
            worker.signal(signal.SIGCONT)
    third = len(sizes) // 3
    assert third > 10
    assert max(sizes[-third:]) < 1.1 * max(sizes[third : 2 * third])
