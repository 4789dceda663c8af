"""The program: flags, exit codes, errors as text."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from edgert.cli import app, command, main, opening
from edgert.cli.options import ModelFlags
from edgert.config import settings_of
from edgert.errors import Cancelled, CapacityError, EdgertError


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Make every command raise `error` when it is imported: the seam is the import itself."""

    def importing(name: str) -> object:
        del name
        raise error

    monkeypatch.setattr(command, "import_module", importing)


def test_version_is_all_of_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(capsys, "--version") == (0, "edgert 0.1.0\n", "")


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = outcome(capsys, "--help")
    assert code == 0
    assert [c.name for c in app.COMMANDS if c.name not in out] == []


@pytest.mark.parametrize("name", [c.name for c in app.COMMANDS])
def test_help_of_a_command_names_its_flags(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = outcome(capsys, name, "--help")
    (options,) = (c.options for c in app.COMMANDS if c.name == name)
    spellings = [text for s in settings_of(options) for text in s.flag.spellings]
    assert code == 0
    assert [text for text in spellings if text not in out] == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["chat", "--nonsense"],
        ["chat", "-c"],
        ["chat", "-c", "many"],
        ["chat", "-c", "0"],
        ["chat", "-ctk", "q9"],
        ["chat", "a.gguf", "b.gguf"],
        ["chat", "--temp", "-1"],
        ["chat", "missing.gguf"],
        ["chat", "/", "-p", "hello"],
        ["chat", "-p", ""],
        ["chat", "-f", "missing.txt"],
        ["chat", "--memory", "lots", "-p", "hello"],
        ["bench", "-p", "0", "-n", "0"],
        ["bench", "-c", "10"],
        ["eval", "missing.gguf"],
        ["pack"],
        ["pack", "--layout", "other", "x.gguf"],
        ["show", "missing.gguf"],
    ],
)
def test_wrong_request_is_exit_code_two_without_a_traceback(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    code, out, err = outcome(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert "Traceback" not in err
    assert "bug" not in err


def test_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys)
    assert code in (0, 2)
    assert "chat" in out + err


def test_missing_model_lists_those_beside_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "here.gguf").touch()
    code, _, err = outcome(capsys, "show", str(tmp_path / "there.gguf"))
    assert code == 2
    assert f"hint: there is {tmp_path / 'here.gguf'}" in err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (CapacityError("too big", hint="--memory 3G"), 4, "error: too big\nhint: --memory 3G\n"),
        (EdgertError("odd"), 1, "error: odd\n"),
        (Cancelled("stopped"), 130, "stopped\n"),
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left"), 1, "error: [Errno 28] No space left\n"),
        (MemoryError(), 4, "error: out of memory\nhint: a smaller --ctx-size, or --memory\n"),
    ],
)
def test_errors_become_text_and_exit_code(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
    text: str,
) -> None:
    fail_with(monkeypatch, error)
    assert outcome(capsys, "doctor") == (code, "", text)


def test_bug_is_reported_in_one_line_with_the_way_to_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(monkeypatch, ZeroDivisionError("division by zero"))
    code, _, err = outcome(capsys, "doctor")
    assert code == 1
    assert err == (
        "error: this is a bug in edgert: ZeroDivisionError: division by zero\n"
        "hint: EDGERT_DEBUG=1 shows where it happened\n"
    )
    monkeypatch.setenv("EDGERT_DEBUG", "1")
    assert "Traceback" in outcome(capsys, "doctor")[2]


def test_flags_of_llama_cpp_with_one_dash_and_several_letters_are_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ModelFlags] = []

    class Module:
        @staticmethod
        def run(options: object, context: object) -> int:
            del context
            seen.append(options.model)  # type: ignore[attr-defined]
            return 0

    monkeypatch.setattr(command, "import_module", lambda _: Module)
    arguments = ["m.gguf", "-ctk", "q8_0", "-ctv=q4_0", "-ub", "64", "-b", "128", "-c512"]
    arguments += ["-tb", "2", "--load-anyway"]
    assert outcome(capsys, "bench", *arguments)[0] == 0
    (flags,) = seen
    assert (flags.path, flags.cache_type_k, flags.cache_type_v) == ("m.gguf", "q8_0", "q4_0")
    assert (flags.ubatch_size, flags.batch_size, flags.ctx_size) == (64, 128, 512)
    assert (flags.threads_batch, flags.load_anyway) == (2, True)


def test_every_flag_has_its_environment_variable_and_the_file_its_key(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    home = Path(os.environ["EDGERT_HOME"])
    (home / "config.toml").write_text('memory = "1G"\n[show]\nctx-size = 77\n')
    monkeypatch.setenv("EDGERT_THREADS", "3")
    _, out, _ = outcome(capsys, "doctor", "-tb", "5")
    (line,) = (line for line in out.splitlines() if "configuration" in line)
    assert "memory (file)" in line
    assert "threads (environment)" in line
    assert "threads_batch (flag)" in line
    assert "ctx_size" not in line


def test_reader_that_leaves_early_is_not_an_error() -> None:
    code = "from edgert.cli.main import main; main(['bench', '--help'])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    if process.stdout is None or process.stderr is None:
        pytest.fail("no pipes")
    process.stdout.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait() in (0, 1, 141, -signal.SIGPIPE)
    assert error == b""


def test_bare_program_shows_its_help_as_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = outcome(capsys)
    assert (code, err) == (0, "")
    assert "Commands:" in out


def test_nothing_slow_is_imported_where_ctrl_c_is_not_yet_heard() -> None:
    code = "import sys, edgert.cli.main; print('typer' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-", "<&- 2>&-", "<&- >&- 2>&-"])
def test_closed_standard_streams_are_as_if_they_were_empty(closed: str) -> None:
    command_line = f"exec {sys.executable} -m edgert.cli.main run {closed}"
    done = subprocess.run(
        ["/bin/sh", "-c", command_line], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    if "2>" not in closed:
        assert done.stderr.startswith("error: the prompt is empty")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chat", "", "-p", "x"], "the name of the model is empty"),
        (["chat", "~nobody-here/x", "-p", "x"], "there is no such user"),
        (["chat", "-f", "~nobody-here/x"], "there is no such user"),
        (["eval", "-m", "x", "~nobody-here/x"], "there is no such user"),
        (["chat", "-f", "/dev/zero"], "/dev/zero: larger than 1,024 bytes of text"),
    ],
)
def test_paths_that_cannot_be_are_named(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr(opening, "_LARGEST_TEXT_BYTES", 1024)
    code, _, err = outcome(capsys, *arguments)
    assert (code, message in err) == (2, True)


def test_log_level_comes_from_the_environment(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_LOG", "loud")
    assert outcome(capsys, "doctor")[::2] == (
        2,
        "error: variable EDGERT_LOG: 'loud' is not one of DEBUG, INFO, WARNING, ERROR\n",
    )
    wanted: list[object] = []
    monkeypatch.setattr("logging.basicConfig", lambda **options: wanted.append(options["level"]))
    monkeypatch.setenv("EDGERT_LOG", "warning")
    outcome(capsys, "doctor")
    assert wanted == ["WARNING"]


def test_reader_that_leaves_during_a_reply_gives_the_code_of_a_broken_pipe() -> None:
    arguments = ["chat", "-t", "1", "-p", "Tell me a story.", "--overflow", "shift"]
    process = subprocess.Popen(
        [sys.executable, "-m", "edgert.cli.main", *arguments, "--grammar", "root ::= [a-z] root"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if process.stdout is None or process.stderr is None:
        pytest.fail("no pipes")
    process.stdout.read(3)
    process.stdout.close()
    assert b"Traceback" not in process.stderr.read()
    process.stderr.close()
    assert process.wait() == 141


def test_terminal_of_another_encoding_gets_a_mark_for_what_it_cannot_show() -> None:
    arguments = ["chat", "-t", "1", "-p", "hi", "--grammar", 'root ::= "é!"']
    done = subprocess.run(
        [sys.executable, "-m", "edgert.cli.main", *arguments],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, b"?!\n")
