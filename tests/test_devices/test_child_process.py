"""Probes in child processes: whatever happens to them is a reason, never our end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from devices.child_process import ChildProbe, run_child
from edgert.errors import MeasurementError

ROOT = Path(__file__).parent.parent.parent


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


def test_chatter_on_stderr_does_not_spoil_the_result(tmp_path: Path) -> None:
    body = (
        "import atexit\n"
        "atexit.register(lambda: os.write(2, b'ggml: freeing\\n'))\n"
        "print('the result', flush=True)"
    )
    assert child(tmp_path, body) == "the result"


def test_noise_without_end_is_not_kept_and_does_not_block(tmp_path: Path) -> None:
    body = "for _ in range(64): os.write(2, b'x' * 65536)\nprint('the result')"
    assert child(tmp_path, body) == "the result"


def clock_after(marker: Path) -> Callable[[], float]:
    """A clock that runs out once a file is there; until then a probe is waited for."""
    found = [False]

    def clock() -> float:
        while not found[0] and not marker.exists():
            time.sleep(0.01)
        now_s = 1000.0 if found[0] else 0.0
        found[0] = True
        return now_s

    return clock


def test_probe_that_hangs_is_killed(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    body = (
        f"name = {str(marker)!r}\n"
        "open(name + '.new', 'w').write(str(os.getpid()))\n"
        "os.rename(name + '.new', name)\n"
        "time.sleep(600)"
    )
    (tmp_path / "planted_probe.py").write_text(f"import os, time\n{body}\n")
    # The clock is looked at when the probe has begun, and once more when its time is over.
    clock = clock_after(marker)
    with pytest.raises(MeasurementError, match="no result within"):
        run_child(
            ChildProbe("a probe", "planted_probe", most_s=20.0),
            {**os.environ, "PYTHONPATH": str(tmp_path)},
            clock,
        )
    pid = int(marker.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP])
def test_probe_ends_with_its_parent(tmp_path: Path, number: signal.Signals) -> None:
    marker = tmp_path / "pid"
    (tmp_path / "planted_probe.py").write_text(
        f"import os, time\nname = {str(marker)!r}\n"
        "open(name + '.new', 'w').write(str(os.getpid()))\n"
        "os.rename(name + '.new', name)\ntime.sleep(600)\n"
    )
    parent = subprocess.Popen(
        [
            sys.executable, "-c",
            "import os\nfrom devices.child_process import ChildProbe, run_child\n"
            "run_child(ChildProbe('a probe', 'planted_probe'), os.environ)",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )  # fmt: skip
    try:
        wait_for(marker.exists)
        pid = int(marker.read_text())
        assert is_running(pid)
        parent.send_signal(number)
    finally:
        parent.kill()
        parent.wait()
    wait_for(lambda: not is_running(pid))


def is_running(pid: int) -> bool:
    """Whether a process is there and no zombie that nobody has waited for yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.01)


def test_probe_whose_parent_is_gone_already_does_not_begin(tmp_path: Path) -> None:
    (tmp_path / "planted_probe.py").write_text("print('began')\n")
    done = subprocess.run(
        [sys.executable, "-m", "devices.child_start", "1", "planted_probe", ""],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_probe_that_closes_its_output_and_stays_is_killed(tmp_path: Path) -> None:
    marker = tmp_path / "closed"
    body = f"open({str(marker)!r}, 'w').close(); os.close(1); os.close(2); time.sleep(600)"
    (tmp_path / "planted_probe.py").write_text(f"import os, time\n{body}\n")
    with pytest.raises(MeasurementError, match="did not end"):
        run_child(
            ChildProbe("a probe", "planted_probe", most_s=0.1),
            {**os.environ, "PYTHONPATH": str(tmp_path)},
            lambda: 0.0,  # reading has no end, so however slowly it begins, its output is closed
        )
    assert marker.exists()


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
