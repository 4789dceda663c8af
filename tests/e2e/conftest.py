"""Hosts for the tests of whole programs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from worker_processes import Cluster, Watched


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Home and two workers, with manifests for shared layers and for stages."""
    made = Cluster(tmp_path_factory.mktemp("cluster"), ["w1", "w2"])
    made.plan("shared", 2)
    made.plan("shared3", 3, home_is_slow=True)
    made.plan("stages", 2, "--stay", "0:4=home", "--stay", "4:8=w1")
    return made


@pytest.fixture(scope="module")
def w1(cluster: Cluster) -> Iterator[tuple[Watched, str]]:
    """A worker that serves all tests of a module."""
    with cluster.worker("w1") as started:
        yield started


@pytest.fixture
def home(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make this process home."""
    monkeypatch.setenv("EDGERT_HOME", str(cluster.home))
    return cluster.home
