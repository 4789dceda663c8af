"""A star of network namespaces with shaped links, and a relay in its middle for latency."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from hosts_bench.programs import Program

_RELAY = Path(__file__).with_name("relay.py")
_MIDDLE = "10.77.0.254"
_BURST_BYTES = 1600  # one packet: whatever else is in a burst would not be held to the rate


@dataclass(frozen=True, slots=True)
class LinkShape:
    """What every link of a star is.

    Attributes:
        latency_s: One way, between any two hosts.
        bits_per_s: Of every host's own link, each way.
    """

    latency_s: float
    bits_per_s: float

    @property
    def bytes_per_s(self) -> float:
        """Payload and headers a second."""
        return self.bits_per_s / 8


@dataclass(frozen=True, slots=True)
class Star:
    """Namespaces joined by a switch.

    Attributes:
        namespaces: Of every host, in order; `ips` are theirs.
        switch: Namespace of the switch.
    """

    namespaces: tuple[str, ...]
    ips: tuple[str, ...]
    switch: str

    @property
    def middle(self) -> str:
        """Address of the relay."""
        return _MIDDLE


@contextmanager
def star(n_hosts: int, shape: LinkShape) -> Iterator[Star]:
    """Make namespaces with shaped links; everything is gone afterwards."""
    mark = f"edgert{os.getpid()}"
    switch = f"{mark}s"
    names = tuple(f"{mark}h{index}" for index in range(n_hosts))
    ips = tuple(f"10.77.0.{index + 1}" for index in range(n_hosts))
    with ExitStack() as stack:
        for name in (switch, *names):
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "delete", name, check=False)
            run("ip", "-n", name, "link", "set", "lo", "up")
        run("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        run("ip", "-n", switch, "addr", "add", f"{_MIDDLE}/24", "dev", "br0")
        run("ip", "-n", switch, "link", "set", "br0", "up")
        for index, (name, ip) in enumerate(zip(names, ips, strict=True)):
            port = f"p{index}"
            run(
                "ip", "link", "add", "name", "eth0", "netns", name, "type", "veth",
                "peer", "name", port, "netns", switch,
            )  # fmt: skip
            run("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            run("ip", "-n", name, "addr", "add", f"{ip}/24", "dev", "eth0")
            run("ip", "-n", name, "link", "set", "eth0", "up")
            for where, device in ((name, "eth0"), (switch, port)):
                run(
                    "tc", "-n", where, "qdisc", "add", "dev", device, "root", "tbf",
                    "rate", f"{shape.bits_per_s:.0f}bit", "burst", str(_BURST_BYTES),
                    "limit", "4mb",
                )  # fmt: skip
        yield Star(names, ips, switch)


@contextmanager
def relay(
    place: Star, latency_s: float, ports: Mapping[int, tuple[str, int]], log: Path
) -> Iterator[None]:
    """Run the relay in the switch: its ports lead to hosts, each chunk `latency_s` later."""
    words = [f"{port}={host}:{target}" for port, (host, target) in ports.items()]
    command = [sys.executable, str(_RELAY), place.middle, str(latency_s), *words]
    with Program(command, log=log, namespace=place.switch) as program:
        program.wait_for("ready")
        yield


def run(*words: str, check: bool = True) -> None:
    """Run a command of the system; SystemExit with what it says if it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")
