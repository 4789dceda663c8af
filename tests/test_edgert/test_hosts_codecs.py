"""Hidden states between hosts: written in the codec that the manifest gives a link."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import edgert.models
from builders_manifest import edited, manifest, shared, two_hosts
from edgert.errors import FormatError, LinkError
from edgert.hosts.frames import FrameKind
from edgert.hosts.hidden_states import F32, TAG_BYTES, join_hidden, read_hidden, write_hidden
from edgert.hosts.memory_link import memory_pair
from edgert.hosts.remote_part import Codecs, RemotePart
from edgert.hosts.stage_parts import codecs_of
from edgert.hosts.steps import Step, result_bytes
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from hosts_parts import Hosts, options, stages
from partition.manifest_file import violations
from quant.activations.settings import CodecSettings
from quant.parts.spec import PartSpec

TINY = Path(edgert.models.__file__).parent / "tiny-chat.gguf"
N_LAYER, N_EMBD = 8, 256
F16 = CodecSettings(kind="f16")
ADAPTIVE = CodecSettings(bound=0.02)
HEADER = 20
RNG = np.random.default_rng(7)
ROWS = RNG.standard_normal((5, 64)).astype(np.float32)


@pytest.fixture(scope="module")
def alone() -> Iterator[Backend]:
    with closing(open_backend(options(TINY))) as backend:
        yield backend


def edge_cloud(folder: Path, codecs: Codecs) -> Hosts:
    parts = [
        (PartSpec(0, 3, embedding=False, head="none"), True),
        (PartSpec(3, N_LAYER, embedding=False, head="none"), False),
        (PartSpec(N_LAYER, N_LAYER, embedding=False, head="whole"), True),
    ]
    return stages(TINY, parts, folder, codecs)


@pytest.mark.parametrize("codec", [F32, F16, ADAPTIVE], ids=lambda codec: codec.kind)
def test_rows_come_back_within_the_codecs_error(codec: CodecSettings) -> None:
    payload = b"".join(map(bytes, write_hidden(ROWS, codec)))
    found = read_hidden(payload, 5, 64, codec)
    error = np.linalg.norm(found - ROWS, axis=1) / np.linalg.norm(ROWS, axis=1)
    assert error.max() <= {"f32": 0.0, "f16": 2.0**-11, "adaptive": 0.02}[codec.kind]


def test_several_messages_are_read_as_one_and_none_may_lie_about_its_tokens() -> None:
    first = b"".join(map(bytes, write_hidden(ROWS[:2], F16)))
    plain = b"".join(map(bytes, write_hidden(ROWS[2:])))
    payload = join_hidden([(2, first), (3, plain)])
    found = read_hidden(payload, 5, 64, F16)
    assert np.array_equal(found[2:], ROWS[2:])
    assert np.array_equal(found[:2], ROWS[:2].astype(np.float16))
    wrong = [
        payload[:-1],
        payload + b"x",
        join_hidden([(2, first)]),
        join_hidden([(2, first), (4, plain)]),
        join_hidden([(2, first), (3, join_hidden([(3, plain)]))]),
    ]
    for content in wrong:
        with pytest.raises(FormatError):
            read_hidden(content, 5, 64, F16)


@pytest.mark.parametrize(
    "payload",
    [b"", b"\1\0\0", b"\2\0\0\0" + bytes(1280), b"\1\7\0\0" + bytes(1280),
     b"\1\0\1\0" + bytes(1280), b"\1\0\0\0" + bytes(1279), b"\1\1\0\0" + bytes(641)],
)  # fmt: skip
def test_rows_of_other_versions_kinds_and_lengths_are_refused(payload: bytes) -> None:
    with pytest.raises(FormatError):
        read_hidden(payload, 5, 64, F16)


def test_a_lossy_codec_is_taken_only_where_the_manifest_gives_it() -> None:
    payload = b"".join(map(bytes, write_hidden(ROWS, F16)))
    with pytest.raises(FormatError, match="codec adaptive"):
        read_hidden(payload, 5, 64, ADAPTIVE)
    with pytest.raises(FormatError, match="codec f32"):
        read_hidden(payload, 5, 64, F32)


def test_rows_that_cannot_be_read_are_the_peers_fault() -> None:
    home, host = memory_pair(("home", "board"))
    part = RemotePart(home, 64, to_hidden=True, codecs=Codecs(F16, F16))
    step = Step(1, 0, 5, 5)
    part.start(step, ROWS)
    host.receive()
    host.send(FrameKind.RESULT, result_bytes(1), *write_hidden(ROWS, ADAPTIVE))
    with pytest.raises(LinkError, match="board: sent rows as adaptive"):
        part.finish(step, np.empty((5, 64), np.float32))


@pytest.mark.model
def test_every_byte_on_a_link_of_halves_is_accounted_for(tmp_path: Path) -> None:
    with closing(edge_cloud(tmp_path, Codecs(F16, F16))) as hosts:
        link = hosts.links[0]
        sent, received = link.sent_bytes, link.received_bytes
        hosts.backend.decode([7], 0, 1)
        states = TAG_BYTES + 1 + 2 * N_EMBD  # a codec's own first byte
        assert link.sent_bytes - sent == HEADER + struct.calcsize("6I") + states
        assert link.received_bytes - received == HEADER + struct.calcsize("I") + states


@pytest.mark.model
@pytest.mark.parametrize(("codec", "most"), [(F16, 0.02), (ADAPTIVE, 0.15)])
def test_a_lossy_link_moves_logits_by_little(
    codec: CodecSettings, most: float, alone: Backend, tmp_path: Path
) -> None:
    prompt = list(range(300, 316))
    alone.truncate(0)
    wanted = alone.decode(prompt, 0, 1).copy()
    with closing(edge_cloud(tmp_path, Codecs(codec, codec))) as hosts:
        found = hosts.backend.decode(prompt, 0, 1)
        moved = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
        assert 0 < moved <= most
        f32_bytes = 4 * N_EMBD * len(prompt)
        assert hosts.links[0].sent_bytes < 0.52 * f32_bytes


def test_codecs_of_a_stage_follow_from_the_transports_around_it() -> None:
    made = edited(two_hosts(), "transport.0.codec", "adaptive")
    made = edited(made, "transport.0.bound", 0.05)
    found = manifest(made)
    assert codecs_of(found, found.stages[1]) == Codecs(CodecSettings(bound=0.05), F16)
    assert codecs_of(found, found.stages[0]) == Codecs(F16, CodecSettings(bound=0.05))


@pytest.mark.parametrize(
    ("made", "path", "value", "at"),
    [
        (two_hosts(), "transport.0.codec", "adaptive", "$.transport[0].bound"),
        (two_hosts(), "transport.0.bound", 0.1, "$.transport[0].bound"),
        (shared(), "transport.0.codec", "f16", "$.transport[0].codec"),
    ],
)
def test_a_codec_without_its_bound_or_between_shares_breaks_a_rule(
    made: dict[str, object], path: str, value: object, at: str
) -> None:
    found = manifest(edited(made, path, value))
    assert at in {broken.path for broken in violations(found)}
