"""One host of exchanges without a model: what a sum over hosts takes when nobody computes.

usage: exchange.py '{"kind": "star", "rank": 0, "n_hosts": 3, "listen": null, "connect": [...]}'

Home of a star connects to all others; each host of a ring connects to the next one. Prints a JSON
line once it is joined, then answers every line {"width": N, "n": N} with the seconds of one sum.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgert.config import directories
from edgert.hosts.allreduce import Ring, StarHub, StarSpoke
from edgert.hosts.hello import Terms
from edgert.hosts.identity import hosts_folder, load_identity, trusted_peers
from edgert.hosts.link import Link
from edgert.hosts.listener import listen
from edgert.hosts.tls_link import connect

Job = dict[str, Any]
_WARM_UP = 20
_TERMS = Terms("bench", "bench")


class Member:
    """A host of a star or a ring, joined to the others."""

    def __init__(self, job: Job) -> None:
        folder = hosts_folder(directories(os.environ))
        self._identity = load_identity(folder)
        self._trusted = trusted_peers(folder)
        self._listener = (
            listen(job["listen"], self._identity, self._trusted, _TERMS) if job["listen"] else None
        )
        print(json.dumps({"listening": True}), flush=True)
        sys.stdin.readline()  # until all others listen
        rank, addresses = job["rank"], job["connect"]
        self.sum: Callable[[NDArray[np.float32]], None]
        if job["kind"] == "star":
            self.sum = (
                StarSpoke(self._accept()) if rank else StarHub([self._to(a) for a in addresses])
            )
            return
        after = self._to(addresses[0]) if rank == 0 else None
        before = self._accept()
        self.sum = Ring(rank, job["n_hosts"], before, after or self._to(addresses[0]))

    def _accept(self) -> Link:
        if self._listener is None:
            raise ValueError("this host does not listen")
        return self._listener.accept(30.0).link

    def _to(self, named: str) -> Link:
        name, _, address = named.partition("=")
        peer = next(peer for peer in self._trusted if peer.name == name)
        return connect(address, self._identity, peer, _TERMS)

    def run(self, job: Job) -> Job:
        """Add up `n` times."""
        values = np.zeros((1, job["width"]), np.float32)
        for _ in range(min(_WARM_UP, job["n"])):
            self.sum(values)
        times = []
        for _ in range(job["n"]):
            started_s = time.perf_counter()
            self.sum(values)
            times.append(time.perf_counter() - started_s)
        return {"median_s": float(np.median(times)), "mean_s": float(np.mean(times))}


def main() -> None:
    member = Member(json.loads(sys.argv[1]))
    print(json.dumps({"joined": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(member.run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
