"""Hosts of a benchmark: their identities, workers, home, and one host alone to compare with."""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgert.config import directories
from edgert.host_deployment import HostsAsk, deploy_hosts
from edgert.hosts.identity import create_identity, hosts_folder, load_identity, trust
from hosts_bench.network import LinkShape, Star, relay, star
from hosts_bench.plans import N_CTX, host_ids
from hosts_bench.programs import Job, Program, say
from memcap import ControlGroup, control_group, drop_caches
from partition.manifest import Manifest
from partition.manifest_file import canonical_json

HERE = Path(__file__).resolve().parent
_FIRST_PORT = 7411
_PORTS_EACH = 10
_N_PORTS = 3  # of a host: its service, its exchange links, sums without a model
_LOOPBACK = "127.0.0.1"
_PROGRAM = ("-m", "edgert.cli.main")


@dataclass(frozen=True, slots=True)
class Limits:
    """What each host may use; None is no limit."""

    memory_bytes: int | None = None
    flash_bps: int | None = None


@dataclass
class Fleet:
    """Homes and processes of all hosts; see `fleet`.

    Attributes:
        work: Folder for homes, parts and logs.
        cores: To which hosts are pinned in turn.
        limits: Of every host.
        place: The network; None is loopback.
        latency_s: Of its relay.
    """

    work: Path
    cores: Sequence[int]
    limits: Limits
    place: Star | None
    latency_s: float
    stack: ExitStack
    groups: list[ControlGroup] = field(default_factory=list)
    ports: dict[int, int] = field(default_factory=dict)
    workers: list[Program] = field(default_factory=list)

    def home(self, index: int) -> Path:
        """Return the EDGERT_HOME of a host, with an identity that all others trust."""
        return self.work / f"h{index}"

    def address(self, index: int) -> str:
        """Return where home reaches a host's service."""
        if self.place is None:
            return f"{_LOOPBACK}:{self.ports[index]}"
        return f"{self.place.middle}:{self.ports[index]}"

    def program(self, index: int, name: str, command: Sequence[str]) -> Program:
        """Start a program of a host."""
        found = Program(
            [sys.executable, *command],
            log=self.work / f"{name}.log",
            namespace=None if self.place is None else self.place.namespaces[index],
            core=self.cores[index % len(self.cores)],
            group=self._group(name),
            home=self.home(index),
        )
        return self.stack.enter_context(found)

    def alone(self, model: Path) -> Program:
        """Open a model on one host, pinned like home, under the same limits."""
        job = {"model": str(model), "threads": 1, "ctx": N_CTX, "memory": self.limits.memory_bytes}
        return self._side(0, "alone", job)

    def stamps(self, index: int) -> Path:
        """Return where a host of `split` writes down its sums."""
        return self.work / f"stamps{index}.json"

    def split(self, model: Path, manifest: Manifest, *, stamped: bool = False) -> Program:
        """Start the workers of a manifest and open it from home.

        Args:
            model: File.
            manifest: Of as many hosts.
            stamped: Whether the time of every sum is written down when the programs end.
        """
        path = self.work / "manifest.json"
        path.write_bytes(canonical_json(manifest))
        n_hosts = len(manifest.hosts)
        self._hand_out(manifest, model)
        if self.limits.memory_bytes is not None:
            drop_caches()
        limit = max(pool.limit_bytes for host in manifest.hosts for pool in host.pools)
        for index in range(1, n_hosts):
            ip = _LOOPBACK if self.place is None else self.place.ips[index]
            stamps = self.stamps(index)
            stamps.unlink(missing_ok=True)
            command = [str(HERE / "stamps.py"), str(stamps)] if stamped else list(_PROGRAM)
            command += ["worker", "--listen", f"{ip}:{self.ports[index]}"]
            command += ["--memory", str(limit), "--grace", "2"]
            self.workers.append(self.program(index, f"worker{index}", command))
            self.workers[-1].wait_for("works at")
        addresses = {f"h{index}": self.address(index) for index in range(1, n_hosts)}
        job: Job = {"model": str(model), "manifest": str(path), "hosts": addresses}
        if stamped:
            job["stamps"] = str(self.stamps(0))
        return self._side(0, "home", job)

    def members(self, kind: str, n_hosts: int) -> list[Program]:
        """Join hosts for exchanges without a model; `kind` is star or ring."""
        found = []
        for rank in range(n_hosts):
            ip = _LOOPBACK if self.place is None else self.place.ips[rank]
            listens = kind == "ring" or rank > 0
            following = [(rank + 1) % n_hosts] if kind == "ring" else range(1, n_hosts)
            job = {
                "kind": kind, "rank": rank, "n_hosts": n_hosts,
                "listen": f"{ip}:{self.ports[rank] + _N_PORTS - 1}" if listens else None,
                "connect": [f"h{other}={self._exchange(other)}" for other in following],
            }  # fmt: skip
            command = [str(HERE / "exchange.py"), json.dumps(job)]
            found.append(self.program(rank, f"{kind}{rank}", command))
        for text in ("listening", "joined"):
            for member in found:
                member.wait_for(text)
            if text == "listening":
                for member in found:
                    member.send(go=True)
        return found

    def peaks(self) -> list[tuple[int, int]]:
        """Return peak bytes and limit hits of every control group."""
        return [(group.peak_bytes, group.n_limit_hits) for group in self.groups]

    def _exchange(self, index: int) -> str:
        host, _, port = self.address(index).rpartition(":")
        return f"{host}:{int(port) + _N_PORTS - 1}"

    def _side(self, index: int, name: str, job: Job) -> Program:
        side = self.program(index, name, [str(HERE / "side.py"), json.dumps(job)])
        loaded = side.answer(180.0)
        say(f"  {name} is open after {loaded['load_s']:.1f} s")
        return side

    def _group(self, name: str) -> ControlGroup | None:
        if self.limits == Limits():
            return None
        group = control_group(
            f"edgert_hosts_{os.getpid()}_{name}", self.limits.memory_bytes, self.limits.flash_bps,
            self.work,
        )  # fmt: skip
        self.groups.append(self.stack.enter_context(group))
        return self.groups[-1]

    def _hand_out(self, manifest: Manifest, model: Path) -> None:
        """Make the parts, and put those of workers where they would have been sent."""
        env = {**os.environ, "EDGERT_HOME": str(self.home(0))}
        folders = directories(env)
        addresses = {f"h{index}": self.address(index) for index in self.ports}
        deploy_hosts(manifest, [model], HostsAsk(folders, addresses))
        # Packed by now, under the manifest's hash.
        for index in range(1, len(manifest.hosts)):
            blobs = directories({"EDGERT_HOME": str(self.home(index))}).cache / "blobs" / "sha256"
            blobs.mkdir(parents=True, exist_ok=True)
            for folder in (folders.cache / "hosts").iterdir():
                own = folder / "hosts" / f"h{index}" / "files.json"
                if not own.is_file():
                    continue
                for item in json.loads(own.read_bytes())["files"]:
                    target = blobs / item["sha256"]
                    if item["role"] == "part" and not target.exists():
                        os.link((own.parent / item["path"]).resolve(), target)


@contextmanager
def fleet(
    work: Path, n_hosts: int, *, shape: LinkShape | None = None, limits: Limits = Limits()
) -> Iterator[Fleet]:
    """Prepare hosts; every process, namespace and control group is gone afterwards.

    Args:
        work: Folder that stays the caller's.
        n_hosts: With home.
        shape: Of their links; None is loopback.
        limits: Of each of them.
    """
    with ExitStack() as stack:
        place = None if shape is None else stack.enter_context(star(n_hosts, shape))
        cores = sorted(os.sched_getaffinity(0))
        latency_s = 0.0 if shape is None else shape.latency_s
        found = Fleet(work, cores, limits, place, latency_s, stack)
        _introduce([found.home(index) for index in range(n_hosts)])
        found.ports = _ports(n_hosts, free=place is None)
        if place is not None:
            ends = {
                port + offset: (place.ips[index], port + offset)
                for index, port in found.ports.items()
                for offset in range(_N_PORTS)
            }
            stack.enter_context(relay(place, latency_s, ends, work / "relay.log"))
        yield found


def forget_parts(work: Path) -> None:
    """Delete the parts that were made, so that the disk does not fill."""
    for home in work.glob("h[0-9]*"):
        cache = directories({"EDGERT_HOME": str(home)}).cache
        shutil.rmtree(cache / "hosts", ignore_errors=True)
        shutil.rmtree(cache / "blobs", ignore_errors=True)


def trade(members: Sequence[Program], **job: Any) -> float:  # noqa: ANN401
    """Have members add up; return the seconds of one sum at the slowest, medians over the sums."""
    for member in members:
        member.send(**job)
    return max(float(member.answer(120.0)["median_s"]) for member in members)


def _introduce(homes: Sequence[Path]) -> None:
    """Give every host an identity, once, and have all trust each other."""
    folders = [hosts_folder(directories({"EDGERT_HOME": str(home)})) for home in homes]
    names = host_ids(len(homes))
    for folder, name in zip(folders, names, strict=True):
        if not (folder / "certificate.pem").exists():
            create_identity(folder, name)
    known = {name: load_identity(folder) for folder, name in zip(folders, names, strict=True)}
    for folder, own in zip(folders, names, strict=True):
        for name, identity in known.items():
            if name != own:
                trust(folder, name, identity.certificate_pem)


def _ports(n_hosts: int, *, free: bool) -> dict[int, int]:
    """Return the first of each host's ports; on loopback free ones."""
    ports, port = {}, _FIRST_PORT
    for index in range(n_hosts):
        while free and not all(_is_free(port + offset) for offset in range(_N_PORTS)):
            port += _PORTS_EACH
        ports[index] = port
        port += _PORTS_EACH
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((_LOOPBACK, port)) != 0
