"""Several hosts answer as one does, through the program."""

from __future__ import annotations

from pathlib import Path

import pytest

from planned_models import outcome
from worker_processes import TINY, Cluster, Watched, named

pytestmark = pytest.mark.model

PROMPT = ("--raw", "-p", "Once upon a time there", "-n", "80", "--temp", "0")
Worker = tuple[Watched, str]


@pytest.fixture
def alone(capsys: pytest.CaptureFixture[str]) -> str:
    code, out, err = outcome(capsys, "run", str(TINY), "-t", "1", "-c", "1024", *PROMPT)
    assert code == 0, err
    return out


@pytest.mark.parametrize("manifest", ["shared", "stages"])
@pytest.mark.usefixtures("home")
def test_two_hosts_answer_token_for_token_as_one(
    manifest: str, alone: str, cluster: Cluster, w1: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(cluster.manifests[manifest])
    code, out, err = outcome(capsys, "run", "--manifest", path, "--host", w1[1], *PROMPT)
    assert (code, out) == (0, alone), err
    assert len(out) > 150


@pytest.mark.usefixtures("home")
def test_three_hosts_answer_token_for_token_as_one(
    alone: str, cluster: Cluster, w1: Worker, capsys: pytest.CaptureFixture[str]
) -> None:
    with cluster.worker("w2") as (_, second):
        hosts = named((w1[1], second))
        path = str(cluster.manifests["shared3"])
        code, out, err = outcome(capsys, "run", "--manifest", path, *hosts, *PROMPT)
        assert (code, out) == (0, alone), err
        assert "w2: opened" in err


@pytest.mark.usefixtures("home")
def test_a_worker_that_was_restarted_serves_the_next_chat(
    alone: str, cluster: Cluster, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    del tmp_path
    path = str(cluster.manifests["shared"])
    for _ in range(2):
        with cluster.worker("w1") as (worker, host):
            code, out, err = outcome(capsys, "run", "--manifest", path, "--host", host, *PROMPT)
            assert (code, out) == (0, alone), err
            worker.process.kill()
