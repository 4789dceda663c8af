"""Calls of service links: answers, errors on both ends, deadlines, versions, health, draining."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2

import edgert
from edgert.errors import (
    Cancelled,
    CapacityError,
    ConfigError,
    EdgertError,
    FormatError,
    LinkError,
    LinkTimeout,
)
from edgert.hosts.service import ServiceLimits, connect_service
from edgert.hosts.service.limits import MOST_JSON_BYTES
from edgert.hosts.service.messages import SERVICE, own_versions, path_of
from host_identities import in_thread, make_host
from service_hosts import LIMITS, NO_ROOM, Pair, eventually, pair_of


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with pair_of(tmp_path) as pair:
        yield pair


def test_worker_learns_who_asks_by_the_key_alone(pair: Pair) -> None:
    assert pair.client.status() == {"peer": "home", "free_bytes": 5}


def test_open_reports_each_event_while_it_works(pair: Pair) -> None:
    pair.handlers.is_slow = True
    events = pair.client.open({"manifest": "abc"})
    assert next(events) == {"peer": "home", "request": {"manifest": "abc"}}
    assert pair.handlers.held.wait(20)  # and is not done yet
    pair.handlers.let_go.set()
    assert list(events) == [{"ready": True}]


def test_giving_up_while_opening_closes_the_handlers_generator(pair: Pair) -> None:
    pair.handlers.is_slow = True
    events = pair.client.open({})
    next(events)
    events.close()  # type: ignore[attr-defined] - it is a generator
    pair.handlers.let_go.set()
    assert pair.handlers.events_closed.wait(20)


def test_close_names_the_session(pair: Pair) -> None:
    pair.client.close_session("s-1")
    assert pair.handlers.closed == [("home", "s-1")]


@pytest.mark.parametrize(
    "error",
    [
        NO_ROOM,
        ConfigError("no such model", hint="pack it"),
        FormatError("not a manifest", path="m.json"),
        Cancelled("stopped"),
        LinkError("another host is gone"),
        EdgertError("ä" * 5000, hint="\N{PILE OF POO}" * 5000),
    ],
)
def test_errors_are_raised_at_home_with_class_words_and_hint(
    pair: Pair, error: EdgertError
) -> None:
    pair.handlers.failure = error
    with pytest.raises(LinkError) as caught:
        pair.client.status()
    message, hint = caught.value.message, caught.value.hint
    words = error.message[:1000].replace("\x1b", " ")
    assert message == f"{pair.client.name}: reports {type(error).__name__}: {words}"
    assert hint == (error.hint and error.hint[:1000])
    with pytest.raises(LinkError, match=type(error).__name__):
        list(pair.client.open({}))
    last = pair.server.refusals[-1].message
    assert last.startswith("home (127.0.0.1:")
    assert f": Open: {error.message}" in last


def test_error_of_no_class_of_ours_is_a_link_error(pair: Pair) -> None:
    pair.handlers.answer = {"unwritable": object()}
    with pytest.raises(LinkError, match=r"^worker \(127.*Status failed: unknown"):
        pair.client.status()


def test_deadline_is_a_timeout_that_names_the_peer(pair: Pair) -> None:
    pair.handlers.is_slow = True
    with pytest.raises(LinkTimeout, match=r"^worker .*no answer to Status within 0\.2 s"):
        pair.client.status(0.2)
    with pytest.raises(LinkTimeout, match="no answer to Open"):
        list(pair.client.open({}, 0.2))


def test_request_that_is_too_large_is_not_sent(pair: Pair) -> None:
    large = {"text": "x" * MOST_JSON_BYTES}
    with pytest.raises(LinkError, match=r"^worker .*8,388,\d+ bytes, wanted 8,388,608 at most"):
        list(pair.client.open(large))
    assert pair.server.refusals == ()


def test_answer_that_is_too_large_is_an_error_on_both_ends(pair: Pair) -> None:
    pair.handlers.answer = {"text": "x" * MOST_JSON_BYTES}
    with pytest.raises(LinkError, match=r"^worker .*wanted 8,388,608 at most"):
        pair.client.status()
    assert "wanted 8,388,608 at most" in pair.server.refusals[-1].message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"x" * (MOST_JSON_BYTES + 1), "8,388,609 bytes, wanted 8,388,608"),
        (b"", "not JSON"),
        (b"[]", "not an object"),
        (b'{"blobs": {}}', "blobs is not a list"),
        (b'{"blobs": [1]}', "an item is not an object"),
        (b'{"blobs": [{"sha256": "../../etc/passwd", "size_bytes": 1}]}', "64 hexadecimal"),
        (b'{"blobs": [{"sha256": "' + b"a" * 64 + b'", "size_bytes": -1}]}', "number of bytes"),
        (b'{"blobs": [{"sha256": "' + b"a" * 64 + b'", "size_bytes": true}]}', "number of bytes"),
        (b"[" * 100_000, "nested levels"),
    ],
)
def test_request_that_is_no_offer_is_refused_and_remembered(
    pair: Pair, content: bytes, words: str
) -> None:
    with pair.raw() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path_of("Offer"))(content, timeout=20, metadata=own_versions())
    assert caught.value.code() is grpc.StatusCode.ABORTED
    assert words in pair.server.refusals[-1].message
    assert pair.client.status()["peer"] == "home"  # and nothing else happened


def test_message_beyond_grpcs_own_limit_does_not_get_in(pair: Pair) -> None:
    with pair.raw() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path_of("Status"))(
            b"x" * (MOST_JSON_BYTES + (2 << 20)), timeout=20, metadata=own_versions()
        )
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("key", ["edgert-protocol", "edgert-version"])
def test_caller_of_another_version_is_refused_by_name(pair: Pair, key: str) -> None:
    metadata = [(name, "9.9\x7f" if name == key else value) for name, value in own_versions()]
    metadata = [(name, str(value).replace("\x7f", "")) for name, value in metadata]
    with pair.raw() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(path_of("Status"))(b"{}", timeout=20, metadata=metadata)
    assert "9.9, wanted" in (caught.value.details() or "")
    assert "9.9, wanted" in pair.server.refusals[-1].message


def test_home_refuses_a_worker_of_another_version(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker of another version is one that answers and lets in whoever asks."""
    monkeypatch.setattr("edgert.hosts.service.admission.check_versions", lambda _: None)
    other = (("edgert-protocol", "1"), ("edgert-version", "0.0.7"))
    monkeypatch.setattr("edgert.hosts.service.admission.own_versions", lambda: other)
    wanted = f"^worker .*version of service links is 0.0.7, wanted {edgert.__version__}"
    with pytest.raises(LinkError, match=wanted):
        pair.client.status()
    with pytest.raises(LinkError, match=wanted):
        list(pair.client.open({}))
    with pytest.raises(LinkError, match=wanted):
        pair.client.run()


def test_method_that_a_worker_does_not_know_is_named() -> None:
    home, worker = make_host("home"), make_host("worker")
    server = grpc.server(ThreadPoolExecutor(2))
    own = worker.identity
    keys = grpc.ssl_server_credentials(
        [(own.key_pem, own.certificate_pem)], home.identity.certificate_pem, True
    )
    port = server.add_secure_port("127.0.0.1:0", keys)
    server.start()
    try:
        with connect_service(f"127.0.0.1:{port}", home.identity, worker.known) as client:
            with pytest.raises(LinkError, match=r"^worker .*does not know Status") as caught:
                client.status()
            assert "same version" in (caught.value.hint or "")
            with pytest.raises(LinkError, match="does not know Run"):
                client.run()
    finally:
        server.stop(0).wait()


def test_draining_worker_is_not_serving_and_ends_what_runs(pair: Pair) -> None:
    assert pair.client.is_serving()
    pair.handlers.is_slow = True
    events = pair.client.open({})
    next(events)
    pair.server.drain()
    assert not pair.client.is_serving()
    with pair.raw() as channel:
        request = health_pb2.HealthCheckRequest().SerializeToString()
        answer = channel.unary_unary("/grpc.health.v1.Health/Check")(request, timeout=20)
    assert health_pb2.HealthCheckResponse.FromString(answer).status == 2  # NOT_SERVING
    with pytest.raises(LinkError, match="begins nothing new"):
        next(pair.client.open({}))
    with pytest.raises(LinkError, match="begins nothing new"):
        pair.client.run()
    pair.handlers.let_go.set()
    assert list(events) == [{"ready": True}]


def test_closing_ends_calls_that_last_longer_than_the_grace(pair: Pair) -> None:
    pair.handlers.is_slow = True
    events = pair.client.open({})
    next(events)
    pair.server.close(0)
    with pytest.raises(LinkError, match=r"^worker "):
        next(events)
    with pytest.raises(LinkError, match="cannot connect"):
        pair.client.status()


def test_too_many_long_calls_are_refused_and_short_ones_answered(tmp_path: Path) -> None:
    limits = ServiceLimits(20.0, 20.0, 20.0, most_calls=1, link=LIMITS.link)
    with pair_of(tmp_path, limits) as pair:
        link = pair.client.run()
        with pytest.raises(LinkError, match="CapacityError: 1 calls are running, 1 at most"):
            next(pair.client.open({}))
        assert pair.client.status()["peer"] == "home"
        link.close()
        assert pair.handlers.run_ended.wait(20)
        eventually(lambda: _can_open(pair))


def _can_open(pair: Pair) -> bool:
    try:
        return bool(list(pair.client.open({})))
    except LinkError as error:
        if "calls are running" not in error.message:
            raise
        return False


def test_several_threads_may_call_one_client(pair: Pair) -> None:
    answers = [in_thread(pair.client.status) for _ in range(16)]
    assert {answer.result(20)["peer"] for answer in answers} == {"home"}


def test_there_is_no_reflection(pair: Pair) -> None:
    with pair.raw() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary("/grpc.reflection.v1.ServerReflection/ServerReflectionInfo")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_program_ends_though_a_client_was_left_open(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from pathlib import Path\n"
        "from service_hosts import pair_of\n"
        f"manager = pair_of(Path({str(tmp_path)!r})); pair = manager.__enter__()\n"
        "link = pair.client.run(); print(pair.client.status())\n"
        "pair.server.close(0)\n"
    )
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "{'peer': 'home', 'free_bytes': 5}\n")
    assert [line for line in done.stderr.splitlines() if not line.startswith("home (")] == []


def test_capacity_error_is_known_to_load_balancers_by_its_status(pair: Pair) -> None:
    pair.handlers.failure = CapacityError("full")
    with pair.raw() as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/Status")(b"{}", timeout=20, metadata=own_versions())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
