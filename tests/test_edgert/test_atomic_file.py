"""Files that are there whole or not at all."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

import pytest

from edgert.atomic_file import PRIVATE, write_file, write_stream
from edgert.errors import CapacityError, ConfigError, EdgertError


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (errno.ENOSPC, CapacityError),
        (errno.EDQUOT, CapacityError),
        (errno.EFBIG, CapacityError),
        (errno.EIO, ConfigError),
        (errno.EROFS, ConfigError),
    ],
)
@pytest.mark.parametrize("replace", [True, False])
def test_failed_write_leaves_what_was_there(
    tmp_path: Path, code: int, kind: type[EdgertError], replace: bool
) -> None:
    path = tmp_path / "file"
    if replace:
        path.write_text("old")

    def fail(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise OSError(code, os.strerror(code))

    with pytest.raises(kind, match=os.strerror(code)) as caught:
        write_stream(path, fail, replace=replace)
    assert caught.value.hint is not None
    assert [item.read_text() for item in tmp_path.iterdir()] == (["old"] if replace else [])


def test_interrupted_write_leaves_what_was_there(tmp_path: Path) -> None:
    def stop(stream: BinaryIO) -> None:
        stream.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_stream(tmp_path / "file", stop, replace=True)
    assert list(tmp_path.iterdir()) == []


def test_private_file_is_never_readable_by_others(tmp_path: Path) -> None:
    def look(stream: BinaryIO) -> None:
        assert stat.S_IMODE(os.fstat(stream.fileno()).st_mode) == 0o600

    write_stream(tmp_path / "key", look, replace=False, mode=PRIVATE)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize("links", [True, False])
def test_file_that_appears_meanwhile_is_not_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    path = tmp_path / "file"
    if not links:

        def refuse(*arguments: object) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM), *map(str, arguments))

        monkeypatch.setattr(os, "link", refuse)

    def meanwhile(stream: BinaryIO) -> None:
        stream.write(b"ours")
        path.write_text("theirs")

    with pytest.raises(ConfigError, match="there is such a file"):
        write_stream(path, meanwhile, replace=False)
    assert [item.read_text() for item in tmp_path.iterdir()] == ["theirs"]
    path.unlink()
    write_file(path, b"ours", replace=False)
    assert [item.read_text() for item in tmp_path.iterdir()] == ["ours"]


def test_dangling_link_counts_as_a_file(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(ConfigError, match="there is such a file"):
        write_file(tmp_path / "link", b"", replace=False)
