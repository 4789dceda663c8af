"""Hosts as processes of their own on loopback: workers and homes, each with its own folders."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import pytest

import edgert.models
from edgert.cli import main
from edgert.hosts.identity import (
    create_identity,
    find_peer,
    load_identity,
    trust,
    trusted_peers,
)
from edgert.hosts.link import LinkLimits
from edgert.hosts.service import connect_service
from edgert.hosts.service_peer import PeerFiles, ServicePeer
from edgert.packing.blobs import Blob, file_blob
from partition.manifest_file import canonical_json, read_manifest

TINY = Path(edgert.models.__file__).parent / "tiny-chat.gguf"
PATIENCE_S = 60.0
WITHOUT_END = "root ::= [a-z ] root"


class Watched:
    """A process of edgert's whose output can be awaited; ends with the `with` block.

    Args:
        home: Its EDGERT_HOME.
        arguments: Of the program.
        wrapper: A command that runs it.
    """

    def __init__(self, home: Path, *arguments: str, wrapper: Sequence[str] = ()) -> None:
        self.process = subprocess.Popen(
            [*wrapper, sys.executable, "-m", "edgert.cli.main", *arguments],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment(home), start_new_session=True,
        )  # fmt: skip
        self.out = self.err = ""
        self._changed = threading.Condition()
        self._readers = [
            threading.Thread(target=self._read, args=("out", self.process.stdout), daemon=True),
            threading.Thread(target=self._read, args=("err", self.process.stderr), daemon=True),
        ]
        for reader in self._readers:
            reader.start()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(PATIENCE_S)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            with suppress(BrokenPipeError):
                stream.close()

    def await_err(self, pattern: str) -> re.Match[str]:
        """Wait for something on stderr."""
        return self._await("err", pattern)

    def await_out(self, pattern: str = ".") -> re.Match[str]:
        """Wait for something on stdout."""
        return self._await("out", pattern)

    def say(self, text: str) -> None:
        """Write to stdin."""
        assert self.process.stdin is not None
        self.process.stdin.write(text.encode())
        self.process.stdin.flush()

    def signal(self, number: int) -> None:
        """Send a signal."""
        self.process.send_signal(number)

    def code(self, deadline_s: float = PATIENCE_S) -> int:
        """Wait for its end; return the exit code."""
        found = self.process.wait(deadline_s)
        for reader in self._readers:
            reader.join(PATIENCE_S)
        return found

    def _read(self, name: str, stream: IO[bytes]) -> None:
        while piece := os.read(stream.fileno(), 1 << 16):
            with self._changed:
                setattr(self, name, getattr(self, name) + piece.decode("utf-8", "replace"))
                self._changed.notify_all()
        with self._changed:
            self._changed.notify_all()

    def _await(self, name: str, pattern: str) -> re.Match[str]:
        expression = re.compile(pattern, re.DOTALL)
        until_s = time.monotonic() + PATIENCE_S
        with self._changed:
            while (found := expression.search(getattr(self, name))) is None:
                over = self.process.poll() is not None and not any(
                    reader.is_alive() for reader in self._readers
                )
                left_s = until_s - time.monotonic()
                assert not over, f"ended without {pattern!r}: {self.out}{self.err}"
                assert left_s > 0, f"no {pattern!r}: {self.out}{self.err}"
                self._changed.wait(min(left_s, 0.2))
        return found


class Cluster:
    """Home and its workers: folders with keys, and manifests that they share.

    Args:
        folder: Everything is in it.
        names: Of the workers.
    """

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.names = list(names)
        self.manifests: dict[str, Path] = {}
        hosts = {name: folder / name / "hosts" for name in ("home", *names)}
        identities = {name: create_identity(place, name) for name, place in hosts.items()}
        for name in names:
            trust(hosts["home"], name, identities[name].certificate_pem)
            trust(hosts[name], "home", identities["home"].certificate_pem)
        profile = json.loads(self.checked("home", "devices", "--json", "-t", "1"))
        self._profile = profile

    @property
    def home(self) -> Path:
        """Home's folder."""
        return self.folder / "home"

    def plan(self, name: str, n_hosts: int, *flags: str, home_is_slow: bool = False) -> Path:
        """Plan for home and the first workers; return the manifest."""
        names = ["home", *self.names[: n_hosts - 1]]
        topology = self.folder / f"{name}-topology.json"
        topology.write_text(json.dumps(_topology(self._profile, names, slow=home_is_slow)))
        path = self.folder / f"{name}.json"
        self.checked(
            "home", "plan", str(TINY), "--topology", str(topology), "-t", "1", "-c", "1024",
            "-o", str(path), *flags,
        )  # fmt: skip
        self.manifests[name] = path
        return path

    def checked(self, name: str, *arguments: str) -> str:
        """Run a command as a host, in this process; return what it printed."""
        out, err = io.StringIO(), io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
            patch.setenv("EDGERT_HOME", str(self.folder / name))
            code = main.run(arguments)
        assert code == 0, err.getvalue()
        return out.getvalue()

    def status(self, host: str) -> dict[str, Any]:
        """Ask a worker what it runs."""
        name, _, address = host.partition("=")
        folder = self.home / "hosts"
        peer = find_peer(trusted_peers(folder), name)
        with connect_service(address, load_identity(folder), peer) as client:
            return client.status()

    def peer(self, manifest: str, host: str) -> ServicePeer:
        """Return a worker as home reaches it, for a manifest whose parts have been made."""
        name, _, address = host.partition("=")
        folder = self.home / "hosts"
        content = canonical_json(read_manifest(self.manifests[manifest]))
        digest = sha256(content).hexdigest()
        packed = self.home / "cache" / "hosts" / digest / "hosts" / name
        files = PeerFiles(
            Blob(digest, len(content), "the manifest", lambda offset: iter([content[offset:]])),
            [
                file_blob(path, sha256(path.read_bytes()).hexdigest(), path.stat().st_size)
                for path in sorted(packed.glob("**/*.gguf"))
            ],
        )
        known = find_peer(trusted_peers(folder), name)
        return ServicePeer(address, load_identity(folder), known, files, LinkLimits())

    @contextmanager
    def worker(self, name: str, *flags: str) -> Iterator[tuple[Watched, str]]:
        """Start a worker; give it with its --host for home."""
        listen = () if "--listen" in flags else ("--listen", "127.0.0.1:0")
        with Watched(self.folder / name, "worker", *listen, *flags) as worker:
            address = worker.await_err(r"works at (\S+) ")[1]
            yield worker, f"{name}={address}"

    def start(self, manifest: str, hosts: Sequence[str], *flags: str) -> Watched:
        """Start home on a reply that does not end by itself."""
        return Watched(
            self.home, "run", "--manifest", str(self.manifests[manifest]), *named(hosts),
            "-p", "Hello", "-n", "900", "--temp", "0", "--grammar", WITHOUT_END, *flags,
        )  # fmt: skip


def named(hosts: Sequence[str]) -> list[str]:
    """Return hosts as flags."""
    return [item for host in hosts for item in ("--host", host)]


def environment(home: Path) -> dict[str, str]:
    """Return the variables of a process on a host."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EDGERT_")}
    return {**kept, "EDGERT_HOME": str(home), "PYTHONUNBUFFERED": "1"}


def _topology(profile: dict[str, object], names: Sequence[str], *, slow: bool) -> dict[str, object]:
    def figure(value: float) -> dict[str, object]:
        return {"value": value, "origin": "measured"}

    # Sums between fast hosts would cost more than sharing a model this small saves.
    hosts = [_slowed({**profile, "host_id": name, "name": name}, 10) for name in names]
    for host in hosts:
        for place in (*host["pools"], *host["devices"]):
            place["bytes_per_s"]["value"] /= 10
    if slow:
        hosts[0] = _slowed(hosts[0], 3)
    links = [
        {
            "source": a, "target": b, "kind": "loopback",
            "round_trip_s": figure(4e-5), "bytes_per_s": figure(3e9),
        }
        for a in names for b in names if a != b
    ]  # fmt: skip
    return {"format_version": 1, "home": "home", "hosts": hosts, "links": links}


def _slowed(host: dict[str, object], factor: float) -> dict[str, Any]:
    """Return a host whose kernels need so many times as long."""
    made = json.loads(json.dumps(host))
    for device in made["devices"]:
        for kernel in device["kernels"]:
            for rate in ("matvec_bytes_per_s", "matmat_flops"):
                kernel[rate]["value"] /= factor
    return dict(made)
