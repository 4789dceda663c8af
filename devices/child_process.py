"""Runs a probe as a process of its own: its crash, hang or noise is a reason, not our death."""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edgert.errors import MeasurementError

Clock = Callable[[], float]

_MOST_OUTPUT_BYTES = 1 << 20
_MOST_NOISE_BYTES = 1 << 14
_CHUNK_BYTES = 1 << 16
_MOST_REASON_LETTERS = 300
_ERROR = "error: "


@dataclass(frozen=True, slots=True)
class ChildProbe:
    """A module that prints its result as the last line, or `error: ` and a reason.

    What it says on stderr is only quoted where it crashes: libraries chatter there.

    Attributes:
        what: What it probes, for messages.
        module: Run as the main module of a process that ends with this one.
        argument: Its only argument.
        most_s: Seconds after which it is killed.
    """

    what: str
    module: str
    argument: str = ""
    most_s: float = 60.0

    def command(self) -> list[str]:
        """Return the command line; the folder it is started in is not searched for modules."""
        start = [sys.executable, "-P", "-m", "devices.child_start", str(os.getpid())]
        return [*start, self.module, self.argument]


@dataclass(frozen=True, slots=True)
class _Said:
    """What a child wrote: all of its results, and the end of its noise."""

    result: str
    noise: str


def run_child(probe: ChildProbe, env: Mapping[str, str], clock: Clock = time.monotonic) -> str:
    """Run a probe to its end and return its last line.

    Raises:
        MeasurementError: it could not be started, crashed (names the signal), took too long, said
            too much, or reported an error.
    """
    try:
        process = subprocess.Popen(
            probe.command(), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=_environment(env), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise MeasurementError(f"{probe.what}: cannot start a process: {error.strerror}") from error
    try:
        said = _output(process, probe, clock)
        code = process.wait(max(0.1, probe.most_s))
    except subprocess.TimeoutExpired as error:
        raise MeasurementError(f"{probe.what}: the probe did not end") from error
    finally:
        _end(process)
    return _result(probe, code, said)


def _environment(env: Mapping[str, str]) -> dict[str, str]:
    """Let the child find the same packages, and keep ggml from starting a debugger on abort."""
    root = str(Path(__file__).resolve().parent.parent)
    known = env.get("PYTHONPATH")
    path = os.pathsep.join([root, known]) if known else root
    return {**env, "PYTHONPATH": path, "GGML_NO_BACKTRACE": "1"}


def _output(process: subprocess.Popen[bytes], probe: ChildProbe, clock: Clock) -> _Said:
    """Read what the child says until it closes its output."""
    if process.stdout is None or process.stderr is None:
        raise ValueError("the child's output is no pipe")
    result, noise = bytearray(), bytearray()
    deadline_s = clock() + probe.most_s
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ, result)
        selector.register(process.stderr, selectors.EVENT_READ, noise)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline_s - clock()))
            if clock() >= deadline_s:
                raise MeasurementError(f"{probe.what}: no result within {probe.most_s:g} s")
            for key, _ in ready:
                chunk = os.read(key.fd, _CHUNK_BYTES)
                key.data.extend(chunk)
                if not chunk:
                    selector.unregister(key.fileobj)
            if len(result) > _MOST_OUTPUT_BYTES:
                raise MeasurementError(
                    f"{probe.what}: the probe said more than {_MOST_OUTPUT_BYTES:,} bytes"
                )
            del noise[:-_MOST_NOISE_BYTES]
    return _Said(result.decode("utf-8", "replace"), noise.decode("utf-8", "replace"))


def _end(process: subprocess.Popen[bytes]) -> None:
    """Leave no process behind, whatever happened."""
    if process.poll() is None:
        process.kill()
        process.wait()
    for stream in (process.stdout, process.stderr):
        if stream is not None:
            stream.close()


def _result(probe: ChildProbe, code: int, said: _Said) -> str:
    last = _last_line(said.result)
    if code == 0 and last:
        return last
    noise = _last_line(said.noise) or last
    if code < 0:
        raise MeasurementError(
            f"{probe.what}: the probe crashed with {_signal(-code)}{_why(noise)}"
        )
    if last.startswith(_ERROR):
        raise MeasurementError(f"{probe.what}: {_short(last.removeprefix(_ERROR))}")
    raise MeasurementError(f"{probe.what}: the probe ended with exit code {code}{_why(noise)}")


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _why(last: str) -> str:
    return f": {_short(last)}" if last else ""


def _short(text: str) -> str:
    printable = "".join(letter if letter.isprintable() else "?" for letter in text)
    return printable[:_MOST_REASON_LETTERS]
