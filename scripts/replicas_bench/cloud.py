"""Edges, two replicas with one key, and nginx between them; all on this machine."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgert.config import directories
from edgert.host_deployment import HostsAsk, HostsDeployment, deploy_hosts
from edgert.hosts.identity import create_identity, trust
from edgert.hosts.stage_parts import StagePart
from edgert.llama.backend import Backend
from hosts_bench.programs import Program
from partition.manifest import Manifest
from partition.manifest_file import read_manifest
from replicas_bench.balancer import Keys, balancer, free_port

_CLOUD, _GATEWAY = "cloud", "gateway"
_PROGRAM = [sys.executable, "-m", "edgert.cli.main"]


@dataclass
class Cloud:
    """What runs.

    Attributes:
        work: Folder with a home for each host.
        model: On every edge.
        manifest: Of one edge and the cloud.
        replicas: Processes.
        address: Of nginx.
    """

    work: Path
    model: Path
    manifest: Manifest
    replicas: list[Program]
    address: str

    def open(self, edge: str) -> Backend:
        """Open the model at an edge."""
        return self._deployed(edge).open(lambda _: None)

    def part(self, edge: str) -> StagePart:
        """Return what an edge gives the cloud."""
        parts = self._deployed(edge).prepared.parts
        return next(part for host, part in parts if host == _CLOUD)

    def _deployed(self, edge: str) -> HostsDeployment:
        places = directories({"EDGERT_HOME": str(self.work / edge)})
        ask = HostsAsk(places, {_CLOUD: f"grpcs://{self.address}"}, deadline_s=60.0)
        return deploy_hosts(self.manifest, [self.model], ask)


@contextmanager
def cloud(work: Path, model: Path, edges: Sequence[str], n_shared: int) -> Iterator[Cloud]:
    """Start two replicas and nginx.

    Args:
        work: An empty folder.
        model: Its first half runs on edges.
        edges: Their names.
        n_shared: Sessions that each replica takes.
    """
    keys = _introduce(work, edges)
    manifest = _plan(work, model, edges[0])
    with ExitStack() as stack:
        replicas, addresses = [], []
        for index in range(2):
            home = work / f"replica-{index}"
            shutil.copytree(work / _CLOUD / "hosts", home / "hosts")
            address = f"127.0.0.1:{free_port()}"
            flags = ["--shared", str(n_shared), "--gateway", _GATEWAY, "--listen", address]
            command = [*_PROGRAM, "worker", *flags]
            program = Program(command, log=work / f"replica-{index}.log", home=home)
            stack.callback(program.close)
            replicas.append(program)
            addresses.append(address)
        for program in replicas:
            program.wait_for("works at")
        found = stack.enter_context(balancer(work / "nginx", addresses, keys))
        yield Cloud(work, model, manifest, replicas, found)


def _introduce(work: Path, edges: Sequence[str]) -> Keys:
    """Make everybody's keys, and have them know each other."""
    service = create_identity(work / _CLOUD / "hosts", _CLOUD)
    gateway = create_identity(work / _GATEWAY / "hosts", _GATEWAY)
    trust(work / _CLOUD / "hosts", _GATEWAY, gateway.certificate_pem)
    pem = b""
    for name in edges:
        own = create_identity(work / name / "hosts", name)
        trust(work / name / "hosts", _CLOUD, service.certificate_pem)
        trust(work / _CLOUD / "hosts", name, own.certificate_pem)
        pem += own.certificate_pem
    return Keys(work / _CLOUD / "hosts", work / _GATEWAY / "hosts", pem)


def _plan(work: Path, model: Path, edge: str) -> Manifest:
    """Plan half of the layers for the edge and half for the cloud."""
    profile = json.loads(_run(work / edge, "devices", "--json", "-t", "1"))

    def figure(value: float) -> dict[str, object]:
        return {"value": value, "origin": "measured"}

    names = ("home", _CLOUD)
    links: list[dict[str, Any]] = [
        {
            "source": a, "target": b, "kind": "loopback",
            "round_trip_s": figure(4e-5), "bytes_per_s": figure(3e9),
        }
        for a, b in (names, names[::-1])
    ]  # fmt: skip
    hosts = [{**profile, "host_id": name, "name": name} for name in names]
    topology = work / "topology.json"
    document = {"format_version": 1, "home": "home", "hosts": hosts, "links": links}
    topology.write_text(json.dumps(document))
    path = work / "manifest.json"
    _run(
        work / edge, "plan", str(model), "--topology", str(topology), "-t", "1", "-c", "1024",
        "--stay", "0:4=home", "--stay", f"4:8={_CLOUD}", "-o", str(path),
    )  # fmt: skip
    return read_manifest(path)


def _run(home: Path, *arguments: str) -> str:
    environment = {**os.environ, "EDGERT_HOME": str(home)}
    command = [*_PROGRAM, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return done.stdout
