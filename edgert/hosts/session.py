"""What a host runs for one home: its parts of a manifest, each served over a link of its own."""

from __future__ import annotations

import json
import struct
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from edgert.errors import EdgertError, FormatError, LinkError
from edgert.hosts.allreduce import Exchange, sums_at_spoke
from edgert.hosts.frames import FrameKind
from edgert.hosts.identity import TrustedPeer
from edgert.hosts.link import Frame, Link
from edgert.hosts.part_server import PartServer
from edgert.hosts.runner import Runner
from edgert.hosts.stage_parts import StagePart, n_embd
from edgert.strict_json import read_json

_NUMBER = struct.Struct("<I")
_LONGEST = 256
_MOST_WAIT_S = 30.0
_RESTING_S = 1.0  # without a step; between tokens home samples and drafts


Opener = Callable[[StagePart, Exchange], Runner]


@dataclass(slots=True)
class _Open:
    """A part that is open."""

    stage_part: StagePart
    exchange: Exchange
    runner: Runner
    server: PartServer | None = None


@dataclass(frozen=True, slots=True)
class Attach:
    """The first words on a link: which part of which session it is for.

    Attributes:
        session: Its key.
        part: Its name.
        resume: Whether to go on where an earlier link to the part ended, which ends now if it has
            not; else the part begins with an empty KV cache.
    """

    session: str
    part: str
    resume: bool = False

    def to_bytes(self) -> bytes:
        """Return the payload of a CONTROL frame."""
        facts: dict[str, object] = {"session": self.session, "part": self.part}
        return json.dumps(facts | ({"resume": True} if self.resume else {})).encode()


def attached_bytes(n_done: int) -> bytes:
    """Return the payload of the READY that answers: the last step or order that was done."""
    return _NUMBER.pack(n_done)


def read_attached(frame: Frame) -> int:
    """Return the number of the last step or order that was done; FormatError if it is not said."""
    if frame.kind is not FrameKind.READY or len(frame.payload) != _NUMBER.size:
        raise FormatError(f"{frame.kind.name} of {len(frame.payload)} bytes, wanted READY")
    return int(_NUMBER.unpack(frame.payload)[0])


def read_attach(frame: Frame) -> Attach:
    """Return what a link is for; FormatError if the frame does not say it."""
    if frame.kind is not FrameKind.CONTROL:
        raise FormatError(f"{frame.kind.name}, wanted the name of a session")
    facts = read_json(bytes(frame.payload), "session")
    if not isinstance(facts, dict) or set(facts) - {"resume"} != {"session", "part"}:
        raise FormatError("no session and part are named")
    session, part, resume = facts["session"], facts["part"], facts.get("resume", False)
    if not (isinstance(session, str) and isinstance(part, str)):
        raise FormatError("session and part are no texts")
    if not isinstance(resume, bool):
        raise FormatError("resume is neither true nor false")
    if max(len(session), len(part)) > _LONGEST:
        raise FormatError("the names of session and part are too long")
    return Attach(session, part, resume)


class Session:
    """Parts that are open for a home, from `open` to `close`.

    Args:
        key: Its name, which only the two ends know.
        peer: The home.
        parts: By name.
        opener: Opens one for the session, which closes it.
    """

    def __init__(
        self,
        key: str,
        peer: TrustedPeer,
        parts: Mapping[str, StagePart],
        opener: Opener = StagePart.open,
    ) -> None:
        self.key = key
        self.peer = peer
        self.used_s = time.monotonic()
        self.was_attached = False
        self._is_opening = True
        self._parts = dict(parts)
        self._opener = opener
        self._open: dict[str, _Open] = {}
        self._links: dict[str, Link] = {}
        self._lock = threading.Condition()
        self._closed = False

    @property
    def idle_s(self) -> float:
        """Seconds in which nothing was heard of home; 0 while it is attached or parts open."""
        with self._lock:
            in_use = self._is_opening or bool(self._links)
        return 0.0 if in_use else time.monotonic() - self.used_s

    @property
    def is_working(self) -> bool:
        """Whether a reply seems to be under way: a step runs, or ended just now."""
        with self._lock:
            servers = [found.server for found in self._open.values() if found.server is not None]
            attached = bool(self._links)
        fresh_s = time.monotonic() - _RESTING_S
        return attached and any(s.is_busy or s.last_s > fresh_s for s in servers)

    def open(self) -> Iterator[str]:
        """Open the parts one after the other; yield the name of each that is open.

        Raises:
            CapacityError: one does not fit in its memory.
            PlanError: its graph does not allow the manifest's placement.
        """
        for name, stage_part in self._parts.items():
            exchange = Exchange()
            runner = self._opener(stage_part, exchange)
            with self._lock:
                if self._closed:
                    runner.close()
                    raise LinkError("the session was closed while it was opened")
                self._open[name] = _Open(stage_part, exchange, runner)
            yield name
        with self._lock:
            self.used_s = time.monotonic()
            self._is_opening = False

    def attach(self, part: str, link: Link, *, resume: bool = False) -> None:
        """Serve a part over a link until home leaves.

        Args:
            part: Its name.
            link: From home.
            resume: See `Attach`.

        Raises:
            LinkError: home is gone, or there is no such part, or another link has it.
            EdgertError: the part failed; home has been told.
        """
        found = self._take(part, link, resume=resume)
        stage_part = found.stage_part
        shared = stage_part.stage.share is not None and not stage_part.part.spec.is_exit
        try:
            if shared:
                found.exchange.join(sums_at_spoke(link, stage_part.n_shares))
            before = found.server
            found.server = PartServer(
                found.runner,
                link,
                n_embd(stage_part.part.file),
                answers=not (shared and stage_part.to_hidden),
                codecs=stage_part.codecs,
                listens=not shared,
            )
            if resume and before is not None:
                found.server.n_done = before.n_done
            elif not shared:
                found.runner.truncate(0)
            link.send(FrameKind.READY, attached_bytes(found.server.n_done))
            found.server.serve()
        finally:
            with self._lock:
                self.used_s = time.monotonic()
                self._links.pop(part, None)
                self._lock.notify_all()

    def _take(self, part: str, link: Link, *, resume: bool) -> _Open:
        """Note that a link has a part; one that resumes takes it from an earlier one."""
        with self._lock:
            before = self._links.get(part)
        if resume and before is not None:
            before.fail(LinkError("another link goes on with the part"))
        with self._lock:
            if resume:
                self._lock.wait_for(lambda: part not in self._links, _MOST_WAIT_S)
            found = self._open.get(part)
            if found is None or part in self._links:
                why = "is served to another link" if found else "is not there"
                raise LinkError(f"part {part!r} of the session {why}")
            if resume and found.stage_part.stage.share is not None:
                raise LinkError(f"part {part!r} shares layers and cannot go on")
            self._links[part] = link
            self.was_attached = True
        return found

    def facts(self) -> dict[str, object]:
        """Return what it is and does, for people."""
        with self._lock:
            opened = dict(self._open)
            attached = set(self._links)
        parts = []
        for name, found in opened.items():
            server = found.server
            counters = found.runner.counters()
            parts.append(
                {
                    "part": name,
                    "has": found.stage_part.part.spec.describe(),
                    "attached": name in attached,
                    "resident_bytes": counters.resident_weight_bytes,
                    "n_tokens": server.n_tokens if server else 0,
                    "busy_s": server.busy_s if server else 0.0,
                    "exchange_s": found.exchange.wait_s,
                }
            )
        return {"peer": self.peer.name, "parts": parts}

    def close(self, reason: EdgertError | None = None) -> None:
        """End its links and free its parts; calling again does nothing."""
        with self._lock:
            self._closed = True
            links, opened = list(self._links.values()), list(self._open.values())
            self._open.clear()
        for found in opened:
            found.runner.cancel()
        for link in links:
            if reason is None:
                link.close()
            else:
                link.fail(reason)
        with self._lock:  # until no thread computes with the parts any more
            self._lock.wait_for(lambda: not self._links, _MOST_WAIT_S)
        for found in opened:
            found.runner.close()


def named(parts: Sequence[StagePart]) -> dict[str, StagePart]:
    """Return parts by the names that links ask for: the stage, or the stage and `/exit`."""
    return {
        part.stage.stage_id + ("/exit" if part.part.spec.is_exit else ""): part for part in parts
    }
