"""Workers between replies: homes that vanish or never come, and a hundred that come and go."""

from __future__ import annotations

import os
import secrets
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from edgert.errors import LinkError, LinkTimeout
from edgert.events import ignore
from edgert.hosts.frames import FrameKind
from edgert.hosts.identity import find_peer, load_identity, trusted_peers
from edgert.hosts.memory_link import memory_pair
from edgert.hosts.session import Attach
from edgert.hosts.worker import Worker, WorkerSettings
from planned_models import outcome
from worker_processes import Cluster, Watched

pytestmark = pytest.mark.model

SOON_S = 20.0
MB = 1 << 20
SESSION = "5" * 32


class NoExchange:
    """A listener whom nobody calls."""

    address = "127.0.0.1:1"

    def __init__(self) -> None:
        self._closed = threading.Event()

    def accept(self, deadline_s: float) -> object:
        if self._closed.wait(min(deadline_s, 0.01)):
            raise LinkError("closed")
        raise LinkTimeout("nobody")

    def close(self) -> None:
        self._closed.set()


@pytest.fixture
def blobs(
    cluster: Cluster, w1: tuple[Watched, str], home: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    """What w1 has received of the stages."""
    del home
    path = str(cluster.manifests["stages"])
    code, _, err = outcome(
        capsys, "run", "--manifest", path, "--host", w1[1], "-p", "Hello", "-n", "2"
    )
    assert code == 0, err
    return cluster.folder / "w1" / "cache" / "blobs"


@pytest.fixture
def opened(cluster: Cluster, w1: tuple[Watched, str], blobs: Path) -> Iterator[Worker]:
    """A worker in this process with a session that nobody is attached to."""
    settings = WorkerSettings(1 << 30, kept_s=0.05, unattached_s=0.4)
    exchange = NoExchange()
    folder = cluster.folder / "w1" / "hosts"
    worker = Worker(load_identity(folder), blobs, settings, lambda *_: None, exchange)  # type: ignore[arg-type]
    files = cluster.peer("stages", w1[1]).files
    request = {
        "session": SESSION, "host": "w1", "manifest": files.manifest.sha256,
        "parts": [blob.sha256 for blob in files.parts],
    }  # fmt: skip
    home = find_peer(trusted_peers(folder), "home")
    events = list(worker.open(home, request))
    assert events[-1]["ready"] is True
    serving = threading.Thread(target=worker.serve_exchange, daemon=True)
    serving.start()
    yield worker
    worker.drain(0)
    serving.join(SOON_S)
    assert not serving.is_alive()


def n_sessions(worker: Worker) -> int:
    facts = worker.status(None)["sessions"]  # type: ignore[arg-type]
    assert isinstance(facts, list)
    return len(facts)


def await_end(worker: Worker) -> None:
    until_s = time.monotonic() + SOON_S
    while n_sessions(worker):
        assert time.monotonic() < until_s
        time.sleep(0.01)


def test_a_session_that_nobody_attaches_to_is_forgotten(opened: Worker) -> None:
    assert n_sessions(opened) == 1
    await_end(opened)
    assert opened.status(None)["taken_bytes"] == 0  # type: ignore[arg-type]


def test_a_session_lives_while_its_home_is_attached_and_not_long_after(
    opened: Worker, cluster: Cluster
) -> None:
    home = find_peer(trusted_peers(cluster.folder / "w1" / "hosts"), "home")
    here, there = memory_pair(("w1", "home"))
    thread = threading.Thread(target=opened.run, args=(home, there), daemon=True)
    thread.start()
    here.send(FrameKind.CONTROL, Attach(SESSION, "s1").to_bytes())
    assert here.receive(SOON_S).kind is FrameKind.READY
    time.sleep(0.6)  # longer than one that nobody attached to would live
    assert n_sessions(opened) == 1
    here.close()
    await_end(opened)
    thread.join(SOON_S)
    assert not thread.is_alive()


@pytest.mark.slow
def test_a_hundred_sessions_leave_neither_threads_nor_memory_behind(
    cluster: Cluster, w1: tuple[Watched, str], blobs: Path
) -> None:
    assert blobs.is_dir()
    process = psutil.Process(w1[0].process.pid)

    def come_and_go(n_times: int) -> None:
        for _ in range(n_times):
            key = secrets.token_hex(16)
            peer = cluster.peer("stages", w1[1])
            peer.open(key, "w1", ignore)
            link = peer.link()
            link.send(FrameKind.CONTROL, Attach(key, "s1").to_bytes())
            assert link.receive().kind is FrameKind.READY
            link.close()
            peer.close(key)

    come_and_go(10)
    before = process.num_threads(), process.memory_info().rss, process.num_fds()
    n_own = threading.active_count()
    come_and_go(100)
    until_s = time.monotonic() + SOON_S
    while cluster.status(w1[1])["sessions"] or process.num_fds() > before[2] + 8:
        assert time.monotonic() < until_s, (process.num_fds(), before)
        time.sleep(0.1)
    assert process.num_threads() <= before[0] + 8  # of gRPC's pools, which are bounded
    assert process.memory_info().rss - before[1] < 40 * MB  # a session takes 6 MB
    assert threading.active_count() <= n_own + 4


@pytest.fixture
def apart() -> Iterator[tuple[list[str], list[str]]]:
    """A network of its own for a home: how to be in it, and how to cut it off."""
    if os.geteuid() != 0:
        pytest.skip("only root can make a network")
    name = f"edgert-{os.getpid()}"
    wire = f"eg{os.getpid()}"
    commands = [
        f"ip netns add {name}",
        f"ip link add {wire} type veth peer name eth0 netns {name}",
        f"ip addr add 10.213.7.1/30 dev {wire}",
        f"ip link set {wire} up",
        f"ip -n {name} addr add 10.213.7.2/30 dev eth0",
        f"ip -n {name} link set eth0 up",
    ]
    with ExitStack() as stack:
        for index, command in enumerate(commands):
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"no networks can be made here: {done.stderr}")
            if index == 0:
                remove = ["ip", "netns", "del", name]
                stack.callback(subprocess.run, remove, check=False)
        yield ["ip", "netns", "exec", name], f"ip -n {name} link set eth0 down".split()


@pytest.mark.slow
def test_a_home_that_vanishes_between_replies_is_noticed(
    cluster: Cluster, apart: tuple[list[str], list[str]]
) -> None:
    inside, cut = apart
    flags = ("--listen", "10.213.7.1:0", "--deadline", "2", "--keep-session", "0.5")
    path = str(cluster.manifests["shared"])
    with cluster.worker("w1", *flags) as (worker, host):
        arguments = ("chat", "--manifest", path, "--host", host, "--host-deadline", "2")
        with Watched(cluster.home, *arguments, wrapper=inside) as home:
            home.say("Hello\n")
            home.await_err("decode")
            subprocess.run(cut, check=True)
            until_s = time.monotonic() + 60
            while cluster.status(host)["sessions"]:
                assert time.monotonic() < until_s
                time.sleep(0.2)
            home.say("Hello again\n")
            home.await_err(r"error: w1 \(")
        assert worker.process.poll() is None
