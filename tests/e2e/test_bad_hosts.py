"""What each end says of hosts, manifests and bytes that are not what they should be."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import pytest

import edgert
from edgert.errors import LinkError
from edgert.events import ignore
from edgert.hosts.frames import FrameKind, encode_header
from edgert.hosts.hello import Terms
from edgert.hosts.identity import create_identity, find_peer, load_identity, trust, trusted_peers
from edgert.hosts.link import LinkLimits
from edgert.hosts.service_peer import PeerFiles, ServicePeer
from edgert.hosts.session import Attach
from edgert.hosts.tls_link import connect
from edgert.packing.blobs import Blob, file_blob
from partition.manifest import Manifest
from partition.manifest_file import canonical_json, read_manifest
from planned_models import outcome
from worker_processes import TINY, Cluster, Watched

pytestmark = [pytest.mark.model, pytest.mark.usefixtures("home")]

Worker = tuple[Watched, str]
Capture = pytest.CaptureFixture[str]


def run(manifest: Path, host: str | None, capsys: Capture) -> tuple[int, str]:
    """Ask for a short reply; return exit code and stderr."""
    where = () if host is None else ("--host", host)
    arguments = ("run", "--manifest", str(manifest), *where, "-p", "Hello", "-n", "3")
    code, _, err = outcome(capsys, *arguments)
    return code, err


def with_host(manifest: Manifest, name: str, **changes: object) -> Manifest:
    hosts = tuple(
        host.model_copy(update=changes) if host.host_id == name else host for host in manifest.hosts
    )
    return manifest.model_copy(update={"hosts": hosts})


@contextmanager
def changed(cluster: Cluster, change: Callable[[Manifest], Manifest]) -> Iterator[Path]:
    """Write a changed copy of the manifest of stages beside it."""
    path = cluster.folder / "changed.json"
    path.write_bytes(canonical_json(change(read_manifest(cluster.manifests["stages"]))))
    yield path
    path.unlink()


def key_of(cluster: Cluster, name: str) -> str:
    return load_identity(cluster.folder / name / "hosts").fingerprint


def test_a_host_without_an_address_is_named(cluster: Cluster, capsys: Capture) -> None:
    code, err = run(cluster.manifests["stages"], None, capsys)
    assert (code, "no address of host w1" in err, "--host NAME=ADDRESS:PORT" in err) == (
        2, True, True,
    ), err  # fmt: skip


@pytest.mark.parametrize("host", ["w1", "w1=", "=127.0.0.1:1", "w1=nowhere", "w1=127.0.0.1:99999"])
def test_what_is_no_address_is_refused(host: str, cluster: Cluster, capsys: Capture) -> None:
    code, err = run(cluster.manifests["stages"], host, capsys)
    assert (code, "wanted" in err) == (2, True), err


def test_an_address_of_a_host_that_the_manifest_lacks_is_refused(
    cluster: Cluster, w1: Worker, capsys: Capture
) -> None:
    code, err = run(cluster.manifests["stages"], w1[1].replace("w1", "w9"), capsys)
    assert (code, "--host w9: the manifest names w1" in err) == (2, True), err
    code, _, err = outcome(capsys, "run", str(TINY), "--host", w1[1], "-p", "Hello")
    assert (code, "--host wants a manifest" in err) == (2, True), err


def test_nobody_at_the_address_is_told(cluster: Cluster, capsys: Capture) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
    code, err = run(cluster.manifests["stages"], f"w1=127.0.0.1:{port}", capsys)
    assert (code, f"w1 (127.0.0.1:{port})" in err, "refused" in err) == (6, True, True), err


def test_a_home_without_keys_is_told_to_make_them(
    cluster: Cluster, w1: Worker, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    code, err = run(cluster.manifests["stages"], w1[1], capsys)
    assert (code, "edgert keys host" in err) == (2, True), err
    create_identity(tmp_path / "hosts", "stranger")
    code, err = run(cluster.manifests["stages"], w1[1], capsys)
    assert (code, "no trusted host has the name or key w1" in err) == (2, True), err


def test_a_home_that_the_worker_does_not_trust_is_told_so(
    cluster: Cluster, w1: Worker, capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    create_identity(tmp_path / "hosts", "stranger")
    worker = load_identity(cluster.folder / "w1" / "hosts")
    trust(tmp_path / "hosts", "w1", worker.certificate_pem)
    code, err = run(cluster.manifests["stages"], w1[1], capsys)
    assert (code, "w1 (127.0.0.1:" in err, "trust" in err) == (6, True, True), err


def test_a_worker_with_another_key_is_refused(
    cluster: Cluster, w1: Worker, capsys: Capture
) -> None:
    other = key_of(cluster, "w2")
    with changed(cluster, lambda m: with_host(m, "w1", peer_key=other)) as path:
        code, err = run(path, w1[1], capsys)
    assert (code, f"wanted {other}" in err, key_of(cluster, "w1") in err) == (6, True, True), err
    unknown = "0" * 64
    with changed(cluster, lambda m: with_host(m, "w1", peer_key=unknown)) as path:
        code, err = run(path, w1[1], capsys)
    assert (code, f"no trusted host has the name or key {unknown}" in err) == (2, True), err


def test_a_worker_refuses_a_manifest_of_another_home(
    cluster: Cluster, w1: Worker, capsys: Capture
) -> None:
    other = key_of(cluster, "w2")
    with changed(cluster, lambda m: with_host(m, "home", peer_key=other)) as path:
        code, err = run(path, w1[1], capsys)
    assert (code, "w1 (127.0.0.1:" in err, "wants home to have key" in err) == (6, True, True), err
    assert "wants home to have key" in w1[0].await_err(r"home \(127[^\n]*wants home[^\n]*")[0]


def test_a_certificate_of_another_time_is_refused_by_its_owner(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    later = datetime.now(UTC) + timedelta(days=30)
    create_identity(tmp_path / "hosts", "early", later)
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path))
    code, _, err = outcome(capsys, "worker")
    assert (code, "not valid yet" in err, "clock" in err) == (2, True, True), err


def test_another_version_is_refused_by_both(
    cluster: Cluster, w1: Worker, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(edgert, "__version__", "9.9.9")
    code, err = run(cluster.manifests["stages"], w1[1], capsys)
    assert (code, "w1 (127.0.0.1:" in err, "9.9.9" in err) == (6, True, True), err
    w1[0].await_err(r"home \(127[^\n]*9\.9\.9")


def test_a_plan_for_other_hardware_is_refused(
    cluster: Cluster, w1: Worker, capsys: Capture
) -> None:
    with changed(cluster, lambda m: with_host(m, "w1", fingerprint="0" * 16)) as path:
        code, err = run(path, w1[1], capsys)
    assert (code, "w1 (127.0.0.1:" in err, "other hardware" in err) == (6, True, True), err
    w1[0].await_err(r"home \(127[^\n]*other hardware")


def other_hash(manifest: Manifest) -> Manifest:
    """Name another model."""
    (file,) = manifest.model.files
    files = (file.model_copy(update={"sha256": "0" * 64}),)
    return manifest.model_copy(update={"model": manifest.model.model_copy(update={"files": files})})


def test_a_part_of_another_model_is_refused_by_the_worker(
    cluster: Cluster, w1: Worker, capsys: Capture
) -> None:
    manifest = cluster.manifests["stages"]
    assert run(manifest, w1[1], capsys)[0] == 0  # which makes the parts
    packed = sha256(canonical_json(read_manifest(manifest))).hexdigest()
    (part,) = (cluster.home / "cache" / "hosts" / packed / "hosts" / "w1").glob("**/*.gguf")
    content = canonical_json(other_hash(read_manifest(manifest)))
    folder = cluster.home / "hosts"
    digest = sha256(content).hexdigest()
    files = PeerFiles(
        Blob(digest, len(content), "the manifest", lambda offset: iter([content[offset:]])),
        [file_blob(part, sha256(part.read_bytes()).hexdigest(), part.stat().st_size)],
    )
    worker = find_peer(trusted_peers(folder), "w1")
    peer = ServicePeer(w1[1].partition("=")[2], load_identity(folder), worker, files, LinkLimits())
    with pytest.raises(LinkError, match=r"w1 .*FormatError.*made of the model"):
        peer.open("0" * 32, "w1", ignore)
    peer.close("0" * 32)
    w1[0].await_err(r"home \(127[^\n]*made of the model")


def test_a_model_of_another_hash_is_refused_at_home(
    cluster: Cluster, w1: Worker, capsys: Capture
) -> None:
    with changed(cluster, other_hash) as path:
        code, err = run(path, w1[1], capsys)
    assert (code, "tiny-chat.gguf" in err) == (3, True), err


def test_a_worker_runs_its_own_manifest_only(cluster: Cluster, capsys: Capture) -> None:
    path = cluster.manifests["shared"]
    with cluster.worker("w1", "--manifest", str(path), "--host", "w1") as (worker, host):
        code, err = run(cluster.manifests["stages"], host, capsys)
        assert (code, "w1 (127.0.0.1:" in err, " only" in err) == (6, True, True), err
        worker.await_err(r"home \(127[^\n]*this worker runs the manifest")
        assert run(path, host, capsys)[0] == 0


def test_a_worker_with_less_memory_than_planned_says_so(cluster: Cluster, capsys: Capture) -> None:
    with cluster.worker("w1", "--memory", "5M") as (worker, host):
        code, err = run(cluster.manifests["stages"], host, capsys)
        assert (code, "w1 (127.0.0.1:" in err, "left of 5,000,000" in err) == (6, True, True), err
        worker.await_err(r"home \(127[^\n]*left of 5,000,000")


def test_damaged_parts_are_sent_again(cluster: Cluster, w1: Worker, capsys: Capture) -> None:
    manifest = cluster.manifests["stages"]
    assert run(manifest, w1[1], capsys)[0] == 0
    blobs = [p for p in (cluster.folder / "w1").glob("**/sha256/*") if p.stat().st_size > 1 << 20]
    assert blobs
    for blob in blobs:
        with blob.open("r+b") as stream:
            stream.seek(blob.stat().st_size // 2)
            stream.write(b"damaged!")
    code, err = run(manifest, w1[1], capsys)
    assert (code, "w1: opened" in err) == (0, True), err


def test_a_full_disk_at_the_worker_is_told(cluster: Cluster, capsys: Capture) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    cache = cluster.folder / "w2" / "cache"
    cache.mkdir(exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(cache)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here")
    with ExitStack() as stack:
        stack.callback(subprocess.run, ["umount", "-l", str(cache)], check=True)
        worker, host = stack.enter_context(cluster.worker("w2"))

        def for_w2(m: Manifest) -> Manifest:
            stages = tuple(
                s.model_copy(update={"host_id": "w2"}) if s.host_id == "w1" else s for s in m.stages
            )
            return with_host(m, "w1", host_id="w2").model_copy(update={"stages": stages})

        with changed(cluster, for_w2) as path:
            code, err = run(path, host, capsys)
        assert (code, "w2 (127.0.0.1:" in err, "free" in err) == (6, True, True), err
        worker.await_err(r"home \(127[^\n]*free")


def exchange_of(cluster: Cluster, host: str) -> str:
    return str(cluster.status(host)["exchange"])


def test_an_oversized_frame_ends_the_link_with_words_on_both_ends(
    cluster: Cluster, w1: Worker
) -> None:
    folder = cluster.home / "hosts"
    link = connect(
        exchange_of(cluster, w1[1]), load_identity(folder),
        find_peer(trusted_peers(folder), "w1"), Terms("home", "worker"), LinkLimits(deadline_s=10),
    )  # fmt: skip
    huge = encode_header(FrameKind.STEP, 1, 1 << 30)
    link._channel.write(huge, float("inf"))  # type: ignore[attr-defined]
    with pytest.raises(LinkError, match=r"w1 .*wanted 268,435,456 at most"):
        link.receive()
    w1[0].await_err(r"home \([^\n]*wanted 268,435,456 at most")


def test_a_session_that_is_not_there_is_refused(cluster: Cluster, w1: Worker) -> None:
    folder = cluster.home / "hosts"
    link = connect(
        exchange_of(cluster, w1[1]), load_identity(folder),
        find_peer(trusted_peers(folder), "w1"), Terms("home", "worker"), LinkLimits(deadline_s=10),
    )  # fmt: skip
    link.send(FrameKind.CONTROL, Attach("0" * 32, "s1").to_bytes())
    with pytest.raises(LinkError, match="no such session"):
        link.receive()


def test_connections_that_say_nothing_hold_nobody_up(
    cluster: Cluster, w1: Worker, capsys: Capture
) -> None:
    places = [w1[1].partition("=")[2], exchange_of(cluster, w1[1])]
    with ExitStack() as stack:
        for place in places * 30:
            name, _, port = place.rpartition(":")
            stack.enter_context(closing(socket.create_connection((name, int(port)))))
        assert run(cluster.manifests["stages"], w1[1], capsys)[0] == 0
