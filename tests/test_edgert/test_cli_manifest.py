"""`edgert keys`, `sign`, `schema` and `pack` on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import builders_manifest as build
from edgert.cli import main
from edgert.cli.schema import FORMATS
from partition.manifest_file import json_schema


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.gguf").write_bytes(build.CONTENT)
    (tmp_path / "m.json").write_bytes(build.text(build.document()))
    return tmp_path


def test_manifest_is_packed_for_its_hosts(capsys: pytest.CaptureFixture[str], place: Path) -> None:
    assert outcome(capsys, "pack", "m.json", "out/") == (0, "out/hosts/home\n", "")
    code, out, _ = outcome(capsys, "pack", "m.json", "out", "--json")
    assert (code, json.loads(out)["blobs"]) == (0, {"written": 0, "kept": 1})
    assert outcome(capsys, "pack", "out/hosts/home/manifest.json", "again")[0] == 0
    assert (place / "again/hosts/home/model.gguf").read_bytes() == build.CONTENT


def test_model_that_lies_elsewhere_is_named(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    (place / "model.gguf").rename(place / "moved.gguf")
    code, _, err = outcome(capsys, "pack", "m.json", "out")
    assert code == 2
    assert "hint: name the model with -m FILE" in err
    assert outcome(capsys, "pack", "m.json", "out", "-m", "moved.gguf")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pack"], 2, "no manifest and no model named"),
        (["pack", "m.json"], 2, "where to pack the manifest to is not named"),
        (["pack", "m.json", "out", "--out", "x"], 2, "where to pack"),
        (["pack", "model.gguf", "out"], 2, "model.gguf is no manifest (.json)"),
        (["pack", "gone.json", "out"], 2, "gone.json: cannot read the manifest"),
        (["pack", "m.json", "m.json"], 2, "m.json: is a file, wanted a folder"),
        (["keys"], 2, "nothing, wanted new, host, trust, forget or list"),
        (["keys", "make", "key.pem"], 2, "'make', wanted new, host, trust"),
        (["keys", "new"], 2, "wanted new and a file"),
        (["keys", "new", "m.json"], 2, "m.json: there is such a file already"),
        (["sign", "m.json"], 2, "a manifest and a key are needed"),
        (["sign", "m.json", "--key", "gone.pem"], 2, "gone.pem: no such key file"),
        (["sign", "m.json", "--key", "m.json"], 3, "m.json: not a private key in PEM"),
        (["schema"], 2, "format none, wanted one of manifest, profile, topology"),
        (["schema", "plan"], 2, "format 'plan', wanted one of"),
    ],
    ids=range(15),
)
@pytest.mark.usefixtures("place")
def test_what_is_missing_or_wrong_is_named(
    capsys: pytest.CaptureFixture[str], arguments: list[str], code: int, message: str
) -> None:
    saw, out, err = outcome(capsys, *arguments)
    assert (saw, out) == (code, "")
    assert message in err
    assert "hint: " in err


def test_broken_manifest_is_exit_code_three_and_nothing_is_written(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    wrong = build.edited(build.document(), "model.files.0.path", "../model.gguf")
    (place / "m.json").write_bytes(build.text(wrong))
    code, _, err = outcome(capsys, "pack", "m.json", "out")
    assert code == 3
    assert 'error: m.json: $.model.files[0].path: "../model.gguf", wanted no . or ..' in err
    assert not (place / "out").exists()


def test_only_signed_manifests_pass_when_a_key_is_trusted(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, out, _ = outcome(capsys, "keys", "new", "key.pem")
    key = out.strip()
    assert (code, len(key)) == (0, 64)
    assert outcome(capsys, "pack", "m.json", "out", "--trusted-key", key)[0] == 3
    assert outcome(capsys, "sign", "m.json", "--key", "key.pem") == (0, f"{key}\n", "")
    other = "ab" * 32
    arguments = ["pack", "m.json", "out", "--trusted-key", other]
    assert outcome(capsys, *arguments, "--trusted-key", key)[0] == 0
    code, _, err = outcome(capsys, *arguments)
    assert code == 3
    assert f"{key}, wanted {other}" in err
    monkeypatch.setenv("EDGERT_TRUSTED_KEYS", f"{other},{key}")
    assert outcome(capsys, "pack", "m.json", "out")[0] == 0
    text = (place / "m.json").read_text().replace('"n_ctx": 4096', '"n_ctx": 4095')
    (place / "m.json").write_text(text)
    assert "not a signature of this manifest" in outcome(capsys, "pack", "m.json", "out")[2]


def test_trusted_keys_may_come_from_the_configuration(
    capsys: pytest.CaptureFixture[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGERT_HOME", str(place))
    (place / "config.toml").write_text(f'trusted_keys = ["{"ab" * 32}"]\n')
    code, _, err = outcome(capsys, "pack", "m.json", "out")
    assert code == 3
    assert "$.signature: none, wanted one by abab" in err


def test_key_that_others_can_read_is_mentioned(
    capsys: pytest.CaptureFixture[str], place: Path
) -> None:
    outcome(capsys, "keys", "new", "key.pem", "--json")
    (place / "key.pem").chmod(0o644)
    code, _, err = outcome(capsys, "sign", "m.json", "--key", "key.pem")
    assert code == 0
    assert "others than you can read key.pem" in err


@pytest.mark.parametrize("name", FORMATS)
def test_schema_of_every_format_is_printed(capsys: pytest.CaptureFixture[str], name: str) -> None:
    code, out, _ = outcome(capsys, "schema", name)
    schema = json.loads(out)
    assert code == 0
    assert schema["$id"] == f"urn:edgert:{name}:1"
    assert name != "manifest" or schema == json_schema()
