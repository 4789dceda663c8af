"""Temporary files of the flash probe: written whole, gone afterwards, stale ones removed."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from devices import scratch as module
from devices.scratch import remove_stale, scratch_file
from edgert.errors import MeasurementError


def test_scratch_file_is_written_and_gone_afterwards(tmp_path: Path) -> None:
    with scratch_file(tmp_path / "cache", 16 << 20) as path:
        assert path.stat().st_size == 16 << 20
    assert list((tmp_path / "cache").iterdir()) == []


def test_scratch_file_is_gone_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), scratch_file(tmp_path, 16 << 20):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_full_disk_is_an_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(_descriptor: int, _content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", write)
    with pytest.raises(MeasurementError, match="No space left"), scratch_file(tmp_path, 16 << 20):
        pass
    assert list(tmp_path.iterdir()) == []


def test_almost_full_disk_is_not_written_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_BYTES", 1 << 60)
    with pytest.raises(MeasurementError, match="too little"), scratch_file(tmp_path, 16 << 20):
        pass
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MeasurementError), scratch_file(tmp_path / "file", 16 << 20):
        pass


def test_files_of_killed_probes_are_removed_and_nothing_else(tmp_path: Path) -> None:
    with scratch_file(tmp_path, 16 << 20) as path:
        assert path.stat().st_size == 16 << 20
        assert list(tmp_path.iterdir()) == []  # nothing is left of it, whatever ends the process
    (tmp_path / "flash-probe-x").write_bytes(b"killed while it was filled")
    other, link, folder = (tmp_path / name for name in ("model", "flash-probe-a", "flash-probe-b"))
    other.touch()
    link.symlink_to(other)
    folder.mkdir()
    remove_stale(tmp_path)
    assert sorted(tmp_path.iterdir()) == sorted([other, link, folder])
    remove_stale(tmp_path / "nothing")
