"""From a manifest of several hosts to a backend at home: parts made, peers found, checks done."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.errors import ConfigError, FormatError
from edgert.events import Listener, ignore
from edgert.hosts.address import parse_address
from edgert.hosts.history import history_bytes
from edgert.hosts.identity import find_peer, hosts_folder, load_identity, trusted_peers
from edgert.hosts.link import LinkLimits
from edgert.hosts.stage_parts import StagePart, n_embd, stage_part
from edgert.model_files import FileHashes
from edgert.packing.blobs import Blob, file_blob
from edgert.packing.pack import INDEX, pack
from edgert.packing.parts import model_identity
from partition.manifest import Host, Manifest
from partition.manifest_file import canonical_json

if TYPE_CHECKING:
    from edgert.config import Directories
    from edgert.hosts.backend import HostsBackend
    from edgert.hosts.home import HomeParts
    from edgert.hosts.host_session import Peer

# Hidden states of a batch, or its logits.
LINK_PAYLOAD_BYTES = 256 << 20
_BALANCED = "grpcs://"
_SERVICE_ADDRESS = "edgert chat --manifest M --host NAME=ADDRESS:PORT"


@dataclass(frozen=True, slots=True)
class HostsAsk:
    """How other hosts are reached.

    Attributes:
        directories: Where this host's identity and its trusted peers are, and what is cached.
        addresses: HOST:PORT of hosts' services, by id, or grpcs://HOST:PORT; others are as the
            manifest says.
        listener: Hears what happens.
        deadline_s: Seconds that a host may take for a step before it counts as gone.
    """

    directories: Directories
    addresses: Mapping[str, str] = field(default_factory=dict)
    listener: Listener = ignore
    deadline_s: float = 30.0


@dataclass(frozen=True, slots=True)
class HostsDeployment:
    """A manifest of several hosts, ready to be opened.

    Attributes:
        prepared: Home's files and all stages.
        peers: The other hosts, made when it is opened.
    """

    prepared: HomeParts
    peers: Callable[[], Mapping[str, Peer]]

    @property
    def kept_bytes(self) -> int:
        """What home keeps at most of what it sent, to fill the caches of other hosts anew."""
        n_ctx, home = self.prepared.manifest.run.n_ctx, self.prepared.manifest.policies.home
        return sum(
            history_bytes(n_ctx, n_embd(part.part.file), part.codecs.there)
            for host_id, part in self.prepared.parts
            if host_id != home and part.stage.share is None
        )

    def open(self, listener: Listener) -> HostsBackend:
        """Open it; see `edgert.hosts.home.open_home`."""
        from edgert.hosts.home import open_home

        return open_home(self.prepared, self.peers(), listener)


def known_addresses(env: Mapping[str, str], named: Sequence[str] = ()) -> dict[str, str]:
    """Return the addresses of hosts' services that a person names.

    Args:
        env: EDGERT_HOSTS has items as `named`, separated by commas.
        named: NAME=HOST:PORT or NAME=grpcs://HOST:PORT each; these count more.

    Raises:
        ConfigError: an item is something else.
    """
    found = {}
    items = [item for item in env.get("EDGERT_HOSTS", "").split(",") if item.strip()]
    for item in (*items, *named):
        name, equals, address = item.strip().partition("=")
        if not equals or not name:
            raise ConfigError(f"host {item!r}, wanted NAME=ADDRESS:PORT", hint=_SERVICE_ADDRESS)
        parse_address(service_address(address)[0])
        found[name] = address
    return found


def service_address(text: str) -> tuple[str, bool]:
    """Return HOST:PORT of a service, and whether links for steps go its way, too.

    Args:
        text: HOST:PORT as the manifest says, or grpcs://HOST:PORT of what balances the load of
            several hosts, which passes on nothing else.
    """
    return text.removeprefix(_BALANCED), text.startswith(_BALANCED)


def deploy_hosts(manifest: Manifest, model_files: Sequence[Path], ask: HostsAsk) -> HostsDeployment:
    """Make the parts of every host and find the other hosts.

    Args:
        manifest: Valid, and for this host as its home.
        model_files: Of the model, then of its variants; found and proved by hash.
        ask: How other hosts are reached.

    Raises:
        ConfigError: a host has no address or is not trusted, or a part cannot be made.
        FormatError: an identity or a certificate is damaged.
        CapacityError: the disk is full.
    """
    from edgert.hosts.home import HomeParts

    home = manifest.policies.home
    others = [host for host in manifest.hosts if host.host_id != home]
    addresses = {host.host_id: _address(host, ask) for host in others}
    folder = ask.directories.cache / "hosts" / hashlib.sha256(canonical_json(manifest)).hexdigest()
    hashes = FileHashes(ask.directories.cache)
    packed = pack(manifest, tuple(model_files), folder, hashes, listener=ask.listener)
    files = {host_id: _index(path) for host_id, path in packed.host_folders.items()}
    parts = _in_order(manifest, files)

    def peers() -> dict[str, Peer]:
        return {h.host_id: _peer(manifest, h, addresses, files, ask) for h in others}

    return HostsDeployment(HomeParts(manifest, model_files[0], parts), peers)


@dataclass(frozen=True, slots=True)
class _PackedFile:
    """A file of a host's folder."""

    path: Path
    role: str
    stage_id: str | None
    sha256: str
    size_bytes: int


def _index(folder: Path) -> list[_PackedFile]:
    """Read what is in a host's folder, as `pack` wrote it just now."""
    document = json.loads((folder / INDEX).read_bytes())
    return [
        _PackedFile(
            folder / item["path"], item["role"], item.get("stage_id"),
            item["sha256"], item["size_bytes"],
        )
        for item in document["files"]
    ]  # fmt: skip


def _in_order(
    manifest: Manifest, files: Mapping[str, list[_PackedFile]]
) -> list[tuple[str, StagePart]]:
    """Return every part in the order in which a token passes them, heads of their own last."""
    layers: list[tuple[str, StagePart]] = []
    heads: list[tuple[str, StagePart]] = []
    for stage in manifest.stages:
        own = [f for f in files[stage.host_id] if f.stage_id == stage.stage_id and f.role == "part"]
        if not own:
            raise FormatError(f"stage {stage.stage_id} has no part file")
        for file in own:
            part = stage_part(manifest, stage, file.path, model_identity(manifest, stage))
            (heads if part.part.spec.is_exit else layers).append((stage.host_id, part))
    return layers + heads


def _peer(
    manifest: Manifest,
    host: Host,
    addresses: Mapping[str, str],
    files: Mapping[str, list[_PackedFile]],
    ask: HostsAsk,
) -> Peer:
    from edgert.hosts.service_peer import PeerFiles, ServicePeer

    folder = hosts_folder(ask.directories)
    identity = load_identity(folder)
    peer = find_peer(trusted_peers(folder), host.peer_key or host.host_id)
    needed = PeerFiles(_manifest_blob(manifest), [
        file_blob(file.path, file.sha256, file.size_bytes)
        for file in files[host.host_id]
        if file.role == "part"
    ])  # fmt: skip
    limits = LinkLimits(payload_bytes=LINK_PAYLOAD_BYTES, deadline_s=ask.deadline_s)
    own = {stage.stage_id for stage in manifest.stages if stage.host_id == host.host_id}
    kinds = {t.kind for t in manifest.transport if {t.source_stage, t.target_stage} & own}
    address, is_balanced = service_address(addresses[host.host_id])
    kind = "service" if is_balanced or kinds == {"service"} else "exchange"
    return ServicePeer(address, identity, peer, needed, limits, kind)


def _manifest_blob(manifest: Manifest) -> Blob:
    content = canonical_json(manifest)
    sha256 = hashlib.sha256(content).hexdigest()
    return Blob(sha256, len(content), "the manifest", lambda offset: iter([content[offset:]]))


def _address(host: Host, ask: HostsAsk) -> str:
    address = ask.addresses.get(host.host_id) or host.address
    if address is None:
        raise ConfigError(f"no address of host {host.host_id} is known", hint=_SERVICE_ADDRESS)
    parse_address(service_address(address)[0])
    return address
