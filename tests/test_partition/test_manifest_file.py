"""The canonical form, the published schema and the file of a manifest."""

from __future__ import annotations

import json
import os
import random
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

import builders_manifest as build
from edgert.errors import CapacityError, ConfigError, FormatError
from golden import make_golden
from partition.manifest import Manifest
from partition.manifest_file import (
    canonical_json,
    json_schema,
    parse_manifest,
    read_manifest,
    signed_bytes,
    violations,
    write_manifest,
)

ALL = (
    build.document, build.two_hosts, build.shared, build.streaming, build.onnx, build.traced,
    build.edge_cloud,
)  # fmt: skip


def shuffled(value: object, rng: random.Random) -> object:
    if isinstance(value, dict):
        items = [(key, shuffled(item, rng)) for key, item in value.items()]
        rng.shuffle(items)
        return dict(items)
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


def test_fifo_or_device_is_refused_as_a_manifest_without_waiting(tmp_path: Path) -> None:
    fifo = tmp_path / "plan.json"
    os.mkfifo(fifo)
    for path in (fifo, Path("/dev/zero")):
        with pytest.raises(ConfigError, match=f"{path}: not a regular file") as caught:
            read_manifest(path)
        assert caught.value.hint is not None


@pytest.mark.parametrize("path", make_golden.contents(), ids=lambda path: path.name)
def test_published_files_are_what_make_golden_writes(path: Path) -> None:
    assert path.read_bytes() == make_golden.contents()[path]


def test_golden_manifest_is_valid_and_canonical() -> None:
    content = make_golden.MANIFEST.read_bytes()
    assert canonical_json(parse_manifest(content, "golden")) == content


@pytest.mark.parametrize("made", ALL)
def test_canonical_form_is_read_back_to_the_same_manifest(made) -> None:  # noqa: ANN001
    manifest = build.manifest(made())
    content = canonical_json(manifest)
    assert parse_manifest(content, "m.json") == manifest
    assert canonical_json(parse_manifest(content.decode(), "m.json")) == content


@pytest.mark.parametrize("seed", range(5))
def test_order_spacing_and_spelling_of_numbers_do_not_change_the_canonical_form(seed: int) -> None:
    made = build.two_hosts()
    text = json.dumps(shuffled(made, random.Random(seed)), indent=seed, ensure_ascii=seed % 2 == 0)
    text = text.replace("310.25", "3.1025e+2").replace(": 0.0", ": -0.0")
    assert canonical_json(parse_manifest(text, "m.json")) == canonical_json(build.manifest(made))


def test_left_out_defaults_and_written_ones_are_the_same_text() -> None:
    made = build.document()
    full = canonical_json(build.manifest(made))
    for name in ("transport", "warnings"):
        del made[name]
    assert canonical_json(parse_manifest(build.text(made), "m.json")) == full


def test_manifest_without_a_trace_is_the_text_that_older_signatures_are_over() -> None:
    assert b"routing" not in canonical_json(build.manifest(build.document()))
    assert b"routing" not in signed_bytes(build.manifest(build.document()))
    assert b"routing" in signed_bytes(build.manifest(build.traced()))


def test_manifest_without_variants_is_the_text_that_older_signatures_are_over() -> None:
    assert b"variant" not in canonical_json(build.manifest(build.two_hosts()))
    content = canonical_json(build.manifest(build.edge_cloud()))
    assert [stage.get("variant") for stage in json.loads(content)["stages"]] == [None, 0]
    assert "variant" not in json.loads(content)["stages"][0]


def test_stage_is_of_the_variant_that_it_names() -> None:
    made = build.manifest(build.edge_cloud())
    front, back = made.stages
    assert made.model_of(front).files[0].path == "model.gguf"
    assert made.model_of(back).files[0].path == "f16.gguf"


def test_any_other_value_is_another_text() -> None:
    one = build.manifest(build.edited(build.document(), "predicted.tpot_ms.value", 20.5))
    other = build.manifest(build.edited(build.document(), "predicted.tpot_ms.value", 20.5000000001))
    assert canonical_json(one) != canonical_json(other)


def test_canonical_form_is_utf_8_with_sorted_keys_and_a_last_newline() -> None:
    content = canonical_json(build.manifest(build.edited(build.document(), "model.name", "Größe")))
    assert "Größe".encode() in content
    assert content.endswith(b"}\n")
    keys = list(json.loads(content))
    assert keys == sorted(keys)


def test_schema_is_draft_2020_12_and_forbids_unknown_keys() -> None:
    schema = json_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == "urn:edgert:manifest:1"
    assert schema["additionalProperties"] is False


def test_schema_and_model_know_the_same_keys() -> None:
    properties = json_schema()["properties"]
    assert isinstance(properties, dict)
    assert set(properties) == set(Manifest.model_fields)


def test_frozen_manifest_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        build.manifest().binds = "nothing"  # type: ignore[misc]


def test_written_manifest_is_the_canonical_form(tmp_path: Path) -> None:
    path, manifest = tmp_path / "m.json", build.manifest(build.two_hosts())
    write_manifest(manifest, path, replace=False)
    assert path.read_bytes() == canonical_json(manifest)
    assert read_manifest(path) == manifest
    assert [item.name for item in tmp_path.iterdir()] == ["m.json"]
    assert stat.S_IMODE(path.stat().st_mode) & 0o400


def test_existing_file_is_replaced_only_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"m\.json: there is such a file"):
        write_manifest(build.manifest(), path, replace=False)
    assert path.read_text() == "mine"
    write_manifest(build.manifest(), path, replace=True)
    assert read_manifest(path) == build.manifest()
    assert [item.name for item in tmp_path.iterdir()] == ["m.json"]


def test_manifest_that_breaks_a_rule_is_not_written(tmp_path: Path) -> None:
    wrong = build.manifest(build.edited(build.document(), "stages.0.end_layer", 3))
    assert [str(violation) for violation in violations(wrong)][:2] == [
        "$.stages[0].end_layer: 3, wanted 4, as model.n_layer says",
        '$.stages[0].tiers.pinned[6]: "blk.3.q.weight", wanted a tensor of layers [0, 3)',
    ]
    with pytest.raises(FormatError, match="wanted 4, as model"):
        write_manifest(wrong, tmp_path / "m.json", replace=False)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["missing/m.json", "file/m.json", "."])
def test_place_that_cannot_be_written_is_named(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError) as caught:
        write_manifest(build.manifest(), tmp_path / place, replace=True)
    assert str(tmp_path) in caught.value.message
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("name", ["nothing.json", "."])
def test_missing_manifest_says_how_to_make_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_manifest(tmp_path / name)
    assert caught.value.hint == "edgert plan MODEL makes one"


def test_full_disk_leaves_the_old_manifest_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    write_manifest(build.manifest(), path, replace=False)
    before = path.read_bytes()
    code = (
        "import resource, sys, pathlib\n"
        "from edgert.errors import CapacityError\n"
        "from partition.manifest_file import read_manifest, write_manifest\n"
        "path = pathlib.Path(sys.argv[1])\nmanifest = read_manifest(path)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try:\n    write_manifest(manifest, path, replace=True)\n"
        "except CapacityError as error:\n    print(error.message)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith(f"{path}: ")
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["m.json"]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1000
    assert CapacityError.exit_code == 4
