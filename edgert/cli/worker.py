"""`edgert worker`: runs parts of other hosts' models, until it is stopped."""

from __future__ import annotations

import hashlib
import signal
import threading
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from edgert.cli.opening import user_path
from edgert.errors import ConfigError
from edgert.units import format_bytes, parse_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import FrameType

    from edgert.cli.command import Context
    from edgert.cli.host_options import WorkerOptions
    from edgert.hosts.cloud.shared_parts import SharedParts
    from edgert.hosts.identity import HostIdentity, TrustedPeer
    from edgert.hosts.lan import Announcement
    from edgert.hosts.worker import WorkerSettings


def run(options: WorkerOptions, context: Context) -> int:
    """Serve until SIGINT or SIGTERM, then drain, and return the exit code."""
    from devices.host import default_memory_budget
    from edgert.deployment import check_stage
    from edgert.host_deployment import LINK_PAYLOAD_BYTES
    from edgert.hosts.address import Address, parse_address
    from edgert.hosts.hello import Terms
    from edgert.hosts.identity import hosts_folder, load_identity, trusted_peers
    from edgert.hosts.link import LinkLimits
    from edgert.hosts.listener import listen
    from edgert.hosts.service import serve
    from edgert.hosts.service.limits import ServiceLimits
    from edgert.hosts.service.receiver import BlobReceiver
    from edgert.hosts.worker import Worker, WorkerSettings

    folder = hosts_folder(context.directories)
    identity = load_identity(folder)
    _check_name(options, identity)
    trusted = _trusted(trusted_peers(folder), options.gateway)
    memory = options.memory
    settings = WorkerSettings(
        default_memory_budget().budget_bytes if memory is None else parse_bytes(memory),
        options.sessions * (options.shared or 1),
        _only(options),
        options.keep_session,
        silence_s=options.deadline,
    )
    place = parse_address(options.listen)
    limits = LinkLimits(LINK_PAYLOAD_BYTES, options.deadline, options.deadline)
    next_port = Address(place.host, place.port + 1 if place.port else 0)
    blobs = context.directories.cache / "blobs"
    homes = [peer for peer in trusted if not peer.is_gateway]
    exchange = listen(str(next_port), identity, homes, Terms("worker", "home"), limits)
    worker = Worker(identity, blobs, settings, check_stage, exchange, _shared(options))
    receiver = BlobReceiver(blobs)
    calls = ServiceLimits(link=limits, most_calls=max(16, 2 * settings.most_sessions))
    server = serve(options.listen, identity, trusted, worker, receiver, calls)
    with ExitStack() as stack:
        stopped = stack.enter_context(_stop_signals())
        stack.callback(exchange.close)
        stack.callback(server.close, options.grace)
        if options.announce:
            stack.enter_context(_announced(identity, server.address))
        serving = threading.Thread(target=worker.serve_exchange, name="exchange", daemon=True)
        serving.start()
        context.say(_greeting(identity, server.address, settings, [p.name for p in trusted]))
        stopped.wait()
        context.say("stopping: no more work is taken")
        server.drain()
        worker.drain(options.grace)
        serving.join()
    return 0


def _announced(identity: HostIdentity, address: str) -> Announcement:
    from edgert.hosts.lan import Announcement

    return Announcement(identity.name, identity.fingerprint, address)


@contextmanager
def _stop_signals() -> Iterator[threading.Event]:
    """Give an event that SIGINT and SIGTERM set."""
    stopped = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        stopped.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _trusted(peers: Sequence[TrustedPeer], gateway: str | None) -> list[TrustedPeer]:
    """Return who is let in, and note who passes on calls of others."""
    from edgert.hosts.identity import find_peer

    if gateway is None:
        return list(peers)
    found = find_peer(peers, gateway)
    return [replace(peer, is_gateway=peer == found) for peer in peers]


def _shared(options: WorkerOptions) -> SharedParts | None:
    """Return where parts are opened that many sessions use."""
    from edgert.hosts.cloud.quota import KeyLimits
    from edgert.hosts.cloud.shared_parts import SharedParts, Sharing

    limits = KeyLimits(options.key_sessions, options.key_positions, options.key_tokens)
    if options.shared is None:
        if options.positions is not None or limits != KeyLimits():
            raise ConfigError(
                "--positions and --key-... are about shared parts", hint="use --shared N"
            )
        return None
    return SharedParts(Sharing(options.shared, options.positions, limits))


def _check_name(options: WorkerOptions, identity: HostIdentity) -> None:
    if options.host not in (None, identity.name):
        raise ConfigError(
            f"this host is {identity.name}, not {options.host}",
            hint="edgert keys host shows its name",
        )


def _only(options: WorkerOptions) -> str | None:
    """Return the hash of the only manifest that is run, None for any."""
    if options.manifest is None:
        return None
    from partition.manifest_file import canonical_json, read_manifest

    manifest = read_manifest(user_path(options.manifest))
    return hashlib.sha256(canonical_json(manifest)).hexdigest()


def _greeting(
    identity: HostIdentity, address: str, settings: WorkerSettings, trusted: list[str]
) -> str:
    return (
        f"{identity.name} works at {address} with {format_bytes(settings.memory_bytes)}, "
        f"for {', '.join(trusted)}"
    )
