"""Many edges on one worker that shares its part: as alone, apart from each other, within limits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing

import pytest

from cloud_edges import Edges, check_same, folder_of, greedy, prompt_of, together, with_gaps
from edgert.errors import LinkError
from edgert.events import ignore
from edgert.hosts.frames import FrameKind
from edgert.hosts.identity import find_peer, load_identity, trusted_peers
from edgert.hosts.service import connect_service
from edgert.hosts.service.client import ServiceClient
from edgert.hosts.session import Attach, read_attached
from edgert.hosts.steps import Order, OrderKind
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from worker_processes import TINY, Cluster

pytestmark = pytest.mark.model

NAMES = [f"edge{index}" for index in range(4)]


@pytest.fixture(scope="module")
def edges(cluster: Cluster) -> Edges:
    made = Edges(cluster, "stages")
    for name in NAMES:
        made.make(name)
    return made


@pytest.fixture
def cloud(cluster: Cluster, edges: Edges) -> Iterator[str]:
    del edges
    with cluster.worker("w1", "--shared", "4", "--key-sessions", "2") as (_, host):
        yield host.partition("=")[2]


def client_of(edges: Edges, name: str, address: str) -> ServiceClient:
    folder = folder_of(edges, name)
    peer = find_peer(trusted_peers(folder), "w1")
    return connect_service(address, load_identity(folder), peer)


def alone(n_tokens: int) -> list[list[tuple[int, float]]]:
    options = LoadOptions(TINY, n_ctx=1024, n_threads=1)
    with closing(open_backend(options)) as backend:
        return [with_gaps(backend, prompt_of(index), n_tokens) for index in range(len(NAMES))]


def test_edges_answer_together_as_alone_and_the_part_is_there_once(
    edges: Edges, cloud: str
) -> None:
    found = together(edges, NAMES, cloud, 60)
    for tokens, wanted in zip(found.values(), alone(60), strict=True):
        check_same(tokens, wanted)
    with client_of(edges, NAMES[0], cloud) as client:
        (part,) = client.status()["shared"]  # type: ignore[misc, attr-defined]
        assert part["sessions"] == 0
        assert part["sessions_per_batch"] > 1


def test_a_key_sees_no_session_of_another(edges: Edges, cloud: str) -> None:
    with edges.opened(NAMES[0], cloud) as backend:
        assert greedy(backend, prompt_of(0), 5)
        with client_of(edges, NAMES[1], cloud) as other, client_of(edges, NAMES[0], cloud) as own:
            (seen,) = own.status()["sessions"]  # type: ignore[misc, attr-defined]
            assert seen["peer"] == NAMES[0]
            assert other.status()["sessions"] == []


def test_who_knows_the_name_of_a_session_still_needs_its_key(edges: Edges, cloud: str) -> None:
    key = "ab" * 16
    own, other = edges.peer(NAMES[0], cloud), edges.peer(NAMES[1], cloud)
    own.open(key, "w1", ignore)
    with pytest.raises(LinkError, match="session of that name"):
        other.open(key, "w1", ignore)
    other.open("cd" * 16, "w1", ignore)
    with closing(own.link()) as mine:
        mine.send(FrameKind.CONTROL, Attach(key, edges.part).to_bytes())
        assert read_attached(mine.receive(20)) == 0
        for resume in (False, True):
            with closing(other.link()) as link:
                link.send(FrameKind.CONTROL, Attach(key, edges.part, resume).to_bytes())
                with pytest.raises(LinkError, match="no such session"):
                    link.receive(20)
        other.close(key)
        mine.send(FrameKind.CONTROL, Order(OrderKind.TRUNCATE, 0, 0, 0, 1).to_bytes())
        with client_of(edges, NAMES[0], cloud) as client:
            (seen,) = client.status()["sessions"]  # type: ignore[misc, attr-defined]
            assert seen["parts"][0]["attached"]
    own.close(key)
    with client_of(edges, NAMES[0], cloud) as client:
        assert client.status()["sessions"] == []


def test_a_key_gets_its_share_of_places_and_the_others_theirs(edges: Edges, cloud: str) -> None:
    with edges.opened(NAMES[0], cloud), edges.opened(NAMES[0], cloud):
        with pytest.raises(LinkError, match="2 sessions of the 2"), edges.opened(NAMES[0], cloud):
            pass
        with edges.opened(NAMES[1], cloud) as backend:
            assert greedy(backend, prompt_of(1), 3)
    with edges.opened(NAMES[0], cloud) as backend:
        assert greedy(backend, prompt_of(0), 3)


def test_a_worker_that_trusts_itself_can_be_asked_whether_it_serves(
    cluster: Cluster, edges: Edges
) -> None:
    own = load_identity(cluster.folder / "w1" / "hosts")
    place = cluster.folder / "w1" / "hosts" / "trusted" / "w1.pem"
    place.write_bytes(own.certificate_pem)
    del edges
    with cluster.worker("w1", "--shared", "2") as (_, host):
        assert "serving" in cluster.checked("w1", "ps", "--host", host)
    place.unlink()
