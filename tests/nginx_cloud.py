"""Replicas of a worker behind nginx, as docs/cloud/nginx.conf has it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from cloud_edges import Edges
from edgert.hosts.identity import create_identity, load_identity, trust
from worker_processes import Watched

CONFIG = Path(__file__).parents[1] / "docs" / "cloud" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
GATEWAY = "gateway"
_TEMPORARY = ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")


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
            port = free_port()
            stack.enter_context(self._nginx(self.addresses, port))
            yield f"grpcs://127.0.0.1:{port}"

    def kill(self, index: int) -> None:
        """End a replica at once."""
        self.workers[index].signal(signal.SIGKILL)

    @contextmanager
    def _nginx(self, addresses: Sequence[str], port: int) -> Iterator[None]:
        place = self._folder / "nginx"
        place.mkdir(exist_ok=True)
        config = place / "nginx.conf"
        config.write_text(self._config(addresses, port, place))
        command = [NGINX or "nginx", "-p", str(place), "-c", str(config), "-g", "daemon off;"]
        with (place / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _await_port(port, process, place / "log")
            yield
        finally:
            process.terminate()
            process.wait(20)

    def _config(self, addresses: Sequence[str], port: int, place: Path) -> str:
        """Return the documented configuration with this machine's ports and files."""
        text = CONFIG.read_text()
        for index, address in enumerate(addresses):
            text = text.replace(f"replica-{index}:7411", address)
        edges = place / "edges.pem"
        names = list(self._folder.glob("edge*/hosts"))
        edges.write_bytes(b"".join(load_identity(path).certificate_pem for path in names))
        service = self._folder / self._edges.cloud / "hosts"
        gateway = self._folder / GATEWAY / "hosts"
        for before, after in (
            ("listen 7400", f"listen 127.0.0.1:{port}"),
            ("/etc/edgert/service", str(service)),
            ("/etc/edgert/gateway", str(gateway)),
            ("/etc/edgert/edges.pem", str(edges)),
            ("/run/edgert-nginx.pid", str(place / "pid")),
            ("worker_processes auto", "worker_processes 1"),
        ):
            assert before in text, before
            text = text.replace(before, after)
        # As root nginx would take another user, who cannot read the keys of this test.
        user = "user root;\n" if os.geteuid() == 0 else ""
        paths = "".join(f"    {name}_temp_path {place / name};\n" for name in _TEMPORARY)
        return user + re.sub(r"^http \{\n", f"http {{\n{paths}", text, flags=re.MULTILINE)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _await_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + 20
    while time.monotonic() < until_s:
        assert process.poll() is None, log.read_text()
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(log.read_text())
