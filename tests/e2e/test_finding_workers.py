"""`edgert ps` and `edgert devices --lan` against workers that run."""

from __future__ import annotations

import json
import socket
from contextlib import closing

import pytest

from edgert.cli.lan import lines, trust_in
from edgert.errors import ConfigError, LinkError
from edgert.hosts.identity import load_identity, trusted_peers
from edgert.hosts.lan import FoundWorker, find_workers
from planned_models import outcome
from worker_processes import Cluster, Watched

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("home")]

LOOPBACK = ["127.0.0.1"]


def test_ps_shows_the_others_where_one_is_gone(
    cluster: Cluster, w1: tuple[Watched, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        gone = f"w2=127.0.0.1:{server.getsockname()[1]}"
    hosts = ("--host", w1[1], "--host", gone)
    with cluster.start("shared", [w1[1]]) as home:
        home.await_out(r"\w+ \w+ \w+ ")
        code, out, err = outcome(capsys, "ps", *hosts, "--json")
        assert code == 6, err
        found = json.loads(out)
        assert found["w2"]["state"] == "unreachable"
        assert "refused" in found["w2"]["error"]
        (session,) = found["w1"]["sessions"]
        (part,) = session["parts"]
        assert session["peer"] == "home"
        assert part["attached"]
        assert part["n_tokens"] > 3
        assert part["busy_s"] > 0
        code, out, err = outcome(capsys, "ps", *hosts)
        assert code == 6, err
        assert "tokens/s" in out
        assert "w2 at 127.0.0.1:" in out
        assert max(map(len, out.splitlines())) <= 80
    code, out, _ = outcome(capsys, "ps", "--host", w1[1])
    assert (code, "serving" in out) == (0, True)


def test_ps_wants_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = outcome(capsys, "ps")
    assert (code, "--host NAME=ADDRESS:PORT" in err) == (2, True), err


def look() -> tuple[FoundWorker, ...]:
    try:
        return find_workers(1.5, LOOPBACK)
    except (ConfigError, LinkError) as error:
        pytest.skip(f"no multicast here: {error.message}")


def test_a_worker_is_found_only_while_it_announces_itself(
    cluster: Cluster, w1: tuple[Watched, str]
) -> None:
    assert w1[1].partition("=")[2] not in [worker.address for worker in look()]
    own = load_identity(cluster.folder / "w2" / "hosts")
    with cluster.worker("w2", "--announce") as (worker, host):
        address = host.partition("=")[2]
        found = [worker for worker in look() if worker.address == address]
        assert found == [FoundWorker("w2", address, own.fingerprint)]
        worker.process.terminate()
        assert worker.code() == 0
    assert address not in [worker.address for worker in look()]


def test_what_is_found_is_not_trusted_by_that(cluster: Cluster) -> None:
    trusted = trusted_peers(cluster.home / "hosts")
    known = next(peer for peer in trusted if peer.name == "w1")
    workers = [
        FoundWorker("w1", "10.0.0.2:7411", known.fingerprint),
        FoundWorker("w1", "10.0.0.3:7411", "0" * 64),
        FoundWorker("w9", "10.0.0.4:7411", known.fingerprint),
        FoundWorker("w9", "10.0.0.5:7411", "1" * 64),
    ]
    assert [trust_in(worker, trusted) for worker in workers] == [
        "trusted", "not trusted: another key than w1's", "trusted as w1", "not trusted",
    ]  # fmt: skip
    assert all(len(line) <= 80 for line in lines(workers, trusted))
    assert trusted_peers(cluster.home / "hosts") == trusted
