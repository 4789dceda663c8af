"""The public API: names, options, and the example that is shown to people."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import edgert
from edgert import api

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "embed_in_program.py"


def test_options_of_load_and_the_bundle_are_the_same() -> None:
    parameters = inspect.signature(api.load).parameters
    fields = {field.name: field.default for field in dataclasses.fields(api.EngineOptions)}
    listed = {name: p.default for name, p in parameters.items() if name != "listener"}
    assert listed == fields


def test_asynchronous_twin_has_the_methods_of_the_engine() -> None:
    def public(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    missing = public(api.Engine) - public(api.AsyncEngine) - {"model_name", "n_ctx", "applied"}
    assert missing == set()


def test_public_names_resolve() -> None:
    assert edgert.load is api.load
    for name in api.__all__:
        assert getattr(api, name) is not None


@pytest.mark.model
def test_example_runs() -> None:
    if not (ROOT / "edgert" / "models" / api.EMBEDDED_MODEL).is_file():
        pytest.skip("the embedded model is not there: run scripts/train_tiny.py")
    done = subprocess.run(
        [sys.executable, "-W", "error", str(EXAMPLE)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "colour: " in done.stdout
    assert done.stdout.strip().endswith("4 messages resumed")


@pytest.mark.parametrize(
    "options",
    [
        {"model": 5},
        {"model": b"x"},
        {"model": ""},
        {"draft": 3},
        {"draft": ""},
        {"context": "512"},
        {"context": 5.5},
        {"context": True},
        {"threads": "2"},
        {"memory": 2.5e9},
        {"memory": [1]},
        {"memory": True},
    ],
)
def test_options_of_a_wrong_kind_are_refused_before_anything_is_read(
    options: dict[str, object],
) -> None:
    with pytest.raises(edgert.ConfigError, match="wanted"):
        edgert.load(**options)  # type: ignore[arg-type]
