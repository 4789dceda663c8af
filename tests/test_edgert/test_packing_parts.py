"""`pack` for several hosts: part files, continued after a cut, refused for a reason."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

import builders_manifest as build
from builders_manifest import Document
from edgert.errors import ConfigError, FormatError
from edgert.events import Event, LoadProgress
from edgert.hosts.entrance import EmbeddingTable, Floats
from edgert.model_files import FileHashes
from edgert.packing.pack import pack
from edgert.packing.parts import model_identity, stage_parts
from native import tapped
from part_models import N_VOCAB, SHAPES, random_model
from partition.manifest import Manifest
from partition.manifest_file import canonical_json
from planned_models import outcome
from quant.parts.file import Part, read_part
from quant.parts.spec import HeadRows, PartSpec, Share
from quant.tensor_file import open_tensor_file

N_LAYER = 4


def embeddings(entrance: Path) -> Floats:
    """Look up every token."""
    table = EmbeddingTable(open_tensor_file(entrance))
    try:
        return table.rows(range(N_VOCAB))
    finally:
        table.close()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_model(SHAPES["llama"]).write(tmp_path_factory.mktemp("model") / "llama.gguf")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = random_model(SHAPES["llama-tied-q8_0"])
    return model.write(tmp_path_factory.mktemp("model") / "tied.gguf")


def of_model(made: Document, model: Path) -> Manifest:
    """Fill in a manifest's model and the tensors of its stages."""
    file = open_tensor_file(model)
    content = model.read_bytes()
    made["model"]["files"] = [build.model_file(model.name, content)]  # type: ignore[index]
    made["model"]["weight_bytes"] = file.weight_bytes  # type: ignore[index]
    for stage in made["stages"]:  # type: ignore[attr-defined]
        names = [t.name for t in file.tensors if t.layer_index is not None
                 and stage["first_layer"] <= t.layer_index < stage["end_layer"]]  # fmt: skip
        head = [n for n in ("output_norm.weight", "output.weight") if n in file.by_name]
        is_tied = "output.weight" not in file.by_name
        embedding = ["token_embd.weight"]
        pinned = names + (head + (embedding if is_tied else []) if stage["head"] else [])
        looked_up = embedding if stage["embedding"] and embedding[0] not in pinned else []
        stage["tiers"] |= {"pinned": pinned, "looked_up": looked_up}
    return build.manifest(made)


def pipeline() -> Document:
    """Two hosts, one after the other."""
    made = build.two_hosts()
    made["hosts"] = [build.host("home"), build.host("board")]
    made["stages"] = [
        build.stage("front", "home", (0, 2)),
        build.stage("back", "board", (2, N_LAYER)),
    ]
    made["transport"] = [build.transport("front", "back")]
    made["policies"] = {"home": "home", "may_leave": ["hidden_states", "logits"]}
    made["requires"] = ["resident", "pipeline"]
    return made


def shared(*, n_heads: int = 2) -> Document:
    """Every layer over two hosts, two to one, with the output's rows where several have it."""
    made = build.shared()
    bounds = ((0, 2), (2, 3))
    for stage, (first, end) in zip(made["stages"], bounds, strict=True):  # type: ignore[call-overload]
        stage["share"] = {"first_group": first, "end_group": end, "n_groups": 3}
    made["stages"][1]["head"] = n_heads == 2  # type: ignore[index]
    made["policies"] = {"home": "home", "may_leave": ["hidden_states", "logits"]}
    made["requires"] = ["resident", "tensor_parallel"]
    if n_heads == 2:
        made["requires"].append("vocabulary_shards")  # type: ignore[attr-defined]
    return made


def parts_of(folder: Path, manifest: Manifest) -> dict[str, Part]:
    """Read a host's parts by path; their hashes are those of its index."""
    found = {}
    for entry in json.loads((folder / "files.json").read_text())["files"]:
        path = folder / entry["path"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
        part = read_part(open_tensor_file(path))
        assert part is not None
        assert entry["role"] == ("entrance" if part.spec.is_entrance else "part")
        assert entry["stage_id"] in {stage.stage_id for stage in manifest.stages}
        part.check_source(model_identity(manifest))
        found[entry["path"]] = part
    return found


def specs(folder: Path, manifest: Manifest) -> dict[str, PartSpec]:
    return {path: part.spec for path, part in parts_of(folder, manifest).items()}


def test_hosts_of_a_pipeline_get_their_layers(
    llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = of_model(pipeline(), llama)
    path = tmp_path / "plan.json"
    path.write_bytes(canonical_json(manifest))
    code, out, error = outcome(
        capsys, "pack", str(path), str(tmp_path / "out"), "-m", str(llama), "--json"
    )
    assert (error, code) == ("", 0)
    folders = {host: Path(at) for host, at in json.loads(out)["hosts"].items()}
    assert specs(folders["home"], manifest) == {
        "entrance/front.gguf": PartSpec(0, 0, True, "none"),
        "front.gguf": PartSpec(0, 2, False, "none"),
    }
    assert specs(folders["board"], manifest) == {"back.gguf": PartSpec(2, 4, False, "whole")}
    size_bytes = llama.stat().st_size
    assert (folders["board"] / "back.gguf").stat().st_size < size_bytes * 0.6


@pytest.mark.model
@pytest.mark.parametrize("name", ["llama", "tied"])
def test_packed_parts_compute_the_model(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    made = build.edited(build.two_hosts(), "stages.1.device_id", "cpu0")
    made["requires"] = ["resident", "pipeline"]
    manifest = of_model(made, model)  # the head stays at home
    packed = pack(manifest, (model,), tmp_path / "out")
    home, board = packed.host_folders["home"], packed.host_folders["board"]
    assert specs(home, manifest) == {
        "entrance/s0.gguf": PartSpec(0, 0, True, "none"),
        "s0.gguf": PartSpec(0, 1, False, "none"),
        "exit/s0.gguf": PartSpec(4, 4, False, "whole"),
    }
    tokens = [*range(40, 50)]
    with (
        tapped(model) as (whole, _),
        tapped(home / "s0.gguf") as (front, front_tap),
        tapped(board / "s1.gguf") as (middle, middle_tap),
        tapped(home / "exit/s0.gguf") as (head, _),
    ):
        first = front_tap.capture("l_out-0", stop=True)
        last = middle_tap.capture("l_out-2", stop=True)
        wanted = whole.decode(tokens, 0, len(tokens))
        front.decode_hidden(embeddings(home / "entrance/s0.gguf")[tokens], 0, len(tokens))
        assert first.value is not None
        middle.decode_hidden(first.value, 0, len(tokens))
        assert last.value is not None
        assert head.decode_hidden(last.value, 0, len(tokens)).tobytes() == wanted.tobytes()


def test_hosts_that_share_layers_get_shares_and_home_an_entrance(
    llama: Path, tmp_path: Path
) -> None:
    manifest = of_model(shared(), llama)
    packed = pack(manifest, (llama,), tmp_path / "out")
    end = 2 * N_VOCAB // 3
    assert specs(packed.host_folders["home"], manifest) == {
        "entrance/s0.gguf": PartSpec(0, 0, True, "none"),
        "s0.gguf": PartSpec(0, 4, False, HeadRows(0, end), Share(0, 2, 3)),
    }
    assert specs(packed.host_folders["board"], manifest) == {
        "s1.gguf": PartSpec(0, 4, False, HeadRows(end, N_VOCAB), Share(2, 3, 3)),
    }


def test_one_host_has_the_whole_head_where_rows_are_not_shared(llama: Path) -> None:
    manifest = of_model(shared(n_heads=1), llama)
    found = [stage_parts(manifest, stage, N_VOCAB)[-1].head for stage in manifest.stages]
    assert found == ["whole", "none"]


def test_packing_again_makes_nothing_again(llama: Path, tmp_path: Path) -> None:
    manifest = of_model(shared(), llama)
    first = pack(manifest, (llama,), tmp_path / "out")
    blobs = {p.name: p.stat().st_ino for p in (tmp_path / "out/blobs/sha256").iterdir()}
    again = pack(manifest, (llama,), tmp_path / "out")
    assert (first.n_written, first.n_kept) == (3, 0)
    assert (again.n_written, again.n_kept) == (0, 3)
    assert {p.name: p.stat().st_ino for p in (tmp_path / "out/blobs/sha256").iterdir()} == blobs


def cut_after(n_bytes: int, manifest: Manifest, model: Path, out: Path) -> Path:
    """Pack until so many bytes are done; return the unfinished file."""

    def cut(event: Event) -> None:
        if isinstance(event, LoadProgress) and event.done_bytes >= n_bytes:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(manifest, (model,), out, FileHashes(), listener=cut)
    (part,) = (out / "blobs/sha256").glob("*.part")
    return part


@pytest.mark.parametrize("damage", ["none", "more", "cut", "beginning", "mark"])
def test_cut_short_pack_is_continued_if_its_beginning_is_right(
    llama: Path, tmp_path: Path, damage: str
) -> None:
    manifest, heard = of_model(pipeline(), llama), list[Event]()
    wanted = pack(manifest, (llama,), tmp_path / "wanted").host_folders["home"]
    entrance_bytes = (wanted / "entrance/front.gguf").stat().st_size
    part = cut_after(entrance_bytes + 40_000, manifest, llama, tmp_path / "out")
    n_done = part.stat().st_size
    assert n_done >= 40_000
    content = part.read_bytes()
    if damage == "more":
        part.write_bytes(content + b"what was written after the last note")
    elif damage == "cut":
        part.write_bytes(content[:-1])
    elif damage == "beginning":
        part.write_bytes(b"!" + content[1:])
    elif damage == "mark":
        part.with_suffix(".mark").write_text("{")
    out = pack(manifest, (llama,), tmp_path / "out", listener=heard.append)
    kept = n_done if damage in ("none", "more") else 0
    done = [event.done_bytes for event in heard if isinstance(event, LoadProgress)]
    assert done[:2] == [entrance_bytes, entrance_bytes + kept]
    made = out.host_folders["home"] / "front.gguf"
    assert made.read_bytes() == (wanted / "front.gguf").read_bytes()
    names = [p.name for p in (tmp_path / "out/blobs/sha256").iterdir()]
    assert all("." not in name for name in names)


def test_damaged_part_is_made_anew(llama: Path, tmp_path: Path) -> None:
    manifest = of_model(pipeline(), llama)
    made = pack(manifest, (llama,), tmp_path / "out").host_folders["board"] / "back.gguf"
    content = made.read_bytes()
    made.write_bytes(content[:-1] + b"!")
    again = pack(manifest, (llama,), tmp_path / "out")
    assert (again.n_written, again.n_kept) == (1, 2)
    assert made.read_bytes() == content


def test_part_is_not_made_of_another_model(llama: Path, tmp_path: Path) -> None:
    manifest = of_model(pipeline(), llama)
    other = tmp_path / "other.gguf"
    content = llama.read_bytes()
    other.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(FormatError) as caught:
        pack(manifest, (other,), tmp_path / "out")
    assert hashlib.sha256(content).hexdigest() in caught.value.message
    assert list((tmp_path / "out/blobs/sha256").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blk.0.no_such.weight", "'blk.0.no_such.weight', wanted a tensor of the model"),
        ("output_norm.weight", "'output_norm.weight', wanted a tensor of its parts"),
    ],
)
def test_stage_with_tensors_that_its_parts_have_not_is_refused(
    llama: Path, tmp_path: Path, name: str, message: str
) -> None:
    manifest = of_model(pipeline(), llama)
    front = manifest.stages[0]
    tiers = front.tiers.model_copy(update={"pinned": (*front.tiers.pinned, name)})
    stages = (front.model_copy(update={"tiers": tiers}), *manifest.stages[1:])
    with pytest.raises(FormatError, match=message):
        pack(manifest.model_copy(update={"stages": stages}), (llama,), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_head_with_rows_on_no_host_is_refused(llama: Path) -> None:
    manifest = of_model(shared(), llama)
    third = manifest.stages[1].model_copy(
        update={"stage_id": "s2", "head": False, "share": manifest.stages[1].share}
    )
    share = manifest.stages[0].share
    assert share is not None
    less = manifest.stages[0].model_copy(
        update={"share": share.model_copy(update={"end_group": 1})}
    )
    broken = manifest.model_copy(update={"stages": (less, manifest.stages[1], third)})
    with pytest.raises(ConfigError, match="2 stages have the head, but only 2 of 3 groups"):
        stage_parts(broken, less, N_VOCAB)
