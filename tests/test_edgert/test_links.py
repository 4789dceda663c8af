"""Links in memory and over TLS: what arrives, who is gone, and what each end is told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from edgert.errors import CapacityError, LinkError, LinkTimeout
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.frames import FrameKind
from edgert.hosts.hello import Terms
from edgert.hosts.link import Link, LinkLimits
from edgert.hosts.listener import listen
from edgert.hosts.memory_link import memory_channels, memory_pair
from edgert.hosts.tls_link import connect
from host_identities import PATIENT, SHORT, Host, in_thread, make_host

if TYPE_CHECKING:
    from typing_extensions import Buffer

ANY = "127.0.0.1:0"
HUB, WORKER = Terms("hub", peer_role="worker"), Terms("worker", peer_role="hub")
Pair = tuple[Link, Link]
Pairs = Callable[[LinkLimits], Pair]


@pytest.fixture(scope="module")
def hub() -> Host:
    return make_host("hub")


@pytest.fixture(scope="module")
def worker() -> Host:
    return make_host("worker")


@pytest.fixture(params=["memory", "tls"])
def pairs(request: pytest.FixtureRequest, hub: Host, worker: Host) -> Iterator[Pairs]:
    """Make two ends of a link: the first one's peer is called far, the second one's near."""
    opened: list[Link] = []

    def make(limits: LinkLimits = PATIENT) -> Pair:
        if request.param == "memory":
            ends: Pair = memory_pair(limits=limits)
        else:
            with closing(listen(ANY, hub.identity, [worker.known], HUB, limits)) as listener:
                near = connect(listener.address, worker.identity, hub.known, WORKER, limits)
                ends = near, listener.accept(20).link
        opened.extend(ends)
        return ends

    yield make
    for link in opened:
        link.close()


def test_frames_arrive_whole_in_order_and_are_counted(pairs: Pairs) -> None:
    near, far = pairs(PATIENT)
    sizes = [0, 1, 8192, 16_364, 16_365, 65_516, 65_517, 300_000, 1 << 20, 5]
    payloads = [bytes((size % 251,)) * size for size in sizes]
    before = near.sent_bytes
    sent = in_thread(lambda: [near.send(FrameKind.TENSOR, payload) for payload in payloads])
    for payload in payloads:
        frame = far.receive()
        assert (frame.kind, bytes(frame.payload)) == (FrameKind.TENSOR, payload)
    sent.result(20)
    assert near.sent_bytes - before == sum(sizes) + 20 * len(sizes)
    assert far.received_bytes == near.sent_bytes


def test_parts_are_one_payload_and_arrays_go_as_they_lie(pairs: Pairs) -> None:
    near, far = pairs(PATIENT)
    array = np.arange(60_000, dtype=np.float32).reshape(3, -1)
    empty = np.empty((0, 4), np.float16)
    parts = (b"ab", empty, array, memoryview(b"cd" * 9000), bytearray(b"e"))
    whole = b"".join((b"ab", array.tobytes(), b"cd" * 9000, b"e"))
    sent = in_thread(lambda: near.send(FrameKind.STEP, *parts))
    assert bytes(far.receive().payload) == whole
    sent.result(20)
    target = np.zeros_like(array)
    sent = in_thread(lambda: near.send(FrameKind.TENSOR, array))
    assert far.receive_into(FrameKind.TENSOR, target) == array.nbytes
    assert np.array_equal(target, array)


def test_both_directions_flow_at_once(pairs: Pairs) -> None:
    near, far = pairs(PATIENT)
    payload = bytes(700_000)

    def flow(link: Link) -> int:
        sending = in_thread(lambda: [link.send(FrameKind.TENSOR, payload) for _ in range(12)])
        total = sum(len(link.receive().payload) for _ in range(12))
        sending.result(20)
        return total

    other = in_thread(lambda: flow(far))
    assert flow(near) == other.result(20) == 12 * len(payload)


def test_signs_of_life_are_answered_and_not_seen(pairs: Pairs) -> None:
    near, far = pairs(PATIENT)
    for _ in range(3):
        near.send(FrameKind.PING)
    near.send(FrameKind.STEP, b"x")
    before = far.sent_bytes
    assert far.receive() == (FrameKind.STEP, b"x")
    assert far.sent_bytes - before == 3 * 20  # PONG has no payload
    far.send(FrameKind.RESULT, b"y")
    target = bytearray(1)
    assert near.receive_into(FrameKind.RESULT, target) == 1
    assert target == b"y"


def test_goodbye_is_a_frame_for_who_waits_for_any_and_an_error_for_who_needs_one(
    pairs: Pairs,
) -> None:
    near, far = pairs(PATIENT)
    near.close()
    near.close()
    assert far.receive().kind is FrameKind.BYE
    with pytest.raises(LinkError, match="closed the connection, awaited a frame"):
        far.receive()
    near, far = pairs(PATIENT)
    near.close()
    with pytest.raises(LinkError, match="left while TENSOR was awaited"):
        far.receive_into(FrameKind.TENSOR, bytearray(9))
    with pytest.raises(LinkError, match="the link is closed"):
        near.send(FrameKind.STEP)


def test_peer_is_told_why_this_side_gives_up(pairs: Pairs) -> None:
    near, far = pairs(PATIENT)
    waiting = in_thread(far.receive)
    near.fail(CapacityError("no room for layers", hint="add memory"))
    error = waiting.exception(20)
    assert isinstance(error, LinkError)
    assert "reports CapacityError: no room for layers" in error.message
    assert error.message.startswith(far.peer)
    assert error.hint == "add memory"
    with pytest.raises(LinkError, match="given up: no room for layers"):
        near.receive()


def test_silent_peer_is_a_timeout_that_names_what_was_awaited(pairs: Pairs) -> None:
    near, far = pairs(SHORT)
    with pytest.raises(LinkTimeout, match=r"is silent, awaited TENSOR for 0\.0\d+ s") as caught:
        near.receive_into(FrameKind.TENSOR, bytearray(9), 0.05)
    assert caught.value.message.startswith(near.peer)
    with pytest.raises(LinkTimeout, match="is silent, awaited TENSOR"):
        near.receive()
    with pytest.raises(LinkError):
        far.receive()


def test_peer_without_signs_of_life_is_gone_before_the_deadline(pairs: Pairs) -> None:
    near, _ = pairs(replace(PATIENT, silence_s=0.1))
    with pytest.raises(LinkTimeout, match=r"is silent, awaited a frame for 0\.1"):
        near.receive(1e9)


def test_signs_of_life_keep_a_slow_peer_until_the_deadline(pairs: Pairs) -> None:
    near, far = pairs(replace(PATIENT, silence_s=1.0))
    stop = threading.Event()

    def live() -> None:
        while not stop.wait(0.05):
            far.send(FrameKind.PING)

    living = in_thread(live)
    with pytest.raises(LinkTimeout, match=r"is silent, awaited a frame for 1\.[5-9]"):
        near.receive(1.5)
    stop.set()
    assert isinstance(living.exception(20), LinkError | None)


def test_peer_that_takes_nothing_is_a_timeout(pairs: Pairs) -> None:
    near, _ = pairs(SHORT)

    def send() -> None:
        while True:
            near.send(FrameKind.TENSOR, bytes(1 << 20))

    with pytest.raises(LinkTimeout, match="takes no TENSOR for"):
        send()


def test_frames_beyond_the_link_are_the_callers_mistake(pairs: Pairs) -> None:
    near, far = pairs(SHORT)
    with pytest.raises(ValueError, match="TENSOR of 1,048,577 bytes, 1,048,576 at most"):
        near.send(FrameKind.TENSOR, bytes((1 << 20) + 1))
    near.send(FrameKind.STEP, b"still there")
    assert bytes(far.receive().payload) == b"still there"


def test_parts_that_do_not_lie_in_one_piece_are_the_callers_mistake(pairs: Pairs) -> None:
    near, far = pairs(PATIENT)
    columns = np.zeros((200, 200), np.float32)[:, ::2]
    with pytest.raises(ValueError, match="does not lie in one piece"):
        near.send(FrameKind.TENSOR, b"first", columns)
    near.send(FrameKind.STEP, b"whole")
    assert bytes(far.receive().payload) == b"whole"


class _Interrupted(FramedLink):
    """Is interrupted, as by Ctrl-C, in the middle of a large frame."""

    def _write_large(self, header: bytes, parts: tuple[Buffer, ...], until_s: float) -> None:
        del parts
        self._channel.write(header, until_s)
        raise KeyboardInterrupt


def test_frame_that_was_interrupted_is_the_last_one() -> None:
    near, far = memory_channels()
    sender, receiver = _Interrupted(near, "far"), FramedLink(far, "near")
    with pytest.raises(KeyboardInterrupt):
        sender.send(FrameKind.TENSOR, bytes(20_000))
    with pytest.raises(LinkError, match="far: interrupted while TENSOR was sent"):
        sender.send(FrameKind.STEP, bytes(20_000))
    with pytest.raises(LinkError, match="near: closed the connection, awaited TENSOR"):
        receiver.receive()


def test_closing_wakes_the_thread_that_receives(pairs: Pairs) -> None:
    near, _ = pairs(PATIENT)
    waiting = in_thread(near.receive)
    near.close()
    assert isinstance(waiting.exception(20), LinkError)


def test_sequence_begins_again_after_the_last_number() -> None:
    near, far = memory_channels()
    sender, receiver = FramedLink(near, "far"), FramedLink(far, "near")
    sender._n_sent = receiver._n_received = (1 << 32) - 1
    for content in (b"last", b"first"):
        sender.send(FrameKind.STEP, content)
        assert bytes(receiver.receive().payload) == content


def test_limits_are_positive() -> None:
    for wrong in ({"deadline_s": 0.0}, {"payload_bytes": 1 << 31}, {"silence_s": -1.0}):
        with pytest.raises(ValueError, match="wanted positive"):
            LinkLimits(**wrong)
