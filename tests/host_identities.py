"""Identities of hosts that trust each other, and what a test wants of links between them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from edgert.hosts.certificates import check_certificate, new_certificate, new_key
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.link import LinkLimits

T = TypeVar("T")

SHORT = LinkLimits(payload_bytes=1 << 20, deadline_s=0.3, handshake_s=2.0)
PATIENT = LinkLimits(payload_bytes=1 << 20, deadline_s=20.0, handshake_s=20.0)


@dataclass(frozen=True)
class Host:
    """An identity, and how others know it."""

    identity: HostIdentity

    @property
    def known(self) -> TrustedPeer:
        own = self.identity
        return TrustedPeer(own.name, own.certificate_pem, own.fingerprint)


def make_host(name: str, now: datetime | None = None) -> Host:
    """Make an identity without a folder, at a time of the clock."""
    key = new_key()
    certificate = new_certificate(key, name, name, now)
    _, fingerprint = check_certificate(certificate, name)
    return Host(HostIdentity(name, certificate, key, fingerprint))


def in_thread(act: Callable[[], T]) -> Future[T]:
    """Start something in a thread; its result or error is the future's."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(act())
        except BaseException as error:  # noqa: BLE001 - it is the result
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


def write_identity(host: Host, folder: Path) -> None:
    """Write an identity as `edgert keys host` would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "certificate.pem").write_bytes(host.identity.certificate_pem)
    key = folder / "key.pem"
    key.write_bytes(host.identity.key_pem)
    key.chmod(0o600)
