"""Edge and cloud in two precisions, through the programs: planned, sent, run, refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from partition.manifest_file import read_manifest
from planned_models import outcome
from requantized import requantize
from worker_processes import TINY, Cluster

pytestmark = pytest.mark.model

CUT = 4
REPLY = ("-p", "Hello", "-n", "40", "--temp", "0")


@pytest.fixture(scope="module")
def planned(cluster: Cluster) -> Path:
    """A cut with the back in Q4_0, and one file that has both precisions beside it."""
    back = requantize(TINY, cluster.folder / "q4_0.gguf", Kind.Q4_0)
    requantize(
        TINY, cluster.folder / "mixed.gguf", Kind.Q4_0,
        lambda name: name.startswith("blk.") and int(name.split(".")[1]) >= CUT,
    )  # fmt: skip
    return cluster.plan(
        "two", 2, "--back", str(back), "--stay", f"0:{CUT}=home", "--stay", f"{CUT}:8=w1",
        "--no-measure",
    )  # fmt: skip


@pytest.mark.usefixtures("home")
def test_reply_of_a_cut_is_that_of_one_file_with_both_precisions(
    planned: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    mixed = str(planned.parent / "mixed.gguf")
    code, wanted, err = outcome(capsys, "run", mixed, "-t", "1", "-c", "1024", *REPLY)
    assert code == 0, err
    manifest = read_manifest(planned)
    assert [stage.variant for stage in manifest.stages] == [None, 0]
    with cluster.worker("w1") as (_, host):
        arguments = ("run", "--manifest", str(planned), "--host", host, *REPLY)
        code, found, err = outcome(capsys, *arguments)
    assert code == 0, err
    assert "home: layers 0 to 4" in err
    assert "w1: layers 4 to 8" in err
    assert found == wanted


@pytest.mark.usefixtures("home")
def test_pack_gives_the_other_host_parts_of_its_precision(
    planned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (planned.parent / "tiny-chat.gguf").symlink_to(TINY)
    code, out, err = outcome(capsys, "pack", str(planned), str(tmp_path / "out"), "--json")
    assert code == 0, err
    folders = {name: Path(place) for name, place in json.loads(out)["hosts"].items()}
    sizes = {name: (folder / f"s{index}.gguf").stat().st_size
             for index, (name, folder) in enumerate(sorted(folders.items()))}  # fmt: skip
    assert sizes["w1"] < 0.6 * sizes["home"]  # as many layers, in 4.5 bits instead of 8.5


@pytest.mark.usefixtures("home")
def test_variant_that_is_gone_or_another_file_is_refused_before_anything_is_sent(
    planned: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    back = planned.parent / "q4_0.gguf"
    content = back.read_bytes()
    arguments = ("run", "--manifest", str(planned), "--host", "w1=127.0.0.1:9", *REPLY)
    try:
        back.unlink()
        code, _, err = outcome(capsys, *arguments)
        assert (code, "q4_0.gguf: there is no such file" in err) == (2, True), err
        back.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        code, _, err = outcome(capsys, *arguments)
        assert (code, "the manifest says" in err) == (3, True), err
    finally:
        back.write_bytes(content)
