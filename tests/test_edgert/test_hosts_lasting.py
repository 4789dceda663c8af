"""Links that are cut in the middle of a reply: it goes on as if nothing had been."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

import edgert.models
from builders_manifest import manifest, two_hosts
from edgert.errors import Cancelled, FormatError, LinkError
from edgert.host_deployment import HostsDeployment
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.hello import Terms
from edgert.hosts.hidden_states import read_hidden, write_hidden
from edgert.hosts.history import History, history_bytes
from edgert.hosts.home import HomeParts
from edgert.hosts.listener import Listener, listen
from edgert.hosts.remote_part import Codecs
from edgert.hosts.stage_parts import StagePart
from edgert.hosts.tls_link import connect
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from host_identities import PATIENT, in_thread, make_host
from hosts_parts import options
from lasting_hosts import UBATCH, lasting
from part_models import make_part
from quant.activations.settings import CodecSettings
from quant.parts.spec import PartSpec

TINY = Path(edgert.models.__file__).parent / "tiny-chat.gguf"
PROMPT = list(range(300, 340))
N_TOKENS = 24
F16 = CodecSettings(kind="f16")
HALVES = Codecs(F16, F16)
FINE = CodecSettings(bound=0.01)
Floats = NDArray[np.float32]
RNG = np.random.default_rng(3)


def greedy(backend: Backend, n_tokens: int = N_TOKENS) -> list[int]:
    backend.truncate(0)
    tokens = [int(backend.decode(PROMPT, 0, 1)[0].argmax())]
    while len(tokens) < n_tokens:
        position = len(PROMPT) + len(tokens) - 1
        tokens.append(int(backend.decode(tokens[-1:], position, 1)[0].argmax()))
    return tokens


@pytest.fixture(scope="module")
def wanted() -> list[int]:
    with closing(open_backend(options(TINY))) as backend:
        return greedy(backend)


@pytest.mark.model
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("forgets", [False, True], ids=["resumed", "rebuilt"])
def test_links_cut_anywhere_change_no_token(
    seed: int, forgets: bool, wanted: list[int], tmp_path: Path
) -> None:
    cuts = [int(n) for n in np.random.default_rng(seed).integers(8, 40, 3)]
    with lasting(TINY, tmp_path, cuts, forgets=forgets) as hosts:
        assert greedy(hosts.backend) == wanted
        assert hosts.notices
        assert (hosts.peer.n_opened > 1) is forgets


@pytest.mark.model
def test_a_session_that_is_there_is_given_nothing_twice(wanted: list[int], tmp_path: Path) -> None:
    with lasting(TINY, tmp_path, [30]) as hosts:
        assert greedy(hosts.backend) == wanted
        assert hosts.peer.n_opened == 1
        resumed = hosts.part.traffic()
    with lasting(TINY, tmp_path) as hosts:
        assert greedy(hosts.backend) == wanted
        undisturbed = hosts.part.traffic()
    again = resumed[0] - undisturbed[0]
    assert 0 < again < 2 * 4 * 256 * UBATCH  # one step at most, and the words around it


@pytest.mark.model
def test_a_lost_cache_is_filled_in_batches(wanted: list[int], tmp_path: Path) -> None:
    with lasting(TINY, tmp_path, codecs=HALVES) as hosts:
        tokens = greedy(hosts.backend, 10)
        kept = hosts.part.kept_bytes
        assert kept <= history_bytes(len(PROMPT) + 9, 256, F16)
        hosts.peer.forget()
        position = len(PROMPT) + len(tokens) - 1
        assert int(hosts.backend.decode(tokens[-1:], position, 1)[0].argmax()) == wanted[10]
        assert "filled its cache anew, 49 tokens" in hosts.notices[-1]
        session = next(iter(hosts.peer.sessions.values()))
        facts = session.facts()["parts"]
        assert isinstance(facts, list)
        n_batches = -(-len(PROMPT) // UBATCH) + 1
        server = session._open["s1"].server
        assert server is not None
        assert server.n_steps == n_batches + 1


@pytest.mark.model
def test_a_host_that_stays_away_is_an_error_and_the_next_step_asks_again(
    wanted: list[int], tmp_path: Path
) -> None:
    with lasting(TINY, tmp_path) as hosts:
        tokens = greedy(hosts.backend, 8)
        hosts.peer.down = True
        hosts.peer.links[-1].close()
        position = len(PROMPT) + len(tokens) - 1
        with pytest.raises(LinkError, match="board"):
            hosts.backend.decode(tokens[-1:], position, 1)
        hosts.backend.truncate(position)
        hosts.peer.down = False
        while len(tokens) < N_TOKENS:
            position = len(PROMPT) + len(tokens) - 1
            tokens.append(int(hosts.backend.decode(tokens[-1:], position, 1)[0].argmax()))
        assert tokens == wanted
        assert hosts.peer.n_opened == 1


@pytest.mark.model
def test_orders_that_a_cut_link_swallowed_are_given_again(tmp_path: Path) -> None:
    with closing(open_backend(options(TINY))) as alone, lasting(TINY, tmp_path) as hosts:
        for backend in (alone, hosts.backend):
            backend.truncate(0)
            backend.decode(PROMPT[:UBATCH], 0, 0)
        hosts.peer.links[-1].close()
        for backend in (alone, hosts.backend):
            backend.truncate(14)
            backend.shift(4, 3)
        found = hosts.backend.decode([7], 11, 1)
        assert found.tobytes() == alone.decode([7], 11, 1).tobytes()
        assert "attached again" in hosts.notices[-1]


def prefill_on(backend: Backend) -> None:
    for _ in range(500):
        backend.truncate(0)
        backend.decode(PROMPT, 0, 0)


@pytest.mark.model
def test_a_prompt_is_given_up_and_the_host_goes_on(wanted: list[int], tmp_path: Path) -> None:
    with lasting(TINY, tmp_path) as hosts:
        for _ in range(5):
            timer = threading.Timer(0.02, hosts.backend.cancel)
            timer.start()
            with pytest.raises(Cancelled):
                prefill_on(hosts.backend)
            timer.join()
            hosts.backend.truncate(0)
        try:  # one that came too late for the step before
            found = greedy(hosts.backend)
        except Cancelled:
            found = greedy(hosts.backend)
        assert found == wanted
        assert hosts.peer.n_opened == 1


@pytest.fixture
def tls() -> Iterator[tuple[Listener, object]]:
    home, board = make_host("home"), make_host("board")
    terms = Terms("worker", peer_role="home")
    with closing(listen("127.0.0.1:0", board.identity, [home.known], terms, PATIENT)) as found:

        def ends() -> tuple[FramedLink, FramedLink]:
            there = in_thread(lambda: found.accept(10))
            near = connect(
                found.address, home.identity, board.known, Terms("home", "worker"), PATIENT
            )
            far = there.result(10).link
            assert isinstance(near, FramedLink)
            assert isinstance(far, FramedLink)
            return near, far

        yield found, ends


@pytest.mark.model
@pytest.mark.parametrize("forgets", [False, True], ids=["resumed", "rebuilt"])
def test_cut_links_over_tls_change_no_token(
    forgets: bool, tls: tuple[Listener, object], wanted: list[int], tmp_path: Path
) -> None:
    with lasting(TINY, tmp_path, [17, 9, 24], forgets=forgets, ends=tls[1]) as hosts:
        assert greedy(hosts.backend) == wanted
        assert len(hosts.peer.links) > 3


def rows(n_tokens: int) -> Floats:
    return RNG.standard_normal((n_tokens, 64)).astype(np.float32)


def message(
    states: np.ndarray[tuple[int, int], np.dtype[np.float32]], codec: CodecSettings
) -> bytes:
    return b"".join(map(bytes, write_hidden(states, codec)))


def whole(history: History, most: int, codec: CodecSettings) -> Sequence[Sequence[float]]:
    parts = [read_hidden(p.message, p.n_tokens, 64, codec) for p in history.batches(most)]
    return np.concatenate(parts).tolist()


@pytest.mark.parametrize("codec", [F16, FINE], ids=["f16", "adaptive"])
def test_a_history_holds_what_the_other_host_read_whatever_is_forgotten(
    codec: CodecSettings,
) -> None:
    history = History(64, codec)
    read = np.empty((0, 64), np.float32)
    for n_tokens in (7, 1, 1, 5, 1):
        states = rows(n_tokens)
        data = message(states, codec)
        history.add(len(read), n_tokens, data)
        read = np.concatenate([read, read_hidden(data, n_tokens, 64, codec)])
    assert whole(history, 4, codec) == read.tolist()
    history.truncate(12)
    assert history.n_positions == 12
    history.shift(2, 6)
    assert history.n_positions == 6
    kept = np.concatenate([read[:2], read[8:12]])
    assert whole(history, 100, codec) == kept.tolist()
    assert [piece.n_tokens for piece in history.batches(3)] == [3, 3]
    history.add(3, 1, message(rows(1), codec))
    assert history.n_positions == 4


def test_what_home_keeps_of_pipelines_is_known_before_anything_is_opened(tmp_path: Path) -> None:
    made = manifest(two_hosts())
    spec = PartSpec(3, 8, embedding=False, head="whole")
    part = make_part(TINY, spec, tmp_path / "back.gguf")
    away = StagePart(made.stages[1], part, options(part.file.path), HALVES)
    prepared = HomeParts(made, TINY, [("home", away), ("board", away)])
    deployment = HostsDeployment(prepared, dict)
    history, most = History(256, F16), made.run.n_ctx
    for position in range(0, most, 512):
        states = np.ones((512, 256), np.float32)
        history.add(position, 512, message(states, F16))
    assert history.n_bytes <= deployment.kept_bytes <= 1.01 * history.n_bytes


def test_a_history_does_not_read_what_is_damaged() -> None:
    history = History(64, F16)
    history.add(0, 3, message(rows(3), F16)[:-1])
    with pytest.raises(FormatError):
        history.truncate(2)
