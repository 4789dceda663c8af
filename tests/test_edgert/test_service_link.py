"""Links over a stream: the same frames and checks as over TLS, and nothing lost at the end."""

from __future__ import annotations

import random
import struct
import threading
from binascii import crc32
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from edgert.errors import CapacityError, LinkError, LinkTimeout
from edgert.hosts.frames import HEADER_BYTES, FrameKind, encode_header
from edgert.hosts.link import Link, LinkLimits
from edgert.hosts.service import ServiceLimits
from edgert.hosts.service.stream_link import Outgoing
from host_identities import in_thread
from service_hosts import MB, Pair, eventually, pair_of

N_MUTATED = 200


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with pair_of(tmp_path) as pair:
        yield pair


@pytest.mark.parametrize("n_bytes", [0, 1, 8192, 16 << 10, (64 << 10) + 1, MB])
def test_payloads_of_any_size_come_back_as_they_were(pair: Pair, n_bytes: int) -> None:
    content = random.Random(n_bytes).randbytes(n_bytes)
    link = pair.client.run()
    for _ in range(3):
        link.send(FrameKind.STEP, content)
        assert link.receive().payload == content
    target = bytearray(n_bytes)
    link.send(FrameKind.STEP, content)
    assert link.receive_into(FrameKind.RESULT, target) == n_bytes
    assert target == content
    link.close()
    assert pair.handlers.run_ended.wait(20)
    assert pair.handlers.run_error is None


def test_what_was_sent_before_closing_arrives(pair: Pair) -> None:
    received: list[int] = []

    def count(link: Link) -> None:
        while (frame := link.receive()).kind is not FrameKind.BYE:
            received.append(len(frame.payload))

    pair.handlers.run_with = count
    link = pair.client.run()
    for _ in range(12):
        link.send(FrameKind.TENSOR, bytes(MB))
    link.close()
    assert pair.handlers.run_ended.wait(20)
    assert received == [MB] * 12
    assert pair.handlers.run_error is None


def test_what_a_worker_sent_before_leaving_arrives(pair: Pair) -> None:
    def speak(link: Link) -> None:
        for _ in "123":
            link.send(FrameKind.RESULT, bytes(MB))

    pair.handlers.run_with = speak
    link = pair.client.run()
    assert [len(link.receive().payload) for _ in "123"] == [MB] * 3
    assert link.receive().kind is FrameKind.BYE


def test_error_of_a_worker_is_raised_at_home_with_its_words(pair: Pair) -> None:
    def fail(link: Link) -> None:
        link.receive()
        raise CapacityError("9 bytes needed", hint="lower --context")

    pair.handlers.run_with = fail
    link = pair.client.run()
    link.send(FrameKind.STEP)
    with pytest.raises(LinkError, match=r"^worker .*reports CapacityError: 9 bytes") as caught:
        link.receive()
    assert caught.value.hint == "lower --context"
    eventually(lambda: bool(pair.server.refusals))
    assert "Run: 9 bytes needed" in pair.server.refusals[-1].message


def test_giving_up_at_home_is_told_to_the_worker(pair: Pair) -> None:
    link = pair.client.run()
    link.fail(CapacityError("out of memory at home"))
    assert pair.handlers.run_ended.wait(20)
    assert "reports CapacityError: out of memory at home" in str(pair.handlers.run_error)


def test_silence_of_a_worker_is_a_timeout_at_home(pair: Pair) -> None:
    link = pair.client.run()
    with pytest.raises(LinkTimeout, match=r"^worker .*is silent"):
        link.receive(0.2)
    assert pair.handlers.run_ended.wait(20)
    assert isinstance(pair.handlers.run_error, LinkError)


def test_silence_of_home_is_a_timeout_on_the_worker(tmp_path: Path) -> None:
    with pair_of(tmp_path, ServiceLimits(link=LinkLimits(deadline_s=0.2))) as pair:
        link = pair.client.run()
        with pytest.raises(LinkError, match=r"^worker .*reports LinkTimeout: home .*is silent"):
            link.receive(20)
        assert isinstance(pair.handlers.run_error, LinkTimeout)


def send_until_refused(link: Link) -> None:
    """Send more than any buffer holds."""
    while True:
        link.send(FrameKind.TENSOR, bytes(MB))


def test_peer_that_takes_nothing_is_a_timeout(tmp_path: Path) -> None:
    limits = ServiceLimits(link=LinkLimits(deadline_s=0.3))
    with pair_of(tmp_path, limits) as pair:
        hold = threading.Event()
        pair.handlers.run_with = lambda _: (hold.wait(20), None)[1]
        link = pair.client.run()
        with pytest.raises(LinkTimeout, match=r"^worker .*takes no TENSOR"):
            send_until_refused(link)
        hold.set()


def test_stopping_worker_wakes_both_directions(pair: Pair) -> None:
    pair.handlers.run_with = lambda _: (pair.handlers.let_go.wait(20), None)[1]
    link = pair.client.run()
    reading = in_thread(link.receive)
    writing = in_thread(lambda: send_until_refused(link))
    pair.server.close(0)
    for waiting in (reading, writing):
        error = waiting.exception(20)
        assert isinstance(error, LinkError)
        assert not isinstance(error, LinkTimeout)
        assert error.message.startswith("worker (127.0.0.1:")
    pair.handlers.let_go.set()


def test_closed_client_wakes_a_worker_that_waits(pair: Pair) -> None:
    link = pair.client.run()
    link.send(FrameKind.STEP)
    link.receive()
    pair.client.close()
    assert pair.handlers.run_ended.wait(20)
    assert isinstance(pair.handlers.run_error, LinkError)
    assert not isinstance(pair.handlers.run_error, LinkTimeout)
    with pytest.raises(LinkError):
        link.receive()


def test_both_ends_send_at_once_without_waiting_for_each_other(pair: Pair) -> None:
    def flood(link: Link) -> None:
        for _ in range(20):
            link.send(FrameKind.RESULT, bytes(MB))
        for _ in range(20):
            link.receive()

    pair.handlers.run_with = flood
    link = pair.client.run()
    sending = in_thread(lambda: [link.send(FrameKind.STEP, bytes(MB)) for _ in range(20)])
    assert [len(link.receive().payload) for _ in range(20)] == [MB] * 20
    sending.result(20)
    link.close()
    assert pair.handlers.run_ended.wait(20)
    assert pair.handlers.run_error is None


def flip(content: bytes, rng: random.Random) -> bytes:
    """Change one to four bytes of the header to other ones."""
    changed = bytearray(content)
    for position in rng.sample(range(HEADER_BYTES), rng.randint(1, 4)):
        changed[position] ^= rng.randint(1, 255)
    return bytes(changed)


def forge(content: bytes, rng: random.Random) -> bytes:
    """Change one field so that the checksum holds, as a peer gone bad would."""
    fields = bytearray(content[: HEADER_BYTES - 4])
    offset, code, values = rng.choice(
        (
            (4, "<B", range(2, 256)),
            (5, "<B", range(len(FrameKind) + 1, 256)),
            (6, "<H", range(1, 1 << 16)),
            (8, "<I", range(1, 1 << 32)),
            (12, "<I", range((1 << 20) + 1, 1 << 32)),
        )
    )
    struct.pack_into(code, fields, offset, rng.choice(values))
    return bytes(fields) + struct.pack("<I", crc32(fields)) + content[HEADER_BYTES:]


def lengthen(content: bytes, rng: random.Random) -> bytes:
    """Put bytes before the frame."""
    return rng.randbytes(rng.randint(HEADER_BYTES, 40)) + content


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, forge, lengthen)


def test_mutated_frames_are_refused_and_the_sender_is_told_why(pair: Pair) -> None:
    rng = random.Random(22)
    good = encode_header(FrameKind.TENSOR, 0, 7) + b"payload"
    for _ in range(N_MUTATED):
        pair.handlers.run_ended.clear()
        link = pair.client.run()
        channel = link._channel  # to send what no link sends
        channel.write(rng.choice(MUTATIONS)(good, rng), float("inf"))
        with pytest.raises(LinkError, match=r"^worker .*reports LinkError: broke the protocol: "):
            link.receive()
        assert pair.handlers.run_ended.wait(20)
        assert isinstance(pair.handlers.run_error, LinkError)
        link.close()


def test_cut_frame_is_an_error(pair: Pair) -> None:
    link = pair.client.run()
    link._channel.write((encode_header(FrameKind.TENSOR, 0, 7) + b"pay"), float("inf"))
    link._channel.close()
    assert pair.handlers.run_ended.wait(20)
    assert "closed the connection" in str(pair.handlers.run_error)


def test_small_writes_leave_together_and_large_ones_in_pieces() -> None:
    outgoing = Outgoing()
    for piece in (b"a", b"bc", bytes(MB), bytes(2 * MB + 1)):
        outgoing.put(piece, float("inf"))
    outgoing.finish()
    assert [len(message) for message in outgoing] == [3, MB, MB, MB, 1]
    with pytest.raises(BrokenPipeError):
        outgoing.put(b"late", float("inf"))
    assert outgoing.wait_until_empty(0.0)


def test_full_queue_takes_no_more_and_keeps_its_order() -> None:
    outgoing = Outgoing()
    with pytest.raises(TimeoutError):
        outgoing.put(bytes(9 * MB), 0.0)
    taken = [next(outgoing) for _ in range(4)]
    assert sum(map(len, taken)) == 4 * MB
    outgoing.abort("gone")
    with pytest.raises(BrokenPipeError, match="gone"):
        outgoing.put(b"late", float("inf"))
