"""nginx before replicas, with the configuration that docs/cloud has."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CONFIG = Path(__file__).parents[2] / "docs" / "cloud" / "nginx.conf"
NGINX = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin:/sbin")
_TEMPORARY = ("client_body", "proxy", "fastcgi", "scgi", "uwsgi")
_START_S = 20.0


@dataclass(frozen=True, slots=True)
class Keys:
    """Folders with `key.pem` and `certificate.pem`, and who is let in.

    Attributes:
        service: Of the replicas' identity.
        gateway: Of nginx's own.
        edges_pem: Certificates of the edges.
    """

    service: Path
    gateway: Path
    edges_pem: bytes


@contextmanager
def balancer(place: Path, addresses: Sequence[str], keys: Keys) -> Iterator[str]:
    """Run nginx; give the address that edges connect to.

    Args:
        place: Folder for its files.
        addresses: Of the two replicas.
        keys: Of all.
    """
    place.mkdir(parents=True, exist_ok=True)
    port = free_port()
    config = place / "nginx.conf"
    config.write_text(_config(place, addresses, keys, port))
    command = [NGINX or "nginx", "-p", str(place), "-c", str(config), "-g", "daemon off;"]
    with (place / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _await_port(port, process, place / "log")
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(_START_S)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _config(place: Path, addresses: Sequence[str], keys: Keys, port: int) -> str:
    """Return the documented configuration with this machine's ports and files."""
    edges = place / "edges.pem"
    edges.write_bytes(keys.edges_pem)
    text = CONFIG.read_text()
    for before, after in (
        *((f"replica-{index}:7411", address) for index, address in enumerate(addresses)),
        ("listen 7400", f"listen 127.0.0.1:{port}"),
        ("/etc/edgert/service", str(keys.service)),
        ("/etc/edgert/gateway", str(keys.gateway)),
        ("/etc/edgert/edges.pem", str(edges)),
        ("/run/edgert-nginx.pid", str(place / "pid")),
        ("worker_processes auto", "worker_processes 1"),
    ):
        if before not in text:
            raise RuntimeError(f"{CONFIG} has no {before!r}")
        text = text.replace(before, after)
    # As root nginx would take another user, who cannot read these keys.
    user = "user root;\n" if os.geteuid() == 0 else ""
    paths = "".join(f"    {name}_temp_path {place / name};\n" for name in _TEMPORARY)
    return user + re.sub(r"^http \{\n", f"http {{\n{paths}", text, flags=re.MULTILINE)


def _await_port(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    until_s = time.monotonic() + _START_S
    while time.monotonic() < until_s and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise RuntimeError(f"nginx does not listen: {log.read_text()}")
