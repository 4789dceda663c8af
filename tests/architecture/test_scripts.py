"""The setup script: what it says when something is missing."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent


def set_up(tmp_path: Path, python: str, path: str) -> tuple[int, str]:
    """Run a copy of the script, so that nothing here is changed, with a made-up python."""
    script = tmp_path / "scripts" / "setup"
    script.parent.mkdir()
    shutil.copy(ROOT / "scripts" / "setup", script)
    interpreter = tmp_path / "bin" / "fake-python"
    interpreter.parent.mkdir()
    interpreter.write_text(f"#!/bin/sh\n{python}\n")
    interpreter.chmod(0o755)
    env = {"PATH": path, "PYTHON": str(interpreter)}
    done = subprocess.run(
        ["/bin/bash", str(script)], env=env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("python", "problem"),
    [
        ('case "$2" in *version_info*) exit 1;; esac; echo Python 3.9', "is too old"),
        ('case "$2" in *ensurepip*) exit 1;; esac; echo Python 3.11', "without venv and ensurepip"),
        ("exit 0", "no C++ compiler"),
    ],
)
def test_what_is_missing_is_named_with_the_command_that_helps(
    tmp_path: Path, python: str, problem: str
) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("dirname",):
        (tools / name).symlink_to(shutil.which(name, path=os.defpath) or f"/usr/bin/{name}")
    code, error = set_up(tmp_path, python, str(tools))
    assert code == 2
    assert error.startswith("error: ")
    assert problem in error
    assert "hint: " in error
    assert not (tmp_path / ".venv").exists()
