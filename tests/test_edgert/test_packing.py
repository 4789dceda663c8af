"""`pack`: what lies where, what happens after a cut, and what is refused."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import builders_manifest as build
from edgert.errors import CapacityError, ConfigError, FormatError
from edgert.events import Event, LoadProgress
from edgert.packing.blobs import Blob
from edgert.packing.materialise import Artifact, HostPart, Materialiser, whole_model
from edgert.packing.pack import Packed, pack
from partition.manifest import Manifest
from partition.manifest_file import canonical_json

LONG = bytes(range(256)) * 40_000  # three pieces
DIGEST = hashlib.sha256(LONG).hexdigest()


@pytest.fixture
def manifest() -> Manifest:
    made = build.edited(build.document(), "model.files", [build.model_file("m/model.gguf", LONG)])
    return build.manifest(made)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(LONG)
    return path


def blob_of(out: Path) -> Path:
    return out / "blobs/sha256" / DIGEST


def names(out: Path) -> list[str]:
    return sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())


WHOLE = sorted(
    [".lock", f"blobs/sha256/{DIGEST}"]
    + [f"hosts/home/{name}" for name in ("files.json", "m/model.gguf", "manifest.json")]
)


def test_host_gets_model_index_and_the_same_manifest(
    manifest: Manifest, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    packed = pack(manifest, (model,), out)
    home = packed.host_folders["home"]
    assert names(out) == WHOLE
    assert (home / "m/model.gguf").read_bytes() == LONG
    assert (home / "m/model.gguf").samefile(blob_of(out))
    assert (home / "manifest.json").read_bytes() == canonical_json(manifest)
    index = json.loads((home / "files.json").read_text())
    (entry,) = index["files"]
    assert (entry["path"], entry["sha256"], entry["size_bytes"]) == (
        "m/model.gguf", DIGEST, len(LONG)
    )  # fmt: skip
    assert (home / entry["blob"]).samefile(blob_of(out))


def test_packing_again_writes_no_blob_again(
    manifest: Manifest, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert pack(manifest, (model,), out).n_written == 1
    before = blob_of(out).stat()
    again = pack(manifest, (model,), out)
    assert (again.n_written, again.n_kept) == (0, 1)
    after = blob_of(out).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_same_content_is_stored_once(tmp_path: Path) -> None:
    files = [build.model_file(f"{name}.gguf", b"the same") for name in "ab"]
    made = build.edited(build.document(), "model.files", files)
    made = build.edited(made, "model.weight_bytes", 8)
    source = tmp_path / "same.gguf"
    source.write_bytes(b"the same")
    packed = pack(build.manifest(made), (source, source), tmp_path / "out")
    assert packed.n_written == 1
    assert len(list((tmp_path / "out/blobs/sha256").iterdir())) == 1


def test_cut_short_pack_is_continued_where_it_stopped(
    manifest: Manifest, model: Path, tmp_path: Path
) -> None:
    out, heard = tmp_path / "out", list[Event]()

    def cut(event: Event) -> None:
        if isinstance(event, LoadProgress) and event.done_bytes > len(LONG) // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(manifest, (model,), out, listener=cut)
    part = blob_of(out).with_name(f"{DIGEST}.part")
    n_done = part.stat().st_size
    assert 0 < n_done < len(LONG)
    assert not (out / "hosts").exists()
    pack(manifest, (model,), out, listener=heard.append)
    assert heard[0] == LoadProgress(n_done, len(LONG))
    assert heard[-1] == LoadProgress(len(LONG), len(LONG))
    assert names(out) == WHOLE
    assert blob_of(out).read_bytes() == LONG


@pytest.mark.parametrize("part", [b"", b"damaged", LONG[:-1] + b"!", LONG + b"more", LONG])
def test_whatever_a_part_holds_the_blob_is_right(
    manifest: Manifest, model: Path, tmp_path: Path, part: bytes
) -> None:
    out = tmp_path / "out"
    blob_of(out).parent.mkdir(parents=True)
    blob_of(out).with_name(f"{DIGEST}.part").write_bytes(part)
    pack(manifest, (model,), out)
    assert blob_of(out).read_bytes() == LONG
    assert names(out) == WHOLE


@pytest.mark.parametrize("damage", [LONG[:-1] + b"!", b"short"])
def test_damaged_blob_is_written_anew_and_linked_anew(
    manifest: Manifest, model: Path, tmp_path: Path, damage: bytes
) -> None:
    out = tmp_path / "out"
    pack(manifest, (model,), out)
    blob_of(out).write_bytes(damage)
    assert pack(manifest, (model,), out).n_written == 1
    assert blob_of(out).read_bytes() == LONG
    assert (out / "hosts/home/m/model.gguf").read_bytes() == LONG


def test_source_with_another_byte_is_refused_naming_both_hashes(
    manifest: Manifest, model: Path, tmp_path: Path
) -> None:
    changed = LONG[:-1] + b"!"
    model.write_bytes(changed)
    with pytest.raises(FormatError) as caught:
        pack(manifest, (model,), tmp_path / "out")
    assert str(model) in caught.value.message
    assert DIGEST in caught.value.message
    assert hashlib.sha256(changed).hexdigest() in caught.value.message
    assert names(tmp_path / "out") == [".lock"]


@pytest.mark.parametrize(
    ("content", "message"),
    [(LONG[:-7], "ends after 10,239,993 of the 10,240,000"), (LONG + b"1", "more than the 10,240")],
)
def test_source_of_another_length_is_refused(
    manifest: Manifest, model: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    model.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        pack(manifest, (model,), tmp_path / "out")
    assert not (tmp_path / "out/hosts").exists()
    assert not blob_of(tmp_path / "out").exists()


def test_missing_source_is_named(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gone\.gguf: cannot read it"):
        pack(manifest, (tmp_path / "gone.gguf",), tmp_path / "out")


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_out_that_is_a_file_is_refused(
    manifest: Manifest, model: Path, tmp_path: Path, place: str
) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ConfigError, match="file"):
        pack(manifest, (model,), tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_second_pack_into_the_same_folder_is_refused(
    manifest: Manifest, model: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another edgert pack is writing"):
            pack(manifest, (model,), out)
    pack(manifest, (model,), out)


def test_too_full_disk_is_refused_before_anything_is_written(model: Path, tmp_path: Path) -> None:
    huge = build.edited(build.document(), "model.files.0.size_bytes", 1 << 59)
    with pytest.raises(CapacityError, match="bytes free, 576,460,752,303,423,488 needed"):
        pack(build.manifest(huge), (model,), tmp_path / "out")
    assert names(tmp_path / "out") == [".lock"]


def test_disk_that_fills_up_is_named_and_the_pack_continues_later(
    manifest: Manifest, model: Path, tmp_path: Path
) -> None:
    (tmp_path / "m.json").write_bytes(canonical_json(manifest))
    code = (
        "import resource, sys, pathlib\n"
        "from edgert.errors import CapacityError\n"
        "from edgert.packing.pack import pack\n"
        "from partition.manifest_file import read_manifest\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5_000_000, 5_000_000))\n"
        "try:\n"
        "    pack(read_manifest(folder / 'm.json'), (folder / 'model.gguf',), folder / 'out')\n"
        "except CapacityError as error:\n    print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{tmp_path / 'out'}")
    assert names(tmp_path / "out") == [".lock", f"blobs/sha256/{DIGEST}.part"]
    pack(manifest, (model,), tmp_path / "out")
    assert names(tmp_path / "out") == WHOLE


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (build.two_hosts, "host home (stage s0: layers 0 to 1) needs a file of its layers only"),
        (build.shared, "groups 0 to 3 of 4) needs a file of its share of the layers"),
    ],
)
def test_part_of_a_model_that_cannot_be_made_yet_is_named(
    model: Path, tmp_path: Path, made: object, message: str
) -> None:
    document = made() if callable(made) else {}
    with pytest.raises(ConfigError) as caught:
        pack(
            build.manifest(document),
            (model,),
            tmp_path / "out",
            materialisers={"whole": whole_model},
        )
    assert message in caught.value.message
    assert not (tmp_path / "out").exists()


def test_packed_layout_is_refused_with_the_reason(model: Path, tmp_path: Path) -> None:
    made = build.edited(build.document(), "stages.0.tiers.layout", "packed")
    with pytest.raises(ConfigError, match="belongs to one processor"):
        pack(build.manifest(made), (model,), tmp_path / "out")


def test_model_with_the_name_of_our_files_is_refused(model: Path, tmp_path: Path) -> None:
    made = build.edited(build.document(), "model.files.0.path", "manifest.json")
    with pytest.raises(ConfigError, match="as a file of ours"):
        pack(build.manifest(made), (model,), tmp_path / "out")


class OfLayers:
    """A materialiser as a later one would be: content that it generates."""

    def __call__(self, part: HostPart) -> tuple[Artifact, ...]:
        (stage,) = part.stages
        content = f"layers {stage.first_layer} to {stage.end_layer}".encode()

        def read(offset: int) -> Iterator[bytes]:
            yield content[offset:]

        digest = hashlib.sha256(content).hexdigest()
        return (Artifact("thin.gguf", "model", Blob(digest, len(content), "layers", read)),)


def test_later_materialisers_plug_in_by_kind(model: Path, tmp_path: Path) -> None:
    maker: Materialiser = OfLayers()
    packed: Packed = pack(
        build.manifest(build.two_hosts()), (model,), tmp_path / "out",
        materialisers={"layers": maker},
    )  # fmt: skip
    texts = {host: (at / "thin.gguf").read_text() for host, at in packed.host_folders.items()}
    assert texts == {"home": "layers 0 to 1", "board": "layers 1 to 4"}


def refuse_links(*arguments: object) -> None:
    raise PermissionError(1, "Operation not permitted", *map(str, arguments))


def test_disk_without_links_gets_copies(
    manifest: Manifest, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse_links)
    pack(manifest, (model,), tmp_path / "out")
    copy = tmp_path / "out/hosts/home/m/model.gguf"
    assert copy.read_bytes() == LONG
    assert not copy.samefile(blob_of(tmp_path / "out"))
    assert names(tmp_path / "out") == WHOLE


@pytest.mark.parametrize("damage", [None, LONG[:-1] + b"!", b"short"])
def test_copy_is_kept_when_it_is_whole_and_made_anew_when_not(
    manifest: Manifest, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    damage: bytes | None,
) -> None:  # fmt: skip
    monkeypatch.setattr(os, "link", refuse_links)
    copy = tmp_path / "out/hosts/home/m/model.gguf"
    pack(manifest, (model,), tmp_path / "out")
    if damage is not None:
        copy.write_bytes(damage)
    before = copy.stat()
    pack(manifest, (model,), tmp_path / "out")
    assert (copy.stat().st_ino == before.st_ino) == (damage is None)
    assert copy.read_bytes() == LONG
    assert names(tmp_path / "out") == WHOLE


def test_room_is_wanted_for_copies_too_where_there_are_no_links(
    manifest: Manifest, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    free_bytes = len(LONG) + len(LONG) // 2
    status = os.statvfs(tmp_path)
    small = os.statvfs_result((1, 1, *tuple(status)[2:4], free_bytes, *tuple(status)[5:]))
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    monkeypatch.setattr(os, "link", refuse_links)
    wanted = f"{free_bytes:,} bytes free, {2 * len(LONG):,} needed"
    with pytest.raises(CapacityError, match=wanted):
        pack(manifest, (model,), out)
    assert names(out) == [".lock"]
    monkeypatch.undo()
    monkeypatch.setattr(os, "statvfs", lambda _: small)
    pack(manifest, (model,), out)
    monkeypatch.setattr(os, "link", refuse_links)
    (out / "hosts/home/m/model.gguf").unlink()
    pack(manifest, (model,), out)  # the blob is there: the copy alone fits
    assert names(out) == WHOLE
