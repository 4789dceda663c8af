"""Fixtures: folders of its own for every test, and data that may be absent."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import pytest

from edgert.errors import ConfigError
from edgert.hosts.service.require import require_grpc

_DATA = Path(__file__).parent.parent.parent / "shared" / "data"


def pytest_configure() -> None:
    """Keep gRPC's C core quiet, whichever test imports it first."""
    with suppress(ConfigError):  # where it is not installed, its tests say so
        require_grpc()


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the person's settings and folders out of the tests."""
    for name in [name for name in os.environ if name.startswith("EDGERT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("EDGERT_HOME", str(tmp_path_factory.mktemp("home")))


@pytest.fixture
def shared_data() -> Path:
    """The folder of models and texts that are not part of the project."""
    if not _DATA.is_dir():
        pytest.skip(f"needs the data folder {_DATA}")
    return _DATA
