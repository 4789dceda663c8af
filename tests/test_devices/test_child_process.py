"""Probes in child processes: whatever happens to them is a reason, never our end."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from devices.child_process import ChildProbe, run_child
from edgert.errors import MeasurementError


def child(tmp_path: Path, body: str, most_s: float = 20.0) -> str:
    """Run a module that does this."""
    (tmp_path / "planted_probe.py").write_text(f"import os, signal, sys, time\n{body}\n")
    probe = ChildProbe("a probe", "planted_probe", "argument", most_s)
    return run_child(probe, {**os.environ, "PYTHONPATH": str(tmp_path)})


def reason(tmp_path: Path, body: str, most_s: float = 20.0) -> str:
    with pytest.raises(MeasurementError) as caught:
        child(tmp_path, body, most_s)
    return caught.value.message


def test_result_is_the_last_line(tmp_path: Path) -> None:
    assert child(tmp_path, "print('noise'); print(sys.argv[1]); print()") == "argument"


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGKILL", "SIGILL"])
def test_crash_names_the_signal(tmp_path: Path, name: str) -> None:
    said = reason(tmp_path, f"os.kill(os.getpid(), signal.{name})")
    assert said == f"a probe: the probe crashed with {name}"


def test_crash_keeps_what_was_said_last(tmp_path: Path) -> None:
    body = "print('GGML_ASSERT(x) failed', file=sys.stderr, flush=True); os.abort()"
    assert reason(tmp_path, body) == (
        "a probe: the probe crashed with SIGABRT: GGML_ASSERT(x) failed"
    )


def test_probe_that_hangs_is_killed(tmp_path: Path) -> None:
    body = f"open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    assert "no result within" in reason(tmp_path, body, most_s=1.0)
    pid = int((tmp_path / "pid").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_probe_that_closes_its_output_and_stays_is_killed(tmp_path: Path) -> None:
    body = "os.close(1); os.close(2); time.sleep(600)"
    assert "did not end" in reason(tmp_path, body, most_s=0.5)


def test_endless_output_is_cut(tmp_path: Path) -> None:
    assert "said more than" in reason(tmp_path, "while True: os.write(1, b'x' * 65536)")


def test_reported_error_is_the_reason(tmp_path: Path) -> None:
    body = "print('error: no kernels'); sys.exit(5)"
    assert reason(tmp_path, body) == "a probe: no kernels"


def test_python_error_is_the_reason(tmp_path: Path) -> None:
    assert "ZeroDivisionError" in reason(tmp_path, "1 / 0")


def test_silence_is_no_result(tmp_path: Path) -> None:
    assert "exit code 0" in reason(tmp_path, "pass")


def test_escape_codes_do_not_reach_messages(tmp_path: Path) -> None:
    assert "\x1b" not in reason(tmp_path, "print('error: \\x1b[31mred'); sys.exit(5)")


def test_folder_it_is_started_in_is_not_searched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "planted_here.py").write_text("print('ours')")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(MeasurementError, match="planted_here"):
        run_child(ChildProbe("a probe", "planted_here"), {"PATH": os.environ["PATH"]})


def test_python_that_is_gone_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(MeasurementError, match="cannot start"):
        run_child(ChildProbe("a probe", "planted_probe"), {})
