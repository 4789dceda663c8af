"""Replicas of a worker behind nginx, as docs/cloud/nginx.conf has it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from cloud_edges import Edges
from edgert.hosts.identity import create_identity, load_identity, trust
from replicas_bench.balancer import NGINX, Keys, balancer
from worker_processes import Watched

__all__ = ["NGINX", "Replicas"]

GATEWAY = "gateway"


class Replicas:
    """Workers with one key, each with a cache of its own, and nginx before them.

    Args:
        edges: All made already; their cloud's folder is that of the first replica.
        n_replicas: How many.
        flags: Of the workers.
    """

    def __init__(self, edges: Edges, n_replicas: int, *flags: str) -> None:
        self._edges = edges
        self._flags = flags
        self._folder = edges.folder
        own = self._folder / edges.cloud / "hosts"
        if not (self._folder / GATEWAY).exists():
            gateway = create_identity(self._folder / GATEWAY / "hosts", GATEWAY)
            trust(own, GATEWAY, gateway.certificate_pem)
        self.homes = [self._folder / f"replica-{index}" for index in range(n_replicas)]
        for home in self.homes:
            shutil.copytree(own, home / "hosts", dirs_exist_ok=True)
        self.workers: list[Watched] = []
        self.addresses: list[str] = []

    @contextmanager
    def running(self) -> Iterator[str]:
        """Start everything; give the address that edges know."""
        with ExitStack() as stack:
            for home in self.homes:
                worker = stack.enter_context(
                    Watched(
                        home, "worker", "--listen", "127.0.0.1:0", "--gateway", GATEWAY,
                        *self._flags,
                    )
                )  # fmt: skip
                self.workers.append(worker)
            self.addresses = [w.await_err(r"works at (\S+) ")[1] for w in self.workers]
            found = stack.enter_context(
                balancer(self._folder / "nginx", self.addresses, self._keys())
            )
            yield f"grpcs://{found}"

    def kill(self, index: int) -> None:
        """End a replica at once."""
        self.workers[index].signal(signal.SIGKILL)

    def _keys(self) -> Keys:
        edges = sorted(self._folder.glob("edge*/hosts"))
        return Keys(
            self._folder / self._edges.cloud / "hosts",
            self._folder / GATEWAY / "hosts",
            b"".join(load_identity(path).certificate_pem for path in edges),
        )
