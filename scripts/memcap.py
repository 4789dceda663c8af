#!/usr/bin/env python3
"""Run a command under a hard memory limit, cold page cache, optionally slower flash; needs root.

The limit is a cgroup's (v1 or v2) and counts page cache too, as on a machine with that much memory.
What the command prints goes through; a JSON line with the peak and the exit code goes to stderr.

usage: memcap.py LIMIT [--flash-bps N] -- COMMAND...      LIMIT such as 2000M or 1.5GiB
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from edgert.units import parse_bytes

_ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class CapResult:
    """What a capped command did.

    Attributes:
        returncode: Its exit status; negative for a signal.
        stdout: What it printed.
        peak_bytes: The cgroup's peak, page cache included.
        n_limit_hits: How often it needed memory that the limit refused at first; 0 means that
            nothing, not even page cache, ever had to make room.
    """

    returncode: int
    stdout: str
    peak_bytes: int
    n_limit_hits: int


@dataclass(frozen=True, slots=True)
class ControlGroup:
    """A limit that processes join: memory with page cache, and flash.

    Attributes:
        folders: One for each controller, or the only one.
        unified: Whether it is a cgroup of version 2.
    """

    folders: tuple[Path, ...]
    unified: bool

    def join(self) -> None:
        """Put this process into it; for a new process before it runs its program."""
        for folder in self.folders:
            (folder / "cgroup.procs").write_text(str(os.getpid()))

    @property
    def peak_bytes(self) -> int:
        """Its peak, page cache included."""
        peak = "memory.peak" if self.unified else "memory.max_usage_in_bytes"
        return int((self.folders[0] / peak).read_text())

    @property
    def n_limit_hits(self) -> int:
        """How often the limit refused memory at first."""
        memory = self.folders[0]
        if not self.unified:
            return int((memory / "memory.failcnt").read_text())
        events = dict(line.split() for line in (memory / "memory.events").read_text().splitlines())
        return int(events["max"])


@contextmanager
def control_group(
    name: str, limit_bytes: int | None, flash_bps: int | None, folder: Path
) -> Iterator[ControlGroup]:
    """Make a control group and remove it; whoever joined must have ended by then.

    Args:
        name: Of its own.
        limit_bytes: The memory limit; None for none.
        flash_bps: Most bytes per second read from the disk of `folder`; None for its own speed.
        folder: Where the model is.
    """
    unified = not (_ROOT / "memory").is_dir()
    memory = _ROOT / name if unified else _ROOT / "memory" / name
    block = memory if unified else _ROOT / "blkio" / name
    folders = tuple(dict.fromkeys([memory, block]))
    if unified:
        (_ROOT / "cgroup.subtree_control").write_text("+memory +io")
    made: list[Path] = []
    try:
        for one in folders:
            one.mkdir()
            made.append(one)
        if limit_bytes is not None:
            limit_file = "memory.max" if unified else "memory.limit_in_bytes"
            (memory / limit_file).write_text(str(limit_bytes))
            _forbid_swap(memory, unified, limit_bytes)
        if flash_bps is not None:
            _throttle(block, unified, flash_bps, folder)
        yield ControlGroup(folders, unified)
    finally:
        for one in made:
            one.rmdir()


def run_capped(
    command: list[str], limit_bytes: int | None, flash_bps: int | None, folder: Path
) -> CapResult:
    """Run a command in a cgroup of its own.

    Args:
        command: Program and arguments.
        limit_bytes: The memory limit; None for none.
        flash_bps: Most bytes per second read from the disk of `folder`; None for its own speed.
        folder: Where the model is; also the working directory.
    """
    name = f"edgert_cap_{os.getpid()}"
    with control_group(name, limit_bytes, flash_bps, folder) as group:
        drop_caches()
        done = subprocess.run(
            command, cwd=folder, stdout=subprocess.PIPE, text=True,
            preexec_fn=group.join, check=False,
        )  # fmt: skip
        return CapResult(done.returncode, done.stdout, group.peak_bytes, group.n_limit_hits)


def _forbid_swap(memory: Path, unified: bool, limit_bytes: int) -> None:
    swap = memory / ("memory.swap.max" if unified else "memory.memsw.limit_in_bytes")
    if swap.exists():
        swap.write_text("0" if unified else str(limit_bytes))


def _throttle(block: Path, unified: bool, flash_bps: int, folder: Path) -> None:
    device = folder.stat().st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    if unified:
        (block / "io.max").write_text(f"{numbers} rbps={flash_bps}")
    else:
        (block / "blkio.throttle.read_bps_device").write_text(f"{numbers} {flash_bps}")


def drop_caches() -> None:
    """Forget every cached page of every file."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description="run a command under a memory limit")
    parser.add_argument("limit")
    parser.add_argument("--flash-bps", type=int)
    words = sys.argv[1:]
    if "--" not in words[:-1]:
        parser.error("the command comes after --")
    split = words.index("--")
    arguments, command = parser.parse_args(words[:split]), words[split + 1 :]
    result = run_capped(command, parse_bytes(arguments.limit), arguments.flash_bps, Path.cwd())
    sys.stdout.write(result.stdout)
    summary = {
        "peak_bytes": result.peak_bytes,
        "n_limit_hits": result.n_limit_hits,
        "returncode": result.returncode,
    }
    print(json.dumps(summary), file=sys.stderr)
    return result.returncode


if __name__ == "__main__":
    raise SystemExit(main())
