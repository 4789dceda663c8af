"""A host that is lost in a reply, through the program: home goes on, or says what was said."""

from __future__ import annotations

import json
import signal
import socket
from contextlib import suppress
from pathlib import Path

import pytest

from partition.manifest_file import parse_manifest, read_manifest, write_manifest
from planned_models import outcome
from worker_processes import TINY, WITHOUT_END, Cluster, Watched

pytestmark = pytest.mark.model

STAYS = ("--stay", "0:4=home", "--stay", "4:8=w1")
REPLY = ("-p", "Hello", "-n", "600", "--temp", "0", "--grammar", WITHOUT_END)


@pytest.fixture(scope="module")
def falling(cluster: Cluster) -> Path:
    """A manifest with a fallback."""
    path = cluster.folder / "home-alone.json"
    return cluster.plan("falling", 2, *STAYS, "--fallback", str(path))


@pytest.mark.usefixtures("home")
def test_home_goes_on_with_the_same_reply_when_the_worker_is_killed(
    falling: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    code, wanted, err = outcome(capsys, "run", str(TINY), "-t", "1", "-c", "1024", *REPLY)
    assert code == 0, err
    with cluster.worker("w1") as (worker, host):
        arguments = ("run", "--manifest", str(falling), "--host", host, *REPLY)
        with Watched(cluster.home, *arguments) as home:
            home.await_out(r"\w{3}")
            worker.signal(signal.SIGKILL)
            assert home.code() == 0, home.err
    assert "home goes on alone" in home.err
    assert "w1: layers 4 to 8" in home.err
    assert "went on at home alone" in home.err
    assert home.out == wanted


@pytest.mark.usefixtures("home")
def test_the_receipt_of_a_reply_over_two_hosts_is_in_its_json(
    falling: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster.worker("w1") as (_, host):
        short = ("-p", "Hello", "-n", "5", "--temp", "0", "--json")
        code, out, err = outcome(capsys, "run", "--manifest", str(falling), "--host", host, *short)
        assert code == 0, err
    found = json.loads(out)
    receipt = found["receipt"]
    (use,) = receipt["hosts"]
    assert (use["host"], use["codec_there"], use["codec_back"]) == ("w1", "f32", "f32")
    row_bytes, n_back = 4 * 256, 1 + found["stats"]["n_passes"]
    assert n_back * row_bytes < receipt["received_bytes"] < n_back * (row_bytes + 64)
    n_there = found["stats"]["n_prefilled_tokens"] + found["stats"]["n_passes"]
    assert n_there * row_bytes < receipt["sent_bytes"] < n_there * (row_bytes + 64)
    assert receipt["fallback"] is None


@pytest.mark.usefixtures("home")
def test_a_fallback_lies_beside_its_manifest_and_is_of_home_alone(
    falling: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = read_manifest(falling)
    named = manifest.policies.fallback
    assert named is not None
    alone = read_manifest(falling.parent / named.path)
    assert [host.host_id for host in alone.hosts] == ["home"]
    assert alone.run.n_ctx == manifest.run.n_ctx
    plan = ("plan", str(TINY), "-c", "1024", "-t", "1", "--no-measure")
    out = cluster.folder / "one.json"
    for flags, code, words in (
        (("--fallback", str(out)), 2, "-o FILE"),
        (("-o", str(out), "--fallback", "/tmp/elsewhere.json"), 2, "beside the one of -o"),
        (("-o", str(out), "--fallback", f"{out}.alone"), 2, "needs no fallback"),
    ):
        found, _, err = outcome(capsys, *plan, *flags)
        assert (found, words in err) == (code, True), err
    assert not out.exists()


@pytest.fixture(scope="module")
def edge_cloud(cluster: Cluster) -> Path:
    """Links as to a cloud: the way of the service, hidden states as halves."""
    made = json.loads(cluster.plan("edge", 2, *STAYS).read_bytes())
    for transport in made["transport"]:
        transport |= {"kind": "service", "codec": "f16"}
    made["requires"] = [*made["requires"], "edge_cloud"]
    path = cluster.folder / "edge-cloud.json"
    write_manifest(parse_manifest(json.dumps(made), "test"), path, replace=False)
    return path


@pytest.mark.usefixtures("home")
def test_front_and_head_at_home_and_the_rest_behind_the_service(
    edge_cloud: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    short = ("-p", "Hello", "-n", "20", "--temp", "0")
    code, wanted, err = outcome(capsys, "run", str(TINY), "-t", "1", "-c", "1024", *short)
    assert code == 0, err
    with cluster.worker("w1") as (_, host):
        arguments = ("run", "--manifest", str(edge_cloud), "--host", host, *short, "--json")
        code, out, err = outcome(capsys, *arguments)
        assert code == 0, err
    found = json.loads(out)
    (use,) = found["receipt"]["hosts"]
    assert (use["codec_there"], use["codec_back"]) == ("f16", "f16")
    assert found["text"].strip()[:20] == wanted.strip()[:20]
    n_tokens = found["stats"]["n_prefilled_tokens"] + found["stats"]["n_passes"]
    assert use["sent_bytes"] < n_tokens * (512 + 64) + 200


def free_address() -> str:
    """Return an address whose port and the next one are free."""
    while True:
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            port = one.getsockname()[1]
            with suppress(OSError, OverflowError):
                other.bind(("127.0.0.1", port + 1))
                return f"127.0.0.1:{port}"


def test_a_conversation_goes_on_with_a_worker_that_was_started_again(cluster: Cluster) -> None:
    path, address = str(cluster.manifests["stages"]), free_address()
    with cluster.worker("w1", "--listen", address) as (worker, _):
        chat = ("chat", "--manifest", path, "--host", f"w1={address}", "--temp", "0", "-n", "8")
        home = Watched(cluster.home, *chat)
        with home:
            home.say("Tell me about a tree\n")
            home.await_err(r"decode 8 tok")
            worker.process.kill()
            worker.process.wait(10)
            with cluster.worker("w1", "--listen", address):
                home.say("And about a house\n")
                home.await_err(r"decode 8 tok.*decode 8 tok")
                home.say("/exit\n")
                assert home.code() == 0, home.err
    assert "filled its cache anew" in home.err
    assert "error" not in home.err
