"""Workers on the local network: announced where that is asked for, found, never trusted by that.

Names and keys are what somebody says over multicast DNS; a key is proven when a host connects.
"""

from __future__ import annotations

import importlib.util
import ipaddress
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Self

import psutil

from edgert.errors import ConfigError, LinkError
from edgert.hosts.address import Address, parse_address
from edgert.hosts.certificates import check_name

if TYPE_CHECKING:
    from zeroconf import ServiceInfo, Zeroconf

REQUIREMENT = "zeroconf>=0.148,<1"

_TYPE = "_edgert._tcp.local."
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")
_MOST_FOUND = 256
_LOOK_S = 0.05
_ANSWER_MS = 1000


@dataclass(frozen=True, slots=True)
class FoundWorker:
    """What a worker says of itself; nothing of it is proven.

    Attributes:
        name: Of the host.
        address: HOST:PORT of its service.
        fingerprint: Of the key that it says it has.
    """

    name: str
    address: str
    fingerprint: str


class Announcement:
    """Tells the local network of a worker until it is closed.

    Args:
        name: The worker's.
        fingerprint: Of its key.
        address: HOST:PORT that it listens on; 0.0.0.0 stands for every address of this host.

    Raises:
        ConfigError: zeroconf is not installed, or the address is a name.
        LinkError: the network takes no multicast.
    """

    def __init__(self, name: str, fingerprint: str, address: str) -> None:
        _require()
        from zeroconf import Error, ServiceInfo

        place = parse_address(address)
        own = _own_address(place)
        everywhere = own.is_unspecified
        addresses = _all_addresses() if everywhere else [place.host]
        info = ServiceInfo(
            _TYPE,
            f"{name}-{fingerprint[:8]}.{_TYPE}",
            port=place.port,
            properties={"name": name, "fingerprint": fingerprint},
            server=f"{name}-{fingerprint[:8]}.local.",
            parsed_addresses=addresses,
        )
        self._zeroconf = _open(None if everywhere else addresses)
        try:
            self._zeroconf.register_service(info, cooperating_responders=True)
        except (OSError, RuntimeError, Error) as error:
            self._zeroconf.close()
            raise _failed(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye to the network."""
        with suppress(OSError):
            self._zeroconf.unregister_all_services()
        self._zeroconf.close()


def find_workers(wait_s: float, interfaces: Sequence[str] | None = None) -> tuple[FoundWorker, ...]:
    """Listen for workers that announce themselves; sorted by name.

    Args:
        wait_s: Seconds to listen.
        interfaces: Addresses of this host whose networks are asked (default: all).

    Raises:
        ConfigError: zeroconf is not installed.
        LinkError: the network takes no multicast.
    """
    _require()
    from zeroconf import ServiceBrowser

    zeroconf = _open(interfaces)
    seen: set[str] = set()
    changed = threading.Lock()

    def note(zeroconf: Zeroconf, service_type: str, name: str, state_change: object) -> None:
        del zeroconf, service_type, state_change
        with changed:
            if len(seen) < _MOST_FOUND:
                seen.add(name)

    found: dict[str, tuple[FoundWorker, ...]] = {}
    try:
        browser = ServiceBrowser(zeroconf, _TYPE, handlers=[note])
        until_s = time.monotonic() + wait_s
        while time.monotonic() < until_s:
            time.sleep(_LOOK_S)
            with changed:
                new = [name for name in seen if name not in found]
            for name in new:
                info = zeroconf.get_service_info(_TYPE, name, _ANSWER_MS)
                if info is not None:
                    found[name] = _read(info)
        browser.cancel()
    except OSError as error:
        raise _failed(error) from error
    finally:
        zeroconf.close()
    workers = {worker for each in found.values() for worker in each}
    return tuple(sorted(workers, key=lambda w: (w.name, w.address)))


def _read(info: ServiceInfo) -> tuple[FoundWorker, ...]:
    """Return what an announcement says, once for each address; nothing where it makes no sense."""
    facts = info.properties
    name, fingerprint = (facts.get(key) or b"" for key in (b"name", b"fingerprint"))
    try:
        known = check_name(name.decode("ascii"))
        key = fingerprint.decode("ascii")
    except (ConfigError, UnicodeDecodeError):
        return ()
    if not _FINGERPRINT.fullmatch(key) or not info.port:
        return ()
    hosts = [host.partition("%")[0] for host in info.parsed_addresses()[:_MOST_FOUND]]
    return tuple(FoundWorker(known, str(Address(host, info.port)), key) for host in hosts)


def _all_addresses() -> list[str]:
    found = [item for items in psutil.net_if_addrs().values() for item in items]
    return [
        item.address
        for item in found
        if item.family == socket.AF_INET and not ipaddress.ip_address(item.address).is_loopback
    ]


def _own_address(place: Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    try:
        return ipaddress.ip_address(place.host)
    except ValueError as error:
        raise ConfigError(
            f"{place}: a name, and only addresses can be announced", hint="--listen 0.0.0.0:7411"
        ) from error


def _open(interfaces: Sequence[str] | None) -> Zeroconf:
    from zeroconf import InterfaceChoice, Zeroconf

    try:
        return Zeroconf(InterfaceChoice.All if interfaces is None else list(interfaces))
    except (OSError, RuntimeError) as error:
        raise _failed(error) from error


def _failed(error: Exception) -> LinkError:
    said = error.strerror if isinstance(error, OSError) else None
    return LinkError(
        f"the local network cannot be asked: {said or str(error) or type(error).__name__}",
        hint="name the address instead: --host NAME=ADDRESS:PORT",
    )


def _require() -> None:
    if importlib.util.find_spec("zeroconf") is None:
        raise ConfigError(
            "workers on the local network are found with zeroconf, which is not installed",
            hint=shlex.join([sys.executable, "-m", "pip", "install", REQUIREMENT]),
        )
