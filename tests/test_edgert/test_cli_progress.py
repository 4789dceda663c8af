"""Progress: bars on a terminal, notices everywhere, silence in a pipe."""

from __future__ import annotations

import io
from pathlib import Path

from edgert.cli.command import Context
from edgert.cli.progress import ProgressListener
from edgert.config import directories
from edgert.events import LoadProgress, Notice, PrefillProgress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def context(stderr: io.StringIO, folder: Path) -> Context:
    places = directories({"EDGERT_HOME": str(folder)})
    env = {"NO_COLOR": "1", "COLUMNS": "20"}
    return Context(io.StringIO(), io.StringIO(), stderr, env, places, {})


def test_pipe_gets_notices_and_no_bars(tmp_path: Path) -> None:
    stderr = io.StringIO()
    with ProgressListener(context(stderr, tmp_path)) as listener:
        listener(LoadProgress(1, 10))
        listener(Notice("reads go through the page cache"))
        listener(PrefillProgress(100, 512))
    assert stderr.getvalue() == "note: reads go through the page cache\n"


def test_terminal_gets_a_bar_that_goes_away(tmp_path: Path) -> None:
    stderr = Terminal()
    with ProgressListener(context(stderr, tmp_path)) as listener:
        listener(LoadProgress(5, 10))
        listener(LoadProgress(10, 10))
        listener(PrefillProgress(256, 512))
    shown = stderr.getvalue()
    assert "load" in shown
    assert "50%" in shown
    assert "prefill" in shown
    assert shown.rstrip("\n").endswith("\x1b[2K")  # the last thing done is erasing the line
    assert "\x1b[3" not in shown  # no colour


def test_short_prefill_shows_nothing(tmp_path: Path) -> None:
    stderr = Terminal()
    with ProgressListener(context(stderr, tmp_path)) as listener:
        listener(PrefillProgress(1, 20))
    assert stderr.getvalue() == ""


def test_quiet_listener_shows_notices_only(tmp_path: Path) -> None:
    stderr = Terminal()
    with ProgressListener(context(stderr, tmp_path), quiet=True) as listener:
        listener(LoadProgress(1, 10))
    assert stderr.getvalue() == ""
