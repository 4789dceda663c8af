"""Frames that were changed: none is accepted, none crashes, none makes a link allocate."""

from __future__ import annotations

import contextlib
import random
import socket
import struct
import tracemalloc
from binascii import crc32
from collections.abc import Callable

import pytest

from edgert.errors import LinkError
from edgert.hosts.framed_link import FramedLink
from edgert.hosts.frames import HEADER_BYTES, FrameKind, encode_header
from edgert.hosts.hello import Terms
from edgert.hosts.link import LinkLimits
from edgert.hosts.listener import listen
from edgert.hosts.memory_link import memory_channels
from edgert.hosts.tls_link import connect
from host_identities import PATIENT, in_thread, make_host

N_MEMORY = 10_000
N_TLS = 300
MOST_BYTES = 64 << 10
LIMITS = LinkLimits(payload_bytes=MOST_BYTES, deadline_s=20.0, handshake_s=20.0)
SIZES = (1, 255, 4096, 65_537, 1 << 20, 1 << 30, (1 << 30) + 1, 0x7FFFFFFF, 0xFFFFFFFF)


def frame(kind: FrameKind, sequence: int, payload: bytes = b"") -> bytes:
    return encode_header(kind, sequence, len(payload)) + payload


def rewritten(content: bytes, offset: int, code: str, value: int) -> bytes:
    """Change a field of a header and make its checksum fit again."""
    fields = bytearray(content[: HEADER_BYTES - 4])
    struct.pack_into(code, fields, offset, value)
    return bytes(fields) + struct.pack("<I", crc32(fields)) + content[HEADER_BYTES:]


def flip(content: bytes, rng: random.Random) -> bytes:
    """Change one to four bytes of the header to other ones."""
    changed = bytearray(content)
    for position in rng.sample(range(HEADER_BYTES), rng.randint(1, 4)):
        changed[position] ^= rng.randint(1, 255)
    return bytes(changed)


def forge(content: bytes, rng: random.Random) -> bytes:
    """Change one field so that the checksum holds, as a peer gone bad would."""
    sequence = struct.unpack_from("<I", content, 8)[0]
    gap = (sequence + rng.choice((1, 2, 1 << 31, rng.randrange(1, 1 << 32)))) % (1 << 32)
    size = rng.choice([n for n in SIZES if n > MOST_BYTES])
    kind = rng.choice([n for n in range(256) if n == 0 or n > max(FrameKind)])
    version = rng.choice([n for n in range(256) if n != 1])
    small = rng.choice((FrameKind.HELLO, FrameKind.PING, FrameKind.ERROR, FrameKind.BYE))
    large = rewritten(rewritten(content, 5, "<B", small), 12, "<I", rng.choice(SIZES[3:]))
    return rng.choice(
        (
            lambda: rewritten(content, 0, "<I", rng.randrange(1 << 24)),
            lambda: rewritten(content, 4, "<B", version),
            lambda: rewritten(content, 5, "<B", kind),
            lambda: rewritten(content, 6, "<H", rng.randrange(1, 1 << 16)),
            lambda: rewritten(content, 8, "<I", gap if gap != sequence else sequence ^ 1),
            lambda: rewritten(content, 12, "<I", size),
            lambda: large,
        )
    )()


def shorten(content: bytes, rng: random.Random) -> bytes:
    """Leave out the end, or some bytes of the beginning."""
    if rng.random() < 0.5:
        return content[: rng.randrange(len(content))]
    return content[rng.randrange(1, HEADER_BYTES) :]


def lengthen(content: bytes, rng: random.Random) -> bytes:
    """Put bytes before the frame."""
    return rng.randbytes(rng.randint(1, 40)) + content


MUTATIONS: tuple[Callable[[bytes, random.Random], bytes], ...] = (flip, forge, shorten, lengthen)


def test_ten_thousand_mutated_frames_are_all_refused() -> None:
    rng = random.Random(20)
    for _ in range(N_MEMORY):
        near, far = memory_channels()
        link = FramedLink(near, "bad", LIMITS)
        n_good = rng.randrange(3)
        payloads = [rng.randbytes(rng.randrange(64)) for _ in range(n_good + 1)]
        good = [frame(FrameKind.TENSOR, i, payload) for i, payload in enumerate(payloads)]
        mutated = rng.choice(MUTATIONS)(good.pop(), rng)
        far.write(b"".join((*good, mutated)), float("inf"))
        far.close()
        for payload in payloads[:n_good]:
            assert link.receive().payload == payload
        with pytest.raises(LinkError, match=r"^bad: ") as first:
            link.receive()
        with pytest.raises(LinkError) as second:  # a link that failed stays failed
            link.send(FrameKind.PING)
        assert second.value.message == first.value.message


def test_sizes_that_are_refused_are_not_allocated() -> None:
    contents = [rewritten(frame(FrameKind.TENSOR, 0), 12, "<I", size) for size in SIZES[3:]]
    tracemalloc.start()
    try:
        for content in contents:
            near, far = memory_channels()
            link = FramedLink(near, "bad", LIMITS)
            far.write(content, float("inf"))
            with pytest.raises(LinkError, match=r"bytes, wanted 65,536 at most"):
                link.receive()
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_frames_of_a_kind_that_is_not_wanted_are_not_taken_for_it() -> None:
    for kind in FrameKind:
        near, far = memory_channels()
        link = FramedLink(near, "bad", LIMITS)
        far.write(frame(kind, 0), float("inf"))
        far.close()
        target = bytearray(b"unchanged")
        if kind is FrameKind.RESULT:
            assert link.receive_into(FrameKind.RESULT, target) == 0
        else:
            with pytest.raises(LinkError):
                link.receive_into(FrameKind.RESULT, target)
        assert target == b"unchanged"


def test_payload_larger_than_the_buffer_is_refused_untouched() -> None:
    near, far = memory_channels()
    link = FramedLink(near, "bad", LIMITS)
    far.write(frame(FrameKind.TENSOR, 0, b"x" * 10), float("inf"))
    target = bytearray(9)
    with pytest.raises(LinkError, match="TENSOR of 10 bytes, wanted TENSOR of 9 at most"):
        link.receive_into(FrameKind.TENSOR, target)
    assert target == bytes(9)


def test_trusted_peer_gone_bad_is_refused_over_tls_and_told_why() -> None:
    rng = random.Random(21)
    hub, worker = make_host("hub"), make_host("worker")
    listener = listen("127.0.0.1:0", hub.identity, [worker.known], Terms("hub"), LIMITS)
    told = 0
    for _ in range(N_TLS):
        link = connect(listener.address, worker.identity, hub.known, Terms("worker"), LIMITS)
        accepted = listener.accept().link
        # HELLO was the worker's frame 0.
        whole = frame(FrameKind.TENSOR, 1, b"payload")
        mutated = rng.choice(MUTATIONS)(whole, rng)
        channel = link._channel  # type: ignore[attr-defined] - to send what no link sends
        channel.write(mutated, float("inf"))
        if len(mutated) < len(whole):  # the rest never comes
            channel.close()
        waiting = in_thread(lambda link=link: link.receive())  # type: ignore[misc]
        with pytest.raises(LinkError, match=r"^worker \(127\.0\.0\.1:"):
            accepted.receive()
        error = waiting.exception(10)
        assert isinstance(error, LinkError)
        told += "reports LinkError: broke the protocol: " in error.message
        link.close()
    listener.close()
    assert told > N_TLS // 2


class Relay:
    """Passes bytes on between a client and a server, after changing one of them."""

    def __init__(self, target: str, rng: random.Random) -> None:
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        self._target = target
        self._rng = rng
        self.armed = False

    def run(self) -> None:
        with self._server, self._server.accept()[0] as near:
            host, _, port = self._target.rpartition(":")
            with socket.create_connection((host, int(port))) as far:
                back = in_thread(lambda: self._pass(far, near, change=False))
                self._pass(near, far, change=True)
                back.result(10)

    def _pass(self, source: socket.socket, target: socket.socket, *, change: bool) -> None:
        try:
            while content := bytearray(source.recv(1 << 16)):
                if change and self.armed:
                    content[self._rng.randrange(len(content))] ^= self._rng.randint(1, 255)
                target.sendall(content)
        except OSError:
            return
        finally:
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_WR)


def test_bytes_changed_on_the_way_are_refused() -> None:
    rng = random.Random(22)
    hub, worker = make_host("hub"), make_host("worker")
    listener = listen("127.0.0.1:0", hub.identity, [worker.known], Terms("hub"), PATIENT)
    limits = LinkLimits(payload_bytes=1 << 20, deadline_s=1.0, handshake_s=20.0)
    for _ in range(60):
        relay = Relay(listener.address, rng)
        done = in_thread(relay.run)
        link = connect(relay.address, worker.identity, hub.known, Terms("worker"), limits)
        accepted = listener.accept().link
        relay.armed = True
        link.send(FrameKind.TENSOR, rng.randbytes(100))
        with pytest.raises(LinkError):
            accepted.receive(1.0)
        link.close()
        accepted.close()
        done.result(10)
    listener.close()
