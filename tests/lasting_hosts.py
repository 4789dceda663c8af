"""A host whose links are cut as a test likes, with real sessions behind them, in one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from builders_manifest import manifest, two_hosts
from edgert.errors import EdgertError, LinkError
from edgert.events import Listener, Notice, ignore
from edgert.hosts.backend import HostsBackend
from edgert.hosts.entrance import Entrance
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.host_session import HostSession, PartReach
from edgert.hosts.identity import TrustedPeer
from edgert.hosts.lasting_part import LastingPart
from edgert.hosts.link import Channel, Link
from edgert.hosts.memory_link import memory_channels
from edgert.hosts.remote_part import PLAIN, Codecs, RemotePart
from edgert.hosts.session import Session, read_attach
from edgert.hosts.stage_parts import StagePart
from edgert.hosts.stages import Stages
from edgert.llama.lib import load_library
from edgert.llama.open import open_part
from edgert.llama.part import PartRunner
from edgert.llama.part_graph import PartRun
from host_identities import make_host
from hosts_parts import SIZES, options
from part_models import make_part
from quant.model_spec import read_model_spec
from quant.parts.spec import PartSpec
from quant.tensor_file import open_tensor_file

UBATCH = 16
STAGE = "s1"


class CutChannel:
    """A channel that ends after so many reads and writes."""

    def __init__(self, inner: Channel, n_uses: int) -> None:
        self._inner = inner
        self._left = n_uses

    def read_into(self, target: memoryview, until_s: float) -> int:
        self._use()
        return self._inner.read_into(target, until_s)

    def write(self, content: bytes | memoryview, until_s: float) -> None:
        """Write; the last write arrives where the count is even, and is lost where it is odd."""
        if self._left == 1:
            self._inner.write(content, until_s)
        self._use()
        self._inner.write(content, until_s)

    def close(self, linger_s: float = 0.0) -> None:
        self._inner.close(linger_s)

    def _use(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self._inner.close()
            raise ConnectionResetError("cut")


def memory_ends() -> tuple[FramedLink, FramedLink]:
    near, far = memory_channels()
    return FramedLink(near, "board"), FramedLink(far, "home")


@dataclass
class CutPeer:
    """See `Peer`; `cuts` says after how many uses each next link ends, None for never."""

    part: StagePart
    cuts: Iterator[int | None]
    ends: Callable[[], tuple[FramedLink, FramedLink]] = memory_ends
    name: str = "board"
    forgets: bool = False
    down: bool = False
    n_opened: int = 0
    n_served: int = 0
    sessions: dict[str, Session] = field(default_factory=dict)
    links: list[Link] = field(default_factory=list)
    threads: list[threading.Thread] = field(default_factory=list)
    home: TrustedPeer = field(default_factory=lambda: make_host("home").known)

    def open(self, session: str, host_id: str, listener: Listener) -> None:
        del host_id, listener
        self._check()
        self.n_opened += 1
        self.sessions[session] = Session(session, self.home, {STAGE: self.part})
        assert list(self.sessions[session].open()) == [STAGE]

    def link(self) -> Link:
        self._check()
        if self.forgets and self.n_served == self.n_opened:
            self.forget()  # whoever comes a second time comes too late
        self.n_served = self.n_opened
        near, far = self.ends()
        n_uses = next(self.cuts, None)
        if n_uses is not None:
            near._channel = CutChannel(near._channel, n_uses)
        thread = threading.Thread(target=self._run, args=(far,), daemon=True)
        self.threads.append(thread)
        self.links.append(near)
        thread.start()
        return near

    def close(self, session: str) -> None:
        del session
        self.forget()

    def forget(self) -> None:
        """End all sessions, as a process that dies does."""
        for key in list(self.sessions):
            self.sessions.pop(key).close()

    def _check(self) -> None:
        if self.down:
            raise LinkError("board: cannot be reached")

    def _run(self, link: Link) -> None:
        with suppress(EdgertError):
            try:
                attach = read_attach(link.receive())
                found = self.sessions.get(attach.session)
                if found is None:
                    raise LinkError("there is no such session")
                found.attach(attach.part, link, resume=attach.resume)
            except EdgertError as error:
                link.fail(error)
            finally:
                link.close()


@dataclass
class Lasting:
    """A model in two parts, the second one on a host that may fail."""

    backend: HostsBackend
    peer: CutPeer
    part: LastingPart
    route: Stages
    notices: list[str]


@contextmanager
def lasting(
    model: Path,
    folder: Path,
    cuts: Iterable[int | None] = (),
    codecs: Codecs = PLAIN,
    **peer_settings: object,
) -> Iterator[Lasting]:
    """Open a model of which another host has the last layers."""
    spec = read_model_spec(open_tensor_file(model))
    front = make_part(model, PartSpec(0, 3, embedding=False, head="none"), folder / "front.gguf")
    back = make_part(
        model, PartSpec(3, spec.n_layer, embedding=False, head="whole"), folder / "back.gguf"
    )
    stage = manifest(two_hosts()).stages[1]
    away = StagePart(stage, back, options(back.file.path), codecs)
    peer = CutPeer(away, iter(cuts), **peer_settings)  # type: ignore[arg-type]
    notices: list[str] = []

    def listener(event: object) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    session = HostSession(peer, "board", ignore)
    session.open()
    link, _ = session.attach(STAGE)
    part = LastingPart(
        RemotePart(link, spec.n_vocab, to_hidden=False, codecs=codecs),
        spec.n_embd,
        UBATCH,
        PartReach(session, STAGE),
        (0.0, 0.01, 0.02, 0.05),
        listener,
    )
    here: PartRunner = open_part(options(front.file.path, to_hidden=True), PartRun(to_hidden=True))
    route = Stages([here, part], UBATCH)
    entrance = Entrance(load_library(), open_tensor_file(model))
    backend = HostsBackend(entrance, route, SIZES, {})
    try:
        yield Lasting(backend, peer, part, route, notices)
    finally:
        backend.close()
        session.close()
        for thread in peer.threads:
            thread.join(10)
            assert not thread.is_alive()
