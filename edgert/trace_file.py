"""The file that a recording becomes: checked before the model is loaded, written after the run."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

from edgert.atomic_file import write_stream
from edgert.errors import ConfigError
from edgert.recorder import Recorder, Tape
from edgert.timeline import trace_pieces

_START = b'{"displayTimeUnit"'


def record_to(path: Path) -> Recorder:
    """Return a recorder that writes a trace to `path` when its backend is closed.

    Raises:
        ConfigError: nothing can be written there, or there is a file that is no trace.
    """
    check_writable(path)
    tape = Tape()

    def finish() -> None:
        def write(stream: BinaryIO) -> None:
            for piece in trace_pieces([tape.timeline()]):
                stream.write(piece.encode())

        write_stream(path, write, replace=True)

    return Recorder(tape, finish=finish)


def check_writable(path: Path) -> None:
    """Refuse a place where a trace cannot be put, or would take the place of something else.

    Raises:
        ConfigError: says which.
    """
    try:
        _refuse(path, _problem(path))
    except OSError as error:
        _refuse(path, error.strerror or str(error))


def _refuse(path: Path, problem: str | None) -> None:
    if problem is not None:
        raise ConfigError(
            f"trace {path}: {problem}", hint="name a new file in a folder that can be written to"
        )


def _problem(path: Path) -> str | None:
    folder = path.parent
    if path.is_dir():
        return "is a folder"
    if not folder.is_dir():
        return "its folder does not exist"
    if not os.access(folder, os.W_OK | os.X_OK):
        return "its folder cannot be written to"
    if not os.path.lexists(path):
        return None
    if not path.is_file():
        return "is not a regular file"
    with path.open("rb") as file:
        start = file.read(len(_START))
    return None if start in (b"", _START) else "is a file already, and not a trace"
