"""A host that works for others: takes parts of models, opens sessions, serves them over links."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import (
    CapacityError,
    ConfigError,
    EdgertError,
    FormatError,
    LinkError,
    LinkTimeout,
    PlanError,
)
from edgert.hosts.cloud.shared_parts import SharedParts
from edgert.hosts.identity import HostIdentity, TrustedPeer
from edgert.hosts.link import Link
from edgert.hosts.listener import Listener
from edgert.hosts.service.handlers import OfferedBlob
from edgert.hosts.session import Session, named, read_attach
from edgert.hosts.stage_parts import StagePart, stage_bytes, stage_part
from edgert.model_files import FileHashes
from edgert.packing.parts import model_identity
from partition.manifest import Host, Manifest, Stage
from partition.manifest_file import read_manifest

logger = logging.getLogger(__name__)

Check = Callable[[Manifest, Stage], None]
Claim = tuple[str, int]  # memory, and the name of what takes it: a session, or a shared manifest

_SHA256 = re.compile(r"[0-9a-f]{64}")
_SESSION = re.compile(r"[0-9a-f]{32}")
_LOOK_S = 0.5  # between looks for sessions whose home is gone
_REQUEST = {"session", "host", "manifest", "parts"}
_MOST_PARTS = 512


@dataclass(frozen=True, slots=True)
class WorkerSettings:
    """What a worker allows.

    Attributes:
        memory_bytes: Most memory that manifests may take here, all sessions together.
        most_sessions: At a time.
        manifest_sha256: The only manifest that is run; None for any of a trusted home.
        kept_s: A session whose home is gone is over after so many seconds.
        unattached_s: And one whose home never came.
        silence_s: What links to here take for the end of their home; it is told, and sends signs of
            life.
    """

    memory_bytes: int
    most_sessions: int = 4
    manifest_sha256: str | None = None
    kept_s: float = 10.0
    unattached_s: float = 60.0
    silence_s: float | None = None


class Worker:
    """The `Handlers` of a worker's service, and whom its exchange links lead to.

    Args:
        identity: This host's.
        blobs: Folder of received blobs by hash.
        settings: What is allowed.
        check: Refuses a stage that this host's hardware or memory is not what it was planned for.
        exchange: Where homes connect for exchange links.
        shared: Where parts are opened that many sessions use; None gives each its own.
    """

    def __init__(
        self,
        identity: HostIdentity,
        blobs: Path,
        settings: WorkerSettings,
        check: Check,
        exchange: Listener,
        shared: SharedParts | None = None,
    ) -> None:
        self._identity = identity
        self._blobs = blobs
        self._settings = settings
        self._check = check
        self._exchange = exchange
        self._hashes = FileHashes()
        self._shared = shared
        self._sessions: dict[str, tuple[Session, Claim]] = {}
        self._shared_bytes: dict[str, int] = {}  # by manifest
        self._lock = threading.Lock()
        self._draining = False
        self._started_s = time.monotonic()

    def status(self, peer: TrustedPeer) -> Mapping[str, object]:
        """Return what this host runs; where many share it, nobody sees sessions of others."""
        with self._lock:
            sessions = [session for session, _ in self._sessions.values()]
        if self._shared is not None:
            sessions = [s for s in sessions if s.peer.fingerprint == peer.fingerprint]
        return {
            "host": self._identity.name,
            "state": "draining" if self._draining else "serving",
            "up_s": time.monotonic() - self._started_s,
            "exchange": self._exchange.address,
            "memory_bytes": self._settings.memory_bytes,
            "taken_bytes": self._taken_bytes(),
            "sessions": [session.facts() for session in sessions],
            **({} if self._shared is None else {"shared": self._shared.facts()}),
        }

    def offer(self, peer: TrustedPeer, blobs: tuple[OfferedBlob, ...]) -> None:
        """Refuse blobs while draining."""
        del peer, blobs
        self._check_serving()

    def open(
        self, peer: TrustedPeer, request: Mapping[str, object]
    ) -> Iterator[Mapping[str, object]]:
        """Open the parts of a manifest that are this host's.

        Raises:
            FormatError: the request, the manifest or a part is not what it should be.
            PlanError: the manifest is not for this host, or not for its hardware.
            CapacityError: there is less memory than planned, or too many sessions.
        """
        self._check_serving()
        key, manifest, host, paths = self._read(peer, request)
        parts = self._parts(manifest, host, paths)
        needed = sum(stage_bytes(s) for s in manifest.stages if s.host_id == host.host_id)
        session, claim = Session(key, peer, named(parts)), (key, needed)
        if self._shared is not None:
            digest = f"{request['manifest']}/{host.host_id}"
            opener = self._shared.opener(digest, peer.fingerprint)
            session = Session(key, peer, named(parts), opener)
            claim = digest, needed + sum(self._shared.extra_bytes(part) for part in parts)
        self._admit(session, claim)
        try:
            for name in session.open():
                yield {"opened": name}
        except BaseException:
            self._end(session)
            raise
        silence_s = self._settings.silence_s
        yield {"ready": True, "exchange": self._exchange.address, "silence_s": silence_s}

    def close(self, peer: TrustedPeer, session: str) -> None:
        """Close a session of this peer."""
        with self._lock:
            found = self._sessions.get(session)
        if found is not None and found[0].peer.fingerprint == peer.fingerprint:
            self._end(found[0])

    def run(self, peer: TrustedPeer, link: Link) -> None:
        """Serve the part of a session that a link's first frame names, until home leaves."""
        try:
            attach = read_attach(link.receive())
            self._session(peer, attach.session).attach(attach.part, link, resume=attach.resume)
        except EdgertError as error:
            link.fail(error)
            logger.warning("%s: %s", link.peer, error.message)
        except Exception as error:  # a bug: home is told, and the thread reports it
            link.fail(error)
            raise
        finally:
            link.close()

    def serve_exchange(self) -> None:
        """Serve exchange links until the listener is closed."""
        while True:
            self._forget_idle()
            try:
                greeted = self._exchange.accept(_LOOK_S)
            except LinkTimeout:
                continue
            except LinkError:
                return
            thread = threading.Thread(
                target=self.run, args=(greeted.peer, greeted.link), name="part", daemon=True
            )
            try:
                thread.start()
            except RuntimeError as error:
                greeted.link.fail(CapacityError(f"no thread for one more link: {error}"))

    def drain(self, grace_s: float) -> None:
        """Take no more sessions; end those that are there once they rest, or after a while."""
        self._draining = True
        until_s = time.monotonic() + grace_s
        while self._is_working() and time.monotonic() < until_s:
            time.sleep(0.05)
        with self._lock:
            sessions = [session for session, _ in self._sessions.values()]
        for session in sessions:
            self._end(session, LinkError(f"{self._identity.name} stops working"))
        if self._shared is not None:
            self._shared.close()
        self._exchange.close()

    def _session(self, peer: TrustedPeer, key: str) -> Session:
        with self._lock:
            found = self._sessions.get(key)
        if found is None or found[0].peer.fingerprint != peer.fingerprint:
            raise LinkError("there is no such session", hint="it ended; open it again")
        return found[0]

    def _read(
        self, peer: TrustedPeer, request: Mapping[str, object]
    ) -> tuple[str, Manifest, Host, list[Path]]:
        """Check a request; return the session's name, the manifest, this host and its parts."""
        key, host_id, digest = (request.get(name) for name in ("session", "host", "manifest"))
        hashes = request.get("parts")
        if set(request) != _REQUEST or not isinstance(hashes, list) or len(hashes) > _MOST_PARTS:
            raise FormatError(f"a session is opened with {', '.join(sorted(_REQUEST))}")
        if not isinstance(key, str) or not _SESSION.fullmatch(key):
            raise FormatError("the session's name is not 32 hexadecimal digits")
        only = self._settings.manifest_sha256
        if only is not None and digest != only:
            raise PlanError(f"this worker runs the manifest {only[:16]}... only")
        manifest = read_manifest(self._blob(digest))
        host = next((host for host in manifest.hosts if host.host_id == host_id), None)
        if host is None:
            raise PlanError(f"the manifest has no host {str(host_id)[:64]!r}")
        _check_keys(manifest, host, self._identity, peer)
        return key, manifest, host, [self._blob(item) for item in hashes]

    def _blob(self, digest: object) -> Path:
        """Return a received blob, proved by its hash."""
        if not isinstance(digest, str) or not _SHA256.fullmatch(digest):
            raise FormatError("a hash is not 64 hexadecimal digits")
        path = self._blobs / "sha256" / digest
        if not path.is_file():
            raise ConfigError(f"blob {digest[:16]}... has not been sent")
        if self._hashes.of(path) != digest:
            raise FormatError(f"blob {digest[:16]}... is damaged", hint="send it again")
        return path

    def _parts(self, manifest: Manifest, host: Host, paths: list[Path]) -> list[StagePart]:
        stages = [stage for stage in manifest.stages if stage.host_id == host.host_id]
        for stage in stages:
            self._check(manifest, stage)
        parts = [_matching(manifest, stages, path) for path in paths]
        missing = {stage.stage_id for stage in stages} - {part.stage.stage_id for part in parts}
        if missing:
            raise FormatError(f"no part of stage {min(missing)} is named")
        return parts

    def _admit(self, session: Session, claim: Claim) -> None:
        group, needed_bytes = claim
        with self._lock:
            room = self._settings.memory_bytes - self._taken_besides(group)
            if needed_bytes > room and self._shared is not None:
                self._shared.free_unused(0.0)
                room = self._settings.memory_bytes - self._taken_besides(group)
            if needed_bytes > room:
                raise CapacityError(
                    f"the manifest takes {needed_bytes:,} bytes here, {room:,} are left of "
                    f"{self._settings.memory_bytes:,}",
                    needed_bytes=needed_bytes,
                    available_bytes=room,
                    hint="plan again with what this host has, or close other sessions",
                )
            if len(self._sessions) >= self._settings.most_sessions:
                raise CapacityError(f"{len(self._sessions)} sessions are open, as many as may be")
            if session.key in self._sessions:
                raise ConfigError("there is a session of that name")
            self._sessions[session.key] = session, claim
            if self._shared is not None:
                kept = filter(self._shared.is_open, self._shared_bytes)
                self._shared_bytes = {name: self._shared_bytes[name] for name in kept}
                self._shared_bytes[group] = needed_bytes

    def _end(self, session: Session, reason: EdgertError | None = None) -> None:
        session.close(reason)
        with self._lock:
            self._sessions.pop(session.key, None)

    def _forget_idle(self) -> None:
        """End sessions whose home is gone, and parts that nobody uses."""
        if self._shared is not None:
            self._shared.free_unused()
        settings = self._settings
        with self._lock:
            sessions = [session for session, _ in self._sessions.values()]
        for session in sessions:
            most_s = settings.kept_s if session.was_attached else settings.unattached_s
            if session.idle_s > most_s:
                logger.warning("%s: its session is over, as it is gone", session.peer.name)
                with suppress(EdgertError):
                    self._end(session)

    def _is_working(self) -> bool:
        with self._lock:
            sessions = [session for session, _ in self._sessions.values()]
        return any(session.is_working for session in sessions)

    def _taken_bytes(self) -> int:
        with self._lock:
            return self._taken_besides(None)

    def _taken_besides(self, group: str | None) -> int:
        """Return the memory that is taken, what sessions share once; under the lock."""
        claims = dict(claim for _, claim in self._sessions.values())
        if self._shared is not None:  # a part stays for a while when its last session has ended
            open_still = filter(self._shared.is_open, self._shared_bytes)
            claims |= {digest: self._shared_bytes[digest] for digest in open_still}
        return sum(n_bytes for name, n_bytes in claims.items() if name != group)

    def _check_serving(self) -> None:
        if self._draining:
            raise LinkError(f"{self._identity.name} is stopping and takes no more work")


def _matching(manifest: Manifest, stages: list[Stage], path: Path) -> StagePart:
    """Return the stage that a part file is of."""
    problem: FormatError | None = None
    for stage in stages:
        try:
            return stage_part(manifest, stage, path, model_identity(manifest, stage))
        except FormatError as error:
            problem = error
    raise problem or FormatError("the manifest has no stage here", path=path)


def _check_keys(manifest: Manifest, host: Host, identity: HostIdentity, peer: TrustedPeer) -> None:
    """Refuse a manifest that pins other keys than those of the two ends."""
    if host.peer_key not in (None, identity.fingerprint):
        raise PlanError(
            f"the manifest wants host {host.host_id} to have key {host.peer_key}, "
            f"this host has {identity.fingerprint}"
        )
    home = next(h for h in manifest.hosts if h.host_id == manifest.policies.home)
    if home.peer_key not in (None, peer.fingerprint):
        raise PlanError(
            f"the manifest wants home to have key {home.peer_key}, {peer.name} has "
            f"{peer.fingerprint}"
        )
