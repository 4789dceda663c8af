"""Transfers of blobs: whole, continued, cancelled, damaged, without room, one at a time."""

from __future__ import annotations

import os
import random
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from edgert.errors import Cancelled, CapacityError, ConfigError, LinkError, LinkTimeout
from edgert.events import Event, WorkProgress
from edgert.hosts.service import ServiceLimits, connect_service
from edgert.hosts.service.handlers import BlobState, OfferedBlob
from edgert.hosts.service.limits import CHUNK_BYTES
from edgert.hosts.service.messages import SERVICE, encode, own_versions, path_of
from edgert.hosts.service.progress import TransferProgress
from edgert.hosts.service.receiver import BlobReceiver
from edgert.hosts.service.upload import send_blobs
from edgert.hosts.service_peer import PeerFiles, ServicePeer
from edgert.packing.blobs import Blob
from host_identities import PATIENT, in_thread, make_host
from service_hosts import LIMITS, MB, NO_ROOM, Pair, blob_of, eventually, pair_of

CONTENT = random.Random(3).randbytes(3 * MB + 12345)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with pair_of(tmp_path) as pair:
        yield pair


def place(pair: Pair, blob: Blob) -> Path:
    return pair.folder / "sha256" / blob.sha256


def part(pair: Pair, blob: Blob) -> Path:
    return pair.folder / "sha256" / f"{blob.sha256}.part"


def offered(blob: Blob) -> OfferedBlob:
    return OfferedBlob(blob.sha256, blob.size_bytes)


class Held:
    """A blob whose source waits after its first piece until it is let go."""

    def __init__(self, content: bytes) -> None:
        self.let_go = threading.Event()
        self.began_at: list[int] = []
        whole = blob_of(content)

        def read(offset: int) -> Iterator[bytes]:
            self.began_at.append(offset)
            for piece in whole.read(offset):
                yield piece
                self.let_go.wait(20)

        self.blob = Blob(whole.sha256, whole.size_bytes, "held", read)


def test_blobs_arrive_whole_and_both_ends_see_progress(tmp_path: Path) -> None:
    arrived: list[TransferProgress] = []
    sent: list[TransferProgress] = []
    with pair_of(tmp_path, listener=arrived.append) as pair:
        blobs = [blob_of(CONTENT), blob_of(b""), blob_of(b"small")]
        send_blobs(pair.client, blobs, sent.append)
        assert [place(pair, blob).read_bytes() for blob in blobs] == [CONTENT, b"", b"small"]
        assert not list(pair.folder.rglob("*.part"))
        for seen in (arrived, sent):
            done = [p.done_bytes for p in seen if p.sha256 == blobs[0].sha256]
            assert done == sorted(done)
            assert done[-1] == len(CONTENT)
            assert len(set(done)) > 3
            assert {p.total_bytes for p in seen if p.sha256 == blobs[2].sha256} == {5}


def test_whole_blobs_are_not_sent_again(pair: Pair) -> None:
    blob = blob_of(CONTENT)
    send_blobs(pair.client, [blob])
    before = place(pair, blob).stat()
    again = Held(CONTENT)
    send_blobs(pair.client, [again.blob])
    assert again.began_at == []
    assert place(pair, blob).stat().st_mtime_ns == before.st_mtime_ns
    state = BlobState(blob.sha256, blob.size_bytes, blob.size_bytes, is_whole=True)
    assert pair.client.offer([offered(blob)]) == (state,)


def test_cancelled_upload_leaves_a_beginning_that_is_continued(tmp_path: Path) -> None:
    has_some = threading.Event()

    def hear(progress: TransferProgress) -> None:
        if progress.done_bytes >= MB:
            has_some.set()

    with pair_of(tmp_path, listener=hear) as pair:
        held = Held(CONTENT)
        with pytest.raises(Cancelled):
            send_blobs(pair.client, [held.blob], stopped=has_some.is_set)
        held.let_go.set()
        eventually(lambda: bool(pair.server.refusals))
        assert "what arrived is kept" in pair.server.refusals[-1].message
        assert part(pair, held.blob).stat().st_size == MB
        (state,) = pair.client.offer([offered(held.blob)])
        assert (state.there_bytes, state.is_whole) == (MB, False)
        send_blobs(pair.client, [held.blob])
        assert held.began_at == [0, MB]
        assert place(pair, held.blob).read_bytes() == CONTENT


def test_worker_that_stops_keeps_what_arrived_for_the_next_one(tmp_path: Path) -> None:
    held = Held(CONTENT)
    has_some = threading.Event()
    with pair_of(tmp_path, listener=lambda p: p.done_bytes and has_some.set()) as pair:
        sending = in_thread(lambda: send_blobs(pair.client, [held.blob]))
        assert has_some.wait(20)
        pair.server.close(0)
        held.let_go.set()
        assert isinstance(sending.exception(20), LinkError)
    with pair_of(tmp_path) as pair:
        send_blobs(pair.client, [held.blob])
        assert held.began_at[-1] == MB
        assert place(pair, held.blob).read_bytes() == CONTENT


def test_corrupted_upload_is_deleted_and_named_on_both_ends(pair: Pair) -> None:
    blob = blob_of(CONTENT, sha256="ab" * 32)
    with pytest.raises(LinkError, match=r"^worker .*reports FormatError: .*sha256 is ") as caught:
        send_blobs(pair.client, [blob])
    assert "ab" * 32 in caught.value.message
    assert list((pair.folder / "sha256").iterdir()) == []
    assert "sha256 is" in pair.server.refusals[-1].message


def test_damaged_beginning_is_thrown_away_and_sent_anew(pair: Pair) -> None:
    blob = blob_of(CONTENT)
    part(pair, blob).parent.mkdir(parents=True)
    part(pair, blob).write_bytes(b"x" + CONTENT[1:MB])
    send_blobs(pair.client, [blob])
    assert place(pair, blob).read_bytes() == CONTENT
    assert "it is deleted" in pair.server.refusals[0].message


def test_home_throws_a_damaged_beginning_away_when_it_opens_a_session(pair: Pair) -> None:
    part_file, manifest = blob_of(CONTENT), blob_of(b"manifest")
    part(pair, part_file).parent.mkdir(parents=True)
    part(pair, part_file).write_bytes(b"x" + CONTENT[1:MB])
    heard: list[Event] = []
    files = PeerFiles(manifest, [part_file])
    peer = ServicePeer(
        pair.server.address, pair.home.identity, pair.worker.known, files, PATIENT, "service"
    )
    with pytest.raises(LinkError, match="does not say where it listens"):
        peer.open("ab" * 16, "worker", heard.append)
    peer.close("ab" * 16)
    assert place(pair, part_file).read_bytes() == CONTENT
    sent = [event for event in heard if isinstance(event, WorkProgress)]
    assert {event.total for event in sent} == {len(CONTENT) + len(b"manifest")}
    assert sent[-1].done == sent[-1].total


def test_damaged_blob_is_offered_as_missing_and_sent_anew(pair: Pair) -> None:
    blob = blob_of(CONTENT)
    send_blobs(pair.client, [blob])
    place(pair, blob).write_bytes(b"x" + CONTENT[1:])
    (state,) = pair.client.offer([offered(blob)])
    assert (state.there_bytes, state.is_whole) == (0, False)
    send_blobs(pair.client, [blob])
    assert place(pair, blob).read_bytes() == CONTENT


@pytest.mark.parametrize("there", [0, 1, MB, MB + 7, len(CONTENT), len(CONTENT) + 99])
def test_upload_continues_behind_whatever_is_there(pair: Pair, there: int) -> None:
    blob = blob_of(CONTENT)
    part(pair, blob).parent.mkdir(parents=True)
    part(pair, blob).write_bytes((CONTENT + bytes(99))[:there])
    send_blobs(pair.client, [blob])
    assert place(pair, blob).read_bytes() == CONTENT


def test_disk_that_fills_up_is_named_on_both_ends_and_the_upload_continues(pair: Pair) -> None:
    blob = blob_of(CONTENT)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2 * MB, limits[1]))  # the disk is full
    try:
        with pytest.raises(LinkError, match=r"^worker .*reports CapacityError: ") as caught:
            send_blobs(pair.client, [blob])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "free some space" in (caught.value.hint or "")
    assert "File too large" in pair.server.refusals[-1].message
    assert part(pair, blob).stat().st_size == 2 * MB
    send_blobs(pair.client, [blob])
    assert place(pair, blob).read_bytes() == CONTENT


def test_offer_without_room_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = os.statvfs(tmp_path)
    room = os.statvfs_result((1, 1, *tuple(status)[2:4], len(CONTENT) + 99, *tuple(status)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    blob = blob_of(CONTENT)
    with pair_of(tmp_path, margin_bytes=100) as pair:
        with pytest.raises(LinkError, match=r"^worker .*CapacityError: .* bytes free, .* needed"):
            send_blobs(pair.client, [blob])
        assert list((pair.folder / "sha256").iterdir()) == []
    with pair_of(tmp_path, margin_bytes=99) as pair:
        send_blobs(pair.client, [blob])
        assert place(pair, blob).is_file()


def test_uploads_that_run_count_as_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    receiver = BlobReceiver(tmp_path, margin_bytes=0)
    status = os.statvfs(tmp_path)
    room = os.statvfs_result((1, 1, *tuple(status)[2:4], 150, *tuple(status)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: room)
    first, second = (OfferedBlob(letter * 64, 100) for letter in "ab")
    receiver.offer("a", (first,))

    def chunks() -> Iterator[bytes]:
        with pytest.raises(CapacityError, match="150 bytes free, 200 needed"):
            receiver.offer("b", (second,))
        raise LinkError("enough")
        yield b""

    with pytest.raises(LinkError, match="enough"):
        receiver.receive("a", first.sha256, 0, chunks())
    receiver.offer("b", (second,))


def test_what_was_not_offered_cannot_be_uploaded(pair: Pair) -> None:
    blob, other = blob_of(b"one"), blob_of(b"two")
    with pytest.raises(LinkError, match=r"ConfigError: .* is not in the last offer of home"):
        pair.client.upload(blob, 0)
    pair.client.offer([offered(blob)])
    pair.client.offer([offered(other)])
    with pytest.raises(LinkError, match="is not in the last offer of home"):
        pair.client.upload(blob, 0)
    assert list((pair.folder / "sha256").iterdir()) == []


def test_worker_may_refuse_an_offer(pair: Pair) -> None:
    pair.handlers.failure = NO_ROOM
    with pytest.raises(LinkError, match="model needs 9 bytes"):
        send_blobs(pair.client, [blob_of(b"one")])


def test_blob_is_uploaded_once_at_a_time(tmp_path: Path) -> None:
    has_some = threading.Event()
    with pair_of(tmp_path, listener=lambda p: p.done_bytes and has_some.set()) as pair:
        held = Held(CONTENT)
        first = in_thread(lambda: send_blobs(pair.client, [held.blob]))
        assert has_some.wait(20)
        with pytest.raises(LinkError, match=r"another upload of .* is running"):
            pair.client.upload(blob_of(CONTENT), 0)
        held.let_go.set()
        first.result(20)
        assert place(pair, held.blob).read_bytes() == CONTENT


def test_source_that_cannot_be_read_is_the_error_at_home(pair: Pair) -> None:
    blob = blob_of(CONTENT)

    def read(offset: int) -> Iterator[bytes]:
        yield CONTENT[offset:MB]
        raise ConfigError("model.gguf: cannot read it")

    with pytest.raises(ConfigError, match=r"model\.gguf: cannot read it"):
        send_blobs(pair.client, [Blob(blob.sha256, blob.size_bytes, "gone", read)])
    send_blobs(pair.client, [blob])
    assert place(pair, blob).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("cut", "words"), [(-1, "LinkError: .*ended after"), (1, "FormatError: .*more than the")]
)
def test_source_of_another_length_is_refused(pair: Pair, cut: int, words: str) -> None:
    blob = blob_of(CONTENT)
    other = CONTENT[:cut] if cut < 0 else CONTENT + b"x"
    with pytest.raises(LinkError, match=words):
        send_blobs(pair.client, [Blob(blob.sha256, blob.size_bytes, "", blob_of(other).read)])


def test_upload_that_stalls_ends_on_the_worker_too(tmp_path: Path) -> None:
    limits = ServiceLimits(deadline_s=20.0, stall_s=0.2)
    with pair_of(tmp_path, limits) as pair:
        held = Held(CONTENT)
        pair.client.offer([offered(held.blob)])
        with (
            connect_service(
                pair.server.address, pair.home.identity, pair.worker.known, LIMITS
            ) as patient,
            pytest.raises(LinkError, match=r"LinkTimeout: nothing arrived for 0\.2 s"),
        ):
            patient.upload(held.blob, 0)
        held.let_go.set()


def test_worker_that_takes_nothing_is_a_timeout() -> None:
    home, worker = make_host("home"), make_host("worker")
    let_go = threading.Event()
    stuck = grpc.stream_unary_rpc_method_handler(lambda *_: let_go.wait(20) and b"{}")
    server = grpc.server(ThreadPoolExecutor(2))
    server.add_generic_rpc_handlers(
        [grpc.method_handlers_generic_handler(SERVICE, {"Upload": stuck})]
    )
    own = worker.identity
    port = server.add_secure_port(
        "127.0.0.1:0",
        grpc.ssl_server_credentials(
            [(own.key_pem, own.certificate_pem)], home.identity.certificate_pem, True
        ),
    )
    server.start()
    limits = ServiceLimits(stall_s=0.3)
    try:
        with (
            connect_service(f"127.0.0.1:{port}", home.identity, worker.known, limits) as client,
            pytest.raises(LinkTimeout, match=r"^worker .*takes no more of an upload"),
        ):
            client.upload(blob_of(bytes(40 * MB)), 0)
    finally:
        let_go.set()
        server.stop(0).wait()


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "Upload: .*not JSON"),
        ([b"{}"], "begin_bytes is not a number"),
        ([b'{"begin_bytes": 0, "sha256": "../x"}'], "64 hexadecimal digits"),
        ([b'{"begin_bytes": 5, "sha256": "%s"}'], "0 bytes are there, the upload begins after 5"),
        ([b'{"begin_bytes": 0, "sha256": "%s"}', bytes(CHUNK_BYTES + 1)], "a piece of 1,048,577"),
        ([b'{"begin_bytes": 0, "sha256": "%s"}', b""], "ended after 0 of"),
    ],
)
def test_upload_that_breaks_the_rules_is_refused(
    pair: Pair, messages: list[bytes], words: str
) -> None:
    blob = blob_of(CONTENT)
    pair.client.offer([offered(blob)])
    filled = [message.replace(b"%s", blob.sha256.encode()) for message in messages]
    with pair.raw() as channel, pytest.raises(grpc.RpcError):
        channel.stream_unary(path_of("Upload"))(iter(filled), timeout=20, metadata=own_versions())
    with pytest.raises(LinkError, match=words):
        raise pair.server.refusals[-1]


@pytest.mark.parametrize(
    "answer",
    [
        {"blobs": []},
        {"blobs": [{"there_bytes": 4, "is_whole": False}]},
        {"blobs": [{"there_bytes": 0, "is_whole": 1}]},
        {"blobs": [{"there_bytes": "0", "is_whole": True}]},
        {},
    ],
)
def test_answer_that_is_none_to_the_offer_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, answer: dict[str, object]
) -> None:
    monkeypatch.setattr("edgert.hosts.service.calls.encode_states", lambda _: encode(answer))
    with pytest.raises(LinkError, match=r"^worker "):
        pair.client.offer([offered(blob_of(b"one"))])
