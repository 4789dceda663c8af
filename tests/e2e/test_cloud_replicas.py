"""Replicas behind nginx: edges reach one and stay there; when it dies, replies go on on another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from cloud_edges import Edges, check_same, greedy, prompt_of, with_gaps
from edgert.config import directories
from edgert.errors import LinkError
from edgert.host_deployment import service_address
from edgert.hosts.identity import find_peer, hosts_folder, load_identity, trusted_peers
from edgert.hosts.service import connect_service
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from host_identities import make_host
from nginx_cloud import NGINX, Replicas
from worker_processes import TINY, Cluster

pytestmark = [
    pytest.mark.model,
    pytest.mark.slow,
    pytest.mark.skipif(NGINX is None, reason="nginx is not installed (apt-get install nginx)"),
]

N_EDGES = 4
N_TOKENS = 80
NAMES = [f"edge-{index}" for index in range(N_EDGES)]


@pytest.fixture(scope="module")
def edges(tmp_path_factory: pytest.TempPathFactory) -> Edges:
    cluster = Cluster(tmp_path_factory.mktemp("replicas"), ["cloud"])
    cluster.plan("stages", 2, "--stay", "0:4=home", "--stay", "4:8=cloud")
    made = Edges(cluster, "stages", "cloud")
    for name in NAMES:
        made.make(name)
    return made


@pytest.fixture
def replicas(edges: Edges) -> Replicas:
    return Replicas(edges, 2, "--shared", "8")


@pytest.fixture
def address(replicas: Replicas) -> Iterator[str]:
    with replicas.running() as found:
        yield found


@pytest.fixture(scope="module")
def alone() -> list[list[tuple[int, float]]]:
    with closing(open_backend(LoadOptions(TINY, n_ctx=1024, n_threads=1))) as backend:
        return [with_gaps(backend, prompt_of(index), N_TOKENS) for index in range(2 * N_EDGES)]


def in_half(backend: Backend, index: int, half: threading.Barrier) -> list[int]:
    """Return a reply, in whose middle something happens."""
    first = greedy(backend, prompt_of(index), N_TOKENS // 2)
    half.wait(120)
    half.wait(120)
    rest = list(first)
    while len(rest) < N_TOKENS:
        position = len(prompt_of(index)) + len(rest) - 1
        rest.append(int(backend.decode(rest[-1:], position, 1)[0].argmax()))
    return rest


def test_replies_survive_a_replica_token_for_token(
    edges: Edges, replicas: Replicas, address: str, alone: list[list[tuple[int, float]]]
) -> None:
    n_sessions = 2 * N_EDGES
    half = threading.Barrier(n_sessions + 1)
    with ExitStack() as stack:
        backends = [
            stack.enter_context(edges.opened(NAMES[index % N_EDGES], address))
            for index in range(n_sessions)
        ]
        pool = stack.enter_context(ThreadPoolExecutor(n_sessions))
        replies = [pool.submit(in_half, b, index, half) for index, b in enumerate(backends)]
        half.wait(120)
        counts = [len(sessions_at(edges, where)) for where in replicas.addresses]
        assert sum(counts) == n_sessions
        assert min(counts) > 0, "all sessions hash to one replica"
        replicas.kill(0)
        half.wait(120)
        for reply, wanted in zip(replies, alone, strict=True):
            check_same(reply.result(120), wanted)
        assert len(sessions_at(edges, replicas.addresses[1])) == n_sessions


def test_a_replica_knows_whose_call_nginx_passes_on(
    edges: Edges, replicas: Replicas, address: str
) -> None:
    with edges.opened(NAMES[0], address) as backend:
        assert greedy(backend, prompt_of(0), 3)
        seen = [sessions_at(edges, where, NAMES[0]) for where in replicas.addresses]
        assert sorted(map(len, seen)) == [0, 1]
        assert [sessions_at(edges, where, NAMES[1]) for where in replicas.addresses] == [[], []]


def test_nginx_lets_no_stranger_in(edges: Edges, address: str, tmp_path: Path) -> None:
    del tmp_path
    folder = hosts_folder(directories({"EDGERT_HOME": str(edges.folder / NAMES[0])}))
    cloud = find_peer(trusted_peers(folder), "cloud")
    where = service_address(address)[0]
    stranger = make_host("stranger")
    with (
        connect_service(where, stranger.identity, cloud) as client,
        pytest.raises(LinkError),
    ):
        client.status(5.0)
    with connect_service(where, load_identity(folder), cloud) as client:
        assert client.status(5.0)["host"] == "cloud"


def sessions_at(edges: Edges, address: str, *names: str) -> list[object]:
    """Return the sessions that edges have on one replica."""
    found: list[object] = []
    for name in names or NAMES:
        folder = hosts_folder(directories({"EDGERT_HOME": str(edges.folder / name)}))
        peer = find_peer(trusted_peers(folder), "cloud")
        with connect_service(address, load_identity(folder), peer) as client:
            sessions = client.status(10.0)["sessions"]
            assert isinstance(sessions, list)
            found += sessions
    return found
