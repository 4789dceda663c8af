"""`--trace`: refused before a model is loaded, written however the run ends."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from edgert.cli import chat, main, opening
from edgert.cli.command import Context
from edgert.cli.options import (
    ChatOptions,
    DraftFlags,
    ModelFlags,
    OutputFlags,
    PromptFlags,
    SamplingFlags,
)
from edgert.config import directories
from edgert.engine import Engine, EngineSettings
from edgert.errors import Cancelled, CapacityError
from edgert.events import Listener
from edgert.trace_file import record_to
from fakes import TEMPLATE, FakeBackend


def passes(path: Path) -> list[str]:
    events = json.loads(path.read_text())["traceEvents"]
    return [e["name"] for e in events if e["ph"] == "X" and e["cat"] == "compute"]


@pytest.mark.model
@pytest.mark.parametrize(
    ("arguments", "last"),
    [
        (["run", "-p", "Hello", "-n", "2", "-s", "1"], "token"),
        (["bench", "-p", "8", "-n", "3", "-r", "1", "-o", "json"], "token 2"),
    ],
)
def test_run_and_bench_write_the_trace(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], last: str
) -> None:
    path = tmp_path / "run.json"
    assert main.run([*arguments, "-t", "1", "-c", "128", "--trace", str(path)]) == 0
    found = passes(path)
    assert found[0] == "load"
    assert found[-1].startswith(last)
    capsys.readouterr()


@pytest.mark.model
def test_trace_of_a_draft_model_is_beside_that_of_the_model(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    code = main.run(
        ["run", "-p", "Hello", "-n", "4", "-md", "embedded", "-t", "1", "--trace", str(path)]
    )
    events = json.loads(path.read_text())["traceEvents"]
    names = {e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert code == 0
    assert names == {"measured model", "measured draft"}


@pytest.mark.parametrize("command", [["run", "-p", "hi"], ["chat", "-p", "hi"], ["bench"]])
@pytest.mark.parametrize("name", ["", ".", "missing/run.json", "model.gguf", "~nobody/x"])
def test_wrong_place_is_exit_code_two_before_the_model_is_read(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    name: str,
) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"no model")  # reading it would be exit code 3
    monkeypatch.chdir(tmp_path)
    assert main.run([*command, "-m", str(model), "--trace", name]) == 2
    assert "hint: " in capsys.readouterr().err
    assert model.read_bytes() == b"no model"


def test_model_that_does_not_load_leaves_no_trace(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model, path = tmp_path / "model.gguf", tmp_path / "run.json"
    model.write_bytes(b"no model")
    assert main.run(["run", "-p", "hi", "-m", str(model), "--trace", str(path)]) == 3
    assert list(tmp_path.iterdir()) == [model]
    capsys.readouterr()


def test_ctrl_c_leaves_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    backend = record_to(path).opened(FakeBackend())

    def work() -> None:
        backend.decode([1], 0, 1)
        backend.cancel()
        backend.decode([1], 1, 1)

    with pytest.raises(Cancelled):
        opening.run_interruptible(backend, work)
    assert passes(path) == ["load", "token 0", "token 1"]


def test_error_after_loading_leaves_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "run.json"

    def load(options: ChatOptions, context: Context, listener: Listener) -> Engine:
        del options, context
        backend = record_to(path).opened(FakeBackend())
        return Engine(backend, EngineSettings("fake", chat_template=TEMPLATE), listener=listener)

    options = ChatOptions(
        ModelFlags(), PromptFlags(prompt="x" * 300), SamplingFlags(), DraftFlags(), OutputFlags()
    )
    env = {"EDGERT_HOME": str(tmp_path)}
    context = Context(io.StringIO(), io.StringIO(), io.StringIO(), env, directories(env), {})
    with pytest.raises(CapacityError):
        chat.run(options, context, load)
    assert passes(path) == ["load"]
