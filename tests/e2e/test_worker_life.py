"""What becomes of a worker and its home when either ends, hangs or is stopped."""

from __future__ import annotations

import signal
import time

import pytest

from planned_models import outcome
from worker_processes import WITHOUT_END, Cluster, Watched, named

pytestmark = pytest.mark.model

SOON_S = 20.0  # far more than the deadlines that are set, far less than a hang


def sessions(cluster: Cluster, host: str) -> int:
    return len(cluster.status(host)["sessions"])


def await_no_session(cluster: Cluster, host: str) -> None:
    until_s = time.monotonic() + SOON_S
    while sessions(cluster, host):
        assert time.monotonic() < until_s, "the session is still there"
        time.sleep(0.05)


def answers(cluster: Cluster, manifest: str, host: str, capsys: pytest.CaptureFixture[str]) -> str:
    path = str(cluster.manifests[manifest])
    arguments = ("run", "--manifest", path, "--host", host, "-p", "Hello", "-n", "5", "--temp", "0")
    code, out, err = outcome(capsys, *arguments)
    assert code == 0, err
    return out


@pytest.mark.parametrize("manifest", ["shared", pytest.param("stages", marks=pytest.mark.slow)])
def test_a_worker_killed_in_a_reply_is_named_at_home(manifest: str, cluster: Cluster) -> None:
    with cluster.worker("w1") as (worker, host), cluster.start(manifest, [host]) as home:
        home.await_out()
        worker.signal(signal.SIGKILL)
        assert home.code(SOON_S) == 6
        assert "error: w1 (127.0.0.1:" in home.err


@pytest.mark.slow
def test_of_three_hosts_the_one_that_was_killed_is_named(cluster: Cluster) -> None:
    with (
        cluster.worker("w1") as (first, one),
        cluster.worker("w2") as (second, two),
        cluster.start("shared3", [one, two]) as home,
    ):
        home.await_out()
        second.signal(signal.SIGKILL)
        assert home.code(SOON_S) == 6
        assert "error: w2 (127.0.0.1:" in home.err
        assert first.process.poll() is None
        await_no_session(cluster, one)


@pytest.mark.parametrize("manifest", ["shared", pytest.param("stages", marks=pytest.mark.slow)])
def test_a_worker_that_hangs_in_a_reply_is_given_up_within_the_deadline(
    manifest: str, cluster: Cluster
) -> None:
    with (
        cluster.worker("w1") as (worker, host),
        cluster.start(manifest, [host], "--host-deadline", "1") as home,
    ):
        home.await_out()
        worker.signal(signal.SIGSTOP)
        assert home.code(SOON_S) == 6
        assert "error: w1 (127.0.0.1:" in home.err
        assert "is silent" in home.err


@pytest.mark.usefixtures("home")
def test_a_killed_home_leaves_nothing_behind_at_the_worker(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster.worker("w1", "--keep-session", "0.5", "--sessions", "1") as (_, host):
        with cluster.start("shared", [host]) as home:
            home.await_out()
            assert sessions(cluster, host) == 1
            home.signal(signal.SIGKILL)
            await_no_session(cluster, host)
        assert answers(cluster, "shared", host, capsys)


@pytest.mark.usefixtures("home")
def test_a_home_that_hangs_in_a_reply_is_given_up_by_the_worker(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--deadline", "1", "--keep-session", "0.5", "--sessions", "1")
    with cluster.worker("w1", *flags) as (worker, host):
        with cluster.start("shared", [host]) as home:
            home.await_out()
            home.signal(signal.SIGSTOP)
            await_no_session(cluster, host)
            assert "home (127.0.0.1:" in worker.err
            home.signal(signal.SIGCONT)
            assert home.code(SOON_S) == 6
            assert "w1 (127.0.0.1:" in home.err
        assert answers(cluster, "shared", host, capsys)


@pytest.mark.parametrize("manifest", [pytest.param("shared", marks=pytest.mark.slow), "stages"])
def test_a_home_that_hangs_between_replies_is_given_up_and_one_that_rests_is_not(
    manifest: str, cluster: Cluster
) -> None:
    path = str(cluster.manifests[manifest])
    with cluster.worker("w1", "--deadline", "0.5", "--keep-session", "0.2") as (_, host):
        arguments = ("chat", "--manifest", path, "--host", host, "--temp", "0")
        with Watched(cluster.home, *arguments) as home:
            home.say("Hello\n")
            home.await_err("decode")
            time.sleep(1.5)  # three deadlines
            assert sessions(cluster, host) == 1
            home.signal(signal.SIGSTOP)
            await_no_session(cluster, host)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_worker_that_serves_nobody_stops_at_once(number: int, cluster: Cluster) -> None:
    with cluster.worker("w1", "--grace", "1000") as (worker, _):
        worker.signal(number)
        assert worker.code(SOON_S) == 0
        assert "no more work is taken" in worker.err


@pytest.mark.usefixtures("home")
def test_a_stopping_worker_ends_the_reply_and_takes_no_new_session(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("-n", "200")
    with (
        cluster.worker("w1", "--grace", "1000") as (worker, host),
        cluster.start("shared", [host], *flags) as home,
    ):
        home.await_out()
        worker.signal(signal.SIGTERM)
        worker.await_err("no more work is taken")
        path = str(cluster.manifests["shared"])
        code, _, err = outcome(capsys, "run", "--manifest", path, "--host", host, "-p", "Hello")
        assert (code, "w1" in err, "stop" in err) == (6, True, True), err
        assert home.process.poll() is None
        assert home.code() == 0, home.err
        assert "decode 200 tok" in home.err
        assert worker.code(SOON_S) == 0


@pytest.mark.slow
def test_a_chat_that_rests_does_not_hold_up_a_stopping_worker(cluster: Cluster) -> None:
    path = str(cluster.manifests["shared"])
    with cluster.worker("w1", "--grace", "1000") as (worker, host):
        arguments = ("chat", "--manifest", path, *named([host]), "--temp", "0")
        with Watched(cluster.home, *arguments) as home:
            home.say("Hello\n")
            home.await_out(r"\?")
            worker.signal(signal.SIGTERM)
            assert worker.code(SOON_S) == 0
            home.say("Hello again\n")
            home.await_err("w1 .*stops working|w1 .*closed")


@pytest.mark.usefixtures("home")
def test_a_second_model_that_does_not_fit_is_refused_with_figures(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        cluster.worker("w1", "--memory", "12M") as (_, host),
        cluster.start("shared", [host]) as home,
    ):
        home.await_out()
        path = str(cluster.manifests["stages"])
        code, _, err = outcome(capsys, "run", "--manifest", path, "--host", host, "-p", "Hello")
        assert code == 6, err
        assert "w1 (" in err
        assert "CapacityError: the manifest takes " in err
        assert "are left of 12,000,000" in err
        assert home.process.poll() is None


@pytest.mark.parametrize("manifest", ["shared", "stages"])
def test_ctrl_c_in_a_reply_leaves_the_conversation_usable(
    manifest: str, cluster: Cluster, w1: tuple[Watched, str]
) -> None:
    path = str(cluster.manifests[manifest])
    arguments = ("chat", "--manifest", path, "--host", w1[1], "--grammar", WITHOUT_END)
    with Watched(cluster.home, *arguments) as home:
        for index in range(3):
            home.say("Tell me a long story about a tree\n")
            home.await_out(rf"([^\n]*\n){{{index}}}[^\n]*\w")
            home.signal(signal.SIGINT)
            home.await_err(rf"(\[stopped\].*){{{index + 1}}}")
        home.say("/exit\n")
        assert home.code() == 0, home.err
        assert "error" not in home.err


def test_the_worker_outlives_all_that(w1: tuple[Watched, str], cluster: Cluster) -> None:
    assert w1[0].process.poll() is None
    await_no_session(cluster, w1[1])
