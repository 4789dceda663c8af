"""The script that makes a topology of profiles."""

from __future__ import annotations

from pathlib import Path

import pytest

import builders_devices as build
import topology
from devices.profile_file import parse_topology


def profile(folder: Path, name: str) -> str:
    path = folder / f"{name}.json"
    path.write_text(build.host("anything").model_dump_json())
    return str(path)


def test_hosts_are_named_as_their_files_and_all_linked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [profile(tmp_path, name) for name in ("laptop", "board", "box")]
    assert topology.main([*paths, "--kind", "wifi", "--round-trip", "0.004"]) == 0
    made = parse_topology(capsys.readouterr().out, "the output")
    assert made.home == "laptop"
    assert [host.host_id for host in made.hosts] == ["laptop", "board", "box"]
    assert len(made.links) == 6
    assert {link.kind for link in made.links} == {"wifi"}
    assert {(link.round_trip_s.value, link.round_trip_s.origin) for link in made.links} == {
        (0.004, "declared")
    }


@pytest.mark.parametrize(
    ("names", "flags", "problem"),
    [
        (["laptop"], [], "wanted two or more"),
        (["laptop", "laptop"], [], "each of its own name"),
        (["laptop", "board"], ["--round-trip", "50"], "round_trip_s"),
        (["laptop", "board"], ["--rate", "1e15"], "bytes_per_s"),
    ],
)
def test_what_cannot_be_is_refused(
    names: list[str], flags: list[str], problem: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    code = topology.main([*(profile(tmp_path, name) for name in names), *flags])
    assert code in (2, 3)
    assert problem in capsys.readouterr().err
    assert topology.main([str(tmp_path / "missing.json"), profile(tmp_path, "b")]) == 2
