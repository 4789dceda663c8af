"""Finding the model of a manifest, and the hashes that make sure it is the one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path

import pytest

import builders_manifest as build
from edgert.errors import Cancelled, ConfigError, FormatError
from edgert.events import Event, LoadProgress
from edgert.model_files import FileHashes, file_sha256, find, locate
from partition.manifest import Manifest

DIGEST = hashlib.sha256(build.CONTENT).hexdigest()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A manifest's path, its model beside it."""
    (tmp_path / "model.gguf").write_bytes(build.CONTENT)
    return tmp_path / "m.json"


def counting(folder: Path) -> tuple[FileHashes, list[Event]]:
    heard: list[Event] = []
    return FileHashes(folder, heard.append), heard


def of_two_files() -> Manifest:
    files = [
        build.model_file("parts/a.gguf", b"first"),
        build.model_file("parts/b.gguf", b"second"),
    ]
    made = build.edited(build.document(), "model.files", files)
    return build.manifest(build.edited(made, "model.weight_bytes", 11))


def test_model_is_found_beside_the_manifest_from_any_folder(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir("/")
    assert locate(build.manifest(), place) == (place.parent / "model.gguf",)


def test_file_that_a_person_names_is_used_instead(place: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere.gguf"
    other.write_bytes(build.CONTENT)
    assert locate(build.manifest(), Path("/nowhere/m.json"), other) == (other,)
    assert locate(build.manifest(), Path("/nowhere/m.json"), place.parent) == (
        place.parent / "model.gguf",
    )


def test_other_files_lie_beside_the_named_one(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "renamed.gguf").write_bytes(b"first")
    (folder / "b.gguf").write_bytes(b"second")
    found = locate(of_two_files(), Path("/nowhere/m.json"), folder / "renamed.gguf")
    assert found == (folder / "renamed.gguf", folder / "b.gguf")


@pytest.mark.parametrize("other", ["secrets/key", "x/key", "x/yy/key"])
def test_named_file_never_leads_to_files_outside_its_folder(tmp_path: Path, other: str) -> None:
    files = [build.model_file("x/y/z.gguf", b"first"), build.model_file(other, b"second")]
    made = build.edited(build.document(), "model.files", files)
    manifest = build.manifest(build.edited(made, "model.weight_bytes", 11))
    for path, content in (("x/y/z.gguf", b"first"), (other, b"second")):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_bytes(content)
    with pytest.raises(ConfigError, match=f"{other} does not lie below the folder of x/y/z") as e:
        find(manifest, Path("/nowhere/m.json"), tmp_path / "x/y/z.gguf")
    assert "-m FOLDER" in str(e.value.hint)
    assert find(manifest, Path("/nowhere/m.json"), tmp_path)[1] == tmp_path / other


def test_missing_model_is_named_with_the_flag_that_helps(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.gguf: there is no such file") as caught:
        locate(build.manifest(), tmp_path / "m.json")
    assert caught.value.hint is not None
    assert "-m FILE" in caught.value.hint


def test_model_of_another_size_is_refused_without_hashing(place: Path) -> None:
    (place.parent / "model.gguf").write_bytes(build.CONTENT[:-1])
    with pytest.raises(FormatError, match="21 bytes, the manifest says 22"):
        find(build.manifest(), place)


def test_model_with_another_byte_is_refused_naming_both_hashes(place: Path) -> None:
    changed = build.CONTENT[:-1] + b"!"
    (place.parent / "model.gguf").write_bytes(changed)
    with pytest.raises(FormatError) as caught:
        locate(build.manifest(), place)
    assert DIGEST in caught.value.message
    assert hashlib.sha256(changed).hexdigest() in caught.value.message


def test_folder_or_pipe_is_no_model(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match="not a regular file"):
        locate(build.manifest(), tmp_path / "m.json")
    with pytest.raises(ConfigError, match="not a regular file"):
        file_sha256(tmp_path)


def test_hash_is_that_of_hashlib_and_progress_ends_at_the_size(tmp_path: Path) -> None:
    content = os.urandom((4 << 20) * 2 + 12345)
    path = tmp_path / "large"
    path.write_bytes(content)
    heard: list[Event] = []
    assert file_sha256(path, heard.append) == hashlib.sha256(content).hexdigest()
    assert heard[-1] == LoadProgress(len(content), len(content))
    assert len(heard) == 3


def test_hashing_stops_when_told_to(place: Path) -> None:
    with pytest.raises(Cancelled):
        file_sha256(place.parent / "model.gguf", stopped=lambda: True)


def test_file_that_changes_while_it_is_read_is_refused(place: Path) -> None:
    path = place.parent / "model.gguf"

    def change(event: Event) -> None:
        del event
        os.utime(path, (1, 1))

    with pytest.raises(FormatError, match="changed while it was read"):
        file_sha256(path, change)


def test_hash_is_remembered_until_the_file_changes(place: Path, tmp_path: Path) -> None:
    path = place.parent / "model.gguf"
    first, heard = counting(tmp_path / "cache")
    assert first.of(path) == DIGEST
    assert heard
    second, heard = counting(tmp_path / "cache")
    assert second.of(path) == DIGEST
    assert heard == []
    changed = build.CONTENT[::-1]
    path.write_bytes(changed)
    os.utime(path, (5, 5))
    assert second.of(path) == hashlib.sha256(changed).hexdigest()


def test_same_size_and_time_but_another_file_is_hashed_again(place: Path, tmp_path: Path) -> None:
    path = place.parent / "model.gguf"
    os.utime(path, ns=(5, 5))
    hashes = FileHashes(tmp_path / "cache")
    hashes.of(path)
    other = tmp_path / "other"
    other.write_bytes(build.CONTENT[::-1])
    os.utime(other, ns=(5, 5))
    other.replace(path)
    assert hashes.of(path) == hashlib.sha256(build.CONTENT[::-1]).hexdigest()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b'{"format_version": 9}', b'{"files": {"a": 1}}', b"[" * 100000],
    ids=range(6),
)  # fmt: skip
def test_damaged_cache_is_ignored_with_a_warning(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: bytes
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "file-hashes.json").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert FileHashes(cache).of(place.parent / "model.gguf") == DIGEST
    assert "is damaged and ignored" in caplog.text
    assert len(json.loads((cache / "file-hashes.json").read_text())["files"]) == 1


def test_cache_that_cannot_be_written_costs_time_only(
    place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert FileHashes(tmp_path / "cache").of(place.parent / "model.gguf") == DIGEST
    assert "not remembered" in caplog.text
