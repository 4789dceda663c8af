"""Edges with keys of their own, whose models go on in the cloud."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from edgert.config import directories
from edgert.host_deployment import HostsAsk, deploy_hosts
from edgert.hosts.host_session import Peer
from edgert.hosts.identity import create_identity, load_identity, trust
from edgert.llama.backend import Backend
from partition.manifest import Manifest
from partition.manifest_file import read_manifest
from worker_processes import TINY, Cluster

N_PROMPT = 30
NEAR = 0.15  # of logits whose errors are about 0.02 each


class Edges:
    """Homes that a cluster's worker trusts.

    Args:
        cluster: With a manifest of stages.
        name: Of the manifest.
        cloud: The worker whose name and key the edges know.
    """

    def __init__(self, cluster: Cluster, name: str, cloud: str = "w1") -> None:
        self.folder = cluster.folder
        self.cluster = cluster
        self.cloud = cloud
        self.manifest: Manifest = read_manifest(cluster.manifests[name])

    def make(self, name: str) -> None:
        """Make an edge, trusted by the cloud and trusting it."""
        place = self.folder / name / "hosts"
        own = create_identity(place, name)
        known = load_identity(self.folder / self.cloud / "hosts")
        trust(place, self.cloud, known.certificate_pem)
        trust(self.folder / self.cloud / "hosts", name, own.certificate_pem)

    def ask(self, name: str, address: str) -> HostsAsk:
        """Return how an edge reaches the cloud at an address."""
        places = directories({"EDGERT_HOME": str(self.folder / name)})
        return HostsAsk(places, {self.cloud: address})

    @property
    def part(self) -> str:
        """The part in the cloud."""
        return next(s.stage_id for s in self.manifest.stages if s.host_id == self.cloud)

    def peer(self, name: str, address: str) -> Peer:
        """Return the cloud as an edge reaches it."""
        return deploy_hosts(self.manifest, [TINY], self.ask(name, address)).peers()[self.cloud]

    @contextmanager
    def opened(self, name: str, address: str) -> Iterator[Backend]:
        """Open the model at an edge."""
        deployment = deploy_hosts(self.manifest, [TINY], self.ask(name, address))
        backend = deployment.open(lambda _: None)
        try:
            yield backend
        finally:
            backend.close()


def prompt_of(index: int) -> list[int]:
    """Return a text of its own for each session."""
    return [300 + (37 * index + 11 * i) % 1500 for i in range(N_PROMPT)]


def greedy(backend: Backend, prompt: Sequence[int], n_tokens: int) -> list[int]:
    """Return the likeliest continuation."""
    backend.truncate(0)
    tokens = [int(np.argmax(backend.decode(prompt, 0, 1)[0]))]
    while len(tokens) < n_tokens:
        position = len(prompt) + len(tokens) - 1
        tokens.append(int(np.argmax(backend.decode(tokens[-1:], position, 1)[0])))
    return tokens


def with_gaps(backend: Backend, prompt: Sequence[int], n_tokens: int) -> list[tuple[int, float]]:
    """Return the likeliest continuation, each token with how far ahead of the next best it is."""
    backend.truncate(0)
    found: list[tuple[int, float]] = []
    logits = backend.decode(prompt, 0, 1)[0]
    while True:
        second, first = np.sort(logits)[-2:]
        found.append((int(logits.argmax()), float(first - second)))
        if len(found) == n_tokens:
            return found
        position = len(prompt) + len(found) - 1
        logits = backend.decode([found[-1][0]], position, 1)[0]


def check_same(found: Sequence[int], wanted: Sequence[tuple[int, float]]) -> None:
    """Refuse a text that leaves another one elsewhere than at a near tie.

    What is computed together, and a cache that was filled anew in batches, is rounded differently.
    """
    assert len(found) == len(wanted)
    for index, (saw, (token, gap)) in enumerate(zip(found, wanted, strict=True)):
        if saw != token:
            assert gap < NEAR, f"token {index} is {saw}, wanted {token}, which leads by {gap:.3g}"
            return


def together(
    edges: Edges, names: Sequence[str], address: str, n_tokens: int
) -> Mapping[str, list[int]]:
    """Return what each edge makes of its prompt, all at the same time."""
    with ExitStack() as stack:
        backends = [stack.enter_context(edges.opened(name, address)) for name in names]
        pool = stack.enter_context(ThreadPoolExecutor(len(names)))
        found = [
            pool.submit(greedy, backend, prompt_of(index), n_tokens)
            for index, backend in enumerate(backends)
        ]
        return {name: future.result() for name, future in zip(names, found, strict=True)}


def folder_of(edges: Edges, name: str) -> Path:
    """Return the folder of an edge's keys."""
    return edges.folder / name / "hosts"
