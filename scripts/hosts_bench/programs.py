"""Processes of a benchmark: pinned, limited, in a namespace, and gone afterwards."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from memcap import ControlGroup

Job = dict[str, Any]
_END_S = 15.0


def say(text: str) -> None:
    """Show progress where results do not go."""
    print(text, file=sys.stderr, flush=True)


class Program:
    """One process, ended by `close`: SIGTERM, and SIGKILL if that is not enough.

    Args:
        command: Program and arguments.
        log: What it writes to stderr, and the name of both streams in errors.
        namespace: Of the network; None is this one's.
        core: The only core that it may use.
        group: Control group that it joins.
        home: Its EDGERT_HOME.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        namespace: str | None = None,
        core: int | None = None,
        group: ControlGroup | None = None,
        home: Path | None = None,
    ) -> None:
        def begin() -> None:
            if core is not None:
                os.sched_setaffinity(0, {core})
            if group is not None:
                group.join()

        # nsenter, as `ip netns exec` would hide the control groups.
        inside = [] if namespace is None else ["nsenter", f"--net=/var/run/netns/{namespace}"]
        scripts = Path(__file__).resolve().parents[1]
        path = os.pathsep.join([str(scripts), str(scripts.parent)])
        environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        if home is not None:
            environment["EDGERT_HOME"] = str(home)
        self.log = log
        with log.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*inside, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr,
                env=environment, preexec_fn=begin, start_new_session=True,
            )  # fmt: skip
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def cpu_s(self) -> float:
        """Seconds of processor time so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def wait_for(self, text: str, deadline_s: float = 60.0) -> None:
        """Wait until it prints a line with a text, on stdout or to its log."""
        until_s = time.monotonic() + deadline_s
        while time.monotonic() < until_s:
            if text in self.log.read_text(errors="replace"):
                return
            line = self._line(0.05)
            if line is not None and text in line:
                return
        raise self._gone(f"did not say {text!r} within {deadline_s:g} s")

    def ask(self, deadline_s: float = 240.0, **job: Any) -> Job:  # noqa: ANN401
        """Send a job as a JSON line and wait for the JSON line that answers it."""
        self.send(**job)
        return self.answer(deadline_s)

    def send(self, **job: Any) -> None:  # noqa: ANN401
        """Send a job as a JSON line."""
        if self._process.stdin is None:
            raise ValueError("no standard input")
        self._process.stdin.write(json.dumps(job).encode() + b"\n")
        self._process.stdin.flush()

    def answer(self, deadline_s: float) -> Job:
        """Wait for a JSON line."""
        line = self._line(deadline_s)
        if line is None:
            raise self._gone(f"did not answer within {deadline_s:g} s")
        found: Job = json.loads(line)
        return found

    def finish(self, deadline_s: float) -> None:
        """Wait for its end; SystemExit if it fails or takes too long."""
        try:
            self._process.communicate(timeout=deadline_s)
        except subprocess.TimeoutExpired as error:
            raise self._gone(f"did not end within {deadline_s:g} s") from error
        if self._process.returncode:
            raise self._gone(f"ended with {self._process.returncode}")

    def signal(self, number: int) -> None:
        """Send a signal."""
        self._process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as a power cut would."""
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        """End it."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.terminate()
            try:
                self._process.wait(_END_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _line(self, wait_s: float) -> str | None:
        """Read one line; None if none comes, SystemExit once the process has ended."""
        if self._process.stdout is None:
            raise ValueError("no standard output")
        until_s = time.monotonic() + wait_s
        while b"\n" not in self._rest:
            left_s = until_s - time.monotonic()
            ready = select.select([self._process.stdout], [], [], max(0.0, left_s))[0]
            if not ready:
                return None
            chunk = os.read(self._process.stdout.fileno(), 1 << 20)
            if not chunk:
                self._process.wait()
                raise self._gone(f"ended with {self._process.returncode}")
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return line.decode()

    def _gone(self, what: str) -> SystemExit:
        tail = self.log.read_text(errors="replace").splitlines()[-15:]
        return SystemExit("\n".join([f"{self.log.stem} {what}", *tail]))
