"""Saved sessions: resumed whole, refused when damaged, never lost."""

from __future__ import annotations

import hashlib
import json
import resource
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgert.engine import Engine, EngineSettings
from edgert.errors import ConfigError, EdgertError, FormatError
from edgert.sampling import SamplingParams
from edgert.sessions import MAGIC, ModelIdentity, Session, load_session, save_session
from edgert.token_cache import TokenCache
from fakes import TEMPLATE, FakeBackend

MODEL = ModelIdentity(name="fake", size_bytes=10, sha256="ab" * 32, cache_types="f16/f16")
GREEDY = SamplingParams(temperature=0.0)
MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hé"}]
SESSION = Session(tuple(MESSAGES), {"hé": (1, 2)}, (1, 2, 3))


def state(path: Path) -> None:
    path.write_bytes(b"FAKE" + b"\3\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0")


def make(backend: FakeBackend | None = None) -> tuple[Engine, FakeBackend]:
    backend = backend or FakeBackend()
    return Engine(backend, EngineSettings("fake", MODEL, TEMPLATE)), backend


def test_a_session_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "a.session"
    save_session(path, MODEL, SESSION, state)
    assert load_session(path, MODEL, 100) == SESSION
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.session"]


def test_engine_resumes_without_prefilling(tmp_path: Path) -> None:
    first, _ = make()
    reply = first.chat(MESSAGES[:1], sampling=SamplingParams(seed=1), max_tokens=8)
    messages = [MESSAGES[0], {"role": "assistant", "content": reply.text}]
    first.save_session(tmp_path / "s", messages)
    follow = [*messages, {"role": "user", "content": "more"}]
    expected = first.chat(follow, sampling=GREEDY, max_tokens=6)
    second, backend = make()
    assert second.load_session(tmp_path / "s") == messages
    assert backend.passes == []
    resumed = second.chat(follow, sampling=GREEDY, max_tokens=6)
    assert resumed.token_ids == expected.token_ids
    assert resumed.stats.n_prefilled_tokens == expected.stats.n_prefilled_tokens


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("saved") / "s"
    save_session(path, MODEL, SESSION, state)
    return path.read_bytes()


def test_every_truncation_is_a_format_error(saved: bytes, tmp_path: Path) -> None:
    path = tmp_path / "s"
    for size in range(len(saved)):
        path.write_bytes(saved[:size])
        with pytest.raises(FormatError, match=str(path)):
            load_session(path, MODEL, 100)


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_no_changed_byte_goes_unnoticed(saved: bytes, tmp_path: Path, data: st.DataObject) -> None:
    at = data.draw(st.integers(0, len(saved) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda value: value != saved[at]))
    path = tmp_path / "s"
    path.write_bytes(saved[:at] + bytes([other]) + saved[at + 1 :])
    with pytest.raises(FormatError):
        load_session(path, MODEL, 100)


def test_absurd_lengths_read_nothing_large(tmp_path: Path) -> None:
    path = tmp_path / "s"
    for state_bytes, header_bytes in ((2**63, 10), (0, 2**32 - 1), (2**64 - 1, 5)):
        footer = struct.pack("<QI8s", state_bytes, header_bytes, MAGIC)
        path.write_bytes(b"{}{}" + footer + bytes(32))
        with pytest.raises(FormatError, match=f"header of {header_bytes:,} bytes in a file of 56"):
            load_session(path, MODEL, 100)


@pytest.mark.parametrize("n_tokens", [0, 3])
def test_tokens_and_cache_go_together(tmp_path: Path, n_tokens: int) -> None:
    path = tmp_path / "s"

    def nothing(path: Path) -> None:
        path.write_bytes(b"")

    session = Session(tuple(MESSAGES), {}, tuple(range(n_tokens)))
    save_session(path, MODEL, session, nothing)
    if n_tokens == 0:
        assert load_session(path, MODEL, 100) == session
    else:
        with pytest.raises(FormatError, match="do not belong together"):
            load_session(path, MODEL, 100)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"sha256": "cd" * 32}, "is of fake"), ({"cache_types": "q8_0/f16"}, "q8_0/f16")],
)
def test_session_of_another_model_is_refused(
    tmp_path: Path, change: dict[str, str], message: str
) -> None:
    path = tmp_path / "s"
    save_session(path, MODEL.model_copy(update=change), SESSION, state)
    with pytest.raises(ConfigError, match=message):
        load_session(path, MODEL, 100)


def test_session_longer_than_the_context_is_refused_with_a_hint(tmp_path: Path) -> None:
    save_session(tmp_path / "s", MODEL, SESSION, state)
    with pytest.raises(ConfigError, match="3 tokens, the context 2") as caught:
        load_session(tmp_path / "s", MODEL, 2)
    assert "--ctx-size" in (caught.value.hint or "")


def test_refused_session_leaves_the_engine_as_it_was(tmp_path: Path, saved: bytes) -> None:
    engine, backend = make()
    reply = engine.complete("abc", sampling=GREEDY, max_tokens=4)
    before = list(backend.tokens)
    (tmp_path / "damaged").write_bytes(saved[:-1])
    for name in ("damaged", "missing"):
        with pytest.raises(EdgertError):
            engine.load_session(tmp_path / name)
    assert backend.tokens == before
    again = engine.complete("abc", sampling=GREEDY, max_tokens=4)
    assert (again.token_ids, again.stats.n_prefilled_tokens) == (reply.token_ids, 1)


def test_state_the_backend_refuses_leaves_a_usable_engine(tmp_path: Path) -> None:
    engine, _ = make()
    expected = engine.complete("abc", sampling=GREEDY, max_tokens=4).token_ids

    def misfit(path: Path) -> None:
        path.write_bytes(b"of another context")

    save_session(tmp_path / "s", MODEL, SESSION, misfit)
    with pytest.raises(ConfigError, match="does not fit"):
        engine.load_session(tmp_path / "s")
    assert engine.complete("abc", sampling=GREEDY, max_tokens=4).token_ids == expected


@pytest.mark.parametrize("path", ["/proc/x.session", "/nowhere/x.session", "/dev/null/x"])
def test_place_that_cannot_be_written_is_an_error(path: str) -> None:
    with pytest.raises(ConfigError, match="cannot save"):
        save_session(Path(path), MODEL, SESSION, state)


def test_a_failed_save_keeps_the_earlier_session_and_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "s"
    save_session(path, MODEL, SESSION, state)

    def large(path: Path) -> None:
        path.write_bytes(bytes(10_000_000))

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, limits[1]))  # the disk is full
    try:
        with pytest.raises(EdgertError, match="untouched"):
            save_session(path, MODEL, SESSION, large)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert load_session(path, MODEL, 100) == SESSION
    assert [entry.name for entry in tmp_path.iterdir()] == ["s"]


def test_a_directory_or_missing_file_is_a_config_error(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="cannot read"):
            load_session(path, MODEL, 100)


def test_unknown_header_keys_are_refused(saved: bytes, tmp_path: Path) -> None:
    state_bytes, header_bytes, _ = struct.unpack_from("<QI8s", saved, len(saved) - 52)
    header = json.loads(saved[state_bytes : state_bytes + header_bytes])
    header["extra"] = 1
    text = json.dumps(header).encode()
    body = saved[:state_bytes] + text + struct.pack("<QI8s", state_bytes, len(text), MAGIC)
    path = tmp_path / "s"
    path.write_bytes(body + hashlib.sha256(body).digest())
    with pytest.raises(FormatError, match="extra"):
        load_session(path, MODEL, 100)


@pytest.mark.parametrize("moment", ["load", "shift"])
def test_an_interrupt_inside_the_backend_leaves_an_empty_cache_not_a_wrong_one(
    tmp_path: Path, moment: str
) -> None:
    class Interrupted(FakeBackend):
        def load_state_file(self, path: Path) -> list[int]:
            super().load_state_file(path)
            raise KeyboardInterrupt

        def shift(self, keep: int, discard: int) -> None:
            super().shift(keep, discard)
            raise KeyboardInterrupt

    backend = Interrupted()
    cache = TokenCache(backend)
    cache.decode([1, 2, 3, 4], 0)
    backend.save_state_file(tmp_path / "s", [1, 2, 3, 4])
    with pytest.raises(KeyboardInterrupt):
        cache.restore(tmp_path / "s", [1, 2, 3, 4]) if moment == "load" else cache.shift(1, 2)
    assert cache.token_ids == backend.tokens == []
