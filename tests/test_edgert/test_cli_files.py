"""Commands over a real file: show, doctor, and on llama.cpp itself bench, eval and chat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import builders
from edgert.cli import main


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return builders.llama().write(tmp_path / "model.gguf")


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def test_show_describes_the_model(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    code, out, _ = outcome(capsys, "show", str(model), "--json", "--memory", "2G")
    facts = json.loads(out)
    assert code == 0
    assert facts["architecture"] == "llama"
    assert len(facts["layers"]) == facts["n_layer"] == builders.N_LAYER
    assert facts["fits"] is True
    assert facts["weight_bytes"] < model.stat().st_size


def test_show_text_has_a_line_for_each_fact(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    code, out, _ = outcome(capsys, "show", "-m", str(model))
    assert code == 0
    assert "architecture" in out
    assert str(model) in out


@pytest.mark.parametrize("command", ["show", "bench", "eval", "chat"])
def test_damaged_model_is_exit_code_three_and_names_the_file(
    capsys: pytest.CaptureFixture[str], model: Path, command: str
) -> None:
    text = model.with_name("text.txt")
    text.write_text("some text")
    model.write_bytes(model.read_bytes()[:1000])
    more = {"eval": [str(text)], "chat": ["-p", "hi"]}.get(command, [])
    code, out, err = outcome(capsys, command, str(model), *more)
    assert (code, out) == (3, "")
    assert err.startswith(f"error: {model}")


def test_doctor_says_ok_warn_or_fail_to_each_check(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    _, out, _ = outcome(capsys, "doctor", "-m", str(model), "--json")
    checks = {check["name"]: check for check in json.loads(out)}
    assert {check["status"] for check in checks.values()} <= {"ok", "warn", "fail"}
    assert checks["python"]["status"] == "ok"
    assert checks["libraries"]["status"] == "ok"
    assert checks["model"]["status"] == "ok"
    assert str(model) in checks["model"]["detail"]


def test_doctor_fails_on_a_damaged_model_and_goes_on(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    model.write_bytes(b"GGUF")
    code, out, _ = outcome(capsys, "doctor", str(model))
    assert code == 1
    assert "fail  model " in out
    assert "configuration" in out


@pytest.mark.model
def test_bench_of_a_real_model_has_both_tests(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    code, out, _ = outcome(
        capsys, "bench", str(model), "-p", "16", "-n", "4", "-r", "1", "-o", "json", "-t", "1"
    )
    rows = json.loads(out)
    assert code == 0
    assert [row["test"] for row in rows] == ["pp16", "tg4"]
    assert all(row["avg_ts"] > 0 and row["peak_memory_bytes"] > 0 for row in rows)


@pytest.mark.model
def test_eval_of_a_real_model_scores_the_whole_text(
    capsys: pytest.CaptureFixture[str], model: Path
) -> None:
    text = model.with_name("text.txt")
    text.write_text("a small text, scored twice over the middle. " * 3)
    code, out, _ = outcome(capsys, "eval", "-m", str(model), str(text), "-o", "json", "-t", "1")
    score = json.loads(out)
    assert code == 0
    assert score["n_bytes"] == text.stat().st_size
    assert score["perplexity"] > 1


@pytest.mark.model
def test_one_shot_chat_with_a_real_model(capsys: pytest.CaptureFixture[str], model: Path) -> None:
    arguments = ["chat", str(model), "-p", "hello", "-n", "4", "--temp", "0", "-t", "1"]
    first, second = (outcome(capsys, *arguments) for _ in range(2))
    assert first[0] == 0
    assert first[1] == second[1]
    assert "decode 4 tok" in first[2]


@pytest.mark.data
@pytest.mark.model
@pytest.mark.parametrize("memory", [[], ["--memory", "1G"]])
def test_stories260k_tells_the_published_story(
    capsys: pytest.CaptureFixture[str], shared_data: Path, memory: list[str]
) -> None:
    folder = shared_data / "llm" / "stories260K"
    model = folder / "derived" / "stories260K-f32.gguf"
    code, out, _ = outcome(
        capsys, "chat", str(model), "--raw", "-p", "", "--temp", "0", "-n", "200", *memory
    )
    assert code == 0
    assert out.strip() == (folder / "expected_greedy_200.txt").read_text().strip()


@pytest.mark.model
def test_chat_with_the_embedded_model_answers(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys, "chat", "-p", "Hello! How are you?", "-s", "1", "-n", "40")
    assert code == 0
    assert out.strip()
    assert "decode" in err
