"""Front and back of one model in two precisions: parts of both files, checked at both ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

import builders_manifest as build
import edgert.models
from edgert.errors import ConfigError, FormatError
from edgert.hosts.allreduce import Exchange
from edgert.hosts.backend import HostsBackend
from edgert.hosts.entrance import Entrance
from edgert.hosts.memory_link import memory_pair
from edgert.hosts.part_server import PartServer
from edgert.hosts.remote_part import RemotePart
from edgert.hosts.stage_parts import StagePart, n_embd, stage_part
from edgert.hosts.stages import Stages
from edgert.llama.lib import load_library
from edgert.llama.open import open_backend
from edgert.llama.part import PartRunner
from edgert.model_files import locate
from edgert.model_match import check_model
from edgert.packing.pack import pack
from edgert.packing.parts import model_identity
from hosts_parts import SIZES, Hosts, options, serve
from partition.manifest import Manifest
from partition.manifest_file import violations, write_manifest
from quant.formats import format_of
from quant.tensor_file import TensorFile, open_tensor_file
from requantized import requantize

pytestmark = pytest.mark.model

TINY = Path(edgert.models.__file__).parent / "tiny-chat.gguf"
CUT, N_LAYER, N_CTX = 3, 8, 256
PROMPT = list(range(300, 316))  # one chunk
KINDS = {"f16": Kind.F16, "q4_0": Kind.Q4_0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny in other precisions; `mixed` has its back layers in them and the rest as it was."""
    made = tmp_path_factory.mktemp("variants")
    for name, kind in KINDS.items():
        requantize(TINY, made / f"{name}.gguf", kind)
        requantize(TINY, made / f"mixed-{name}.gguf", kind, is_back)
    (made / "tiny-chat.gguf").symlink_to(TINY)
    return made


def is_back(name: str) -> bool:
    return name.startswith("blk.") and int(name.split(".")[1]) >= CUT


def identity(path: Path) -> build.Document:
    file = open_tensor_file(path)
    return {
        "format": "gguf", "name": path.stem, "architecture": "llama", "n_layer": N_LAYER,
        "weight_bytes": file.weight_bytes,
        "files": [build.model_file(path.name, path.read_bytes())],
    }  # fmt: skip


def stage(
    name: str, host: str, file: TensorFile, layers: tuple[int, int], **more: object
) -> build.Document:
    first, end = layers
    at_home = host == "home"
    names = [
        t.name for t in file.tensors
        if (at_home if t.layer_index is None else first <= t.layer_index < end)
    ]  # fmt: skip
    precision: dict[str, int] = {}
    for entry in (file.tensor(name) for name in names):
        kind = format_of(entry.ggml_type).name
        precision[kind] = precision.get(kind, 0) + entry.size_bytes
    tied = "output.weight" not in file.by_name
    looked_up = [] if tied or not at_home else ["token_embd.weight"]
    pinned = [name for name in names if name not in looked_up]
    return build.stage(
        name, host, layers, embedding=at_home, head=at_home, precision=precision,
        kv_bytes=1 << 24, buffer_bytes=1 << 26, **more,
        tiers={"layout": "repacked", "pinned": pinned, "looked_up": looked_up},
    )  # fmt: skip


def manifest_of(folder: Path, name: str) -> Manifest:
    """Tiny as it is at home, its back in another precision in the cloud."""
    front, back = (open_tensor_file(folder / f"{n}.gguf") for n in ("tiny-chat", name))
    made = build.edge_cloud()
    made["model"], made["variants"] = identity(front.path), [identity(back.path)]
    made["stages"] = [
        stage("s0", "home", front, (0, CUT)),
        stage("s1", "cloud", back, (CUT, N_LAYER), variant=0),
    ]
    for transport in made["transport"]:  # type: ignore[attr-defined]
        transport["codec"] = "f32"
    made["run"] |= {  # type: ignore[operator]
        "n_ctx": N_CTX, "n_batch": 64, "n_ubatch": 32, "cache_type_v": "f16",
    }  # fmt: skip
    made["goal"]["n_prompt"] = 64  # type: ignore[index]
    manifest = build.manifest(made)
    assert violations(manifest) == ()
    return manifest


def parts_of(manifest: Manifest, folder: Path, out: Path) -> list[tuple[str, StagePart]]:
    """Pack for both hosts; return the parts as they are passed."""
    write_manifest(manifest, folder / f"{out.name}.json", replace=True)
    paths = locate(manifest, folder / f"{out.name}.json")
    packed = pack(manifest, paths, out)
    found = []
    for number, host, place in (
        (0, "home", "s0.gguf"), (1, "cloud", "s1.gguf"), (0, "home", "exit/s0.gguf")
    ):  # fmt: skip
        own = manifest.stages[number]
        path = packed.host_folders[host] / place
        found.append((host, stage_part(manifest, own, path, model_identity(manifest, own))))
    return found


@contextmanager
def opened(parts: Sequence[tuple[str, StagePart]], entrance: Path) -> Iterator[Hosts]:
    """Open parts, those of the cloud behind a link in memory."""
    route: list[PartRunner | RemotePart] = []
    hosts_of: list[tuple[PartRunner, PartServer]] = []
    links = []
    with ExitStack() as stack:
        for host, part in parts:
            runner = part.open(Exchange())
            if host == "home":
                route.append(runner)
                continue
            here, there = memory_pair(("home", host))
            links.append(here)
            width = n_embd(part.part.file)
            route.append(RemotePart(here, part.width, to_hidden=part.to_hidden, codecs=part.codecs))
            server = PartServer(
                runner, there, width, answers=True, codecs=part.codecs, listens=True
            )
            hosts_of.append((runner, server))
        table = Entrance(load_library(), open_tensor_file(entrance))
        backend = HostsBackend(table, Stages(route, 16, 256), SIZES, {})
        hosts = Hosts(backend, links, [runner for runner, _ in hosts_of])
        stack.callback(hosts.close)
        for _, server in hosts_of:
            serve(hosts, server)
        yield hosts


@pytest.mark.parametrize("name", KINDS)
def test_cut_answers_as_one_file_with_both_precisions_does(
    name: str, folder: Path, tmp_path: Path
) -> None:
    manifest = manifest_of(folder, name)
    parts = parts_of(manifest, folder, tmp_path / "packed")
    with (
        closing(open_backend(options(folder / f"mixed-{name}.gguf"))) as mixed,
        closing(open_backend(options(TINY))) as whole,
        opened(parts, TINY) as hosts,
    ):
        other = whole.decode(PROMPT, 0, 1).tobytes()
        tokens, position = PROMPT, 0
        for _ in range(40):
            wanted = mixed.decode(tokens, position, 1)
            found = hosts.backend.decode(tokens, position, 1)
            assert found.tobytes() == wanted.tobytes()
            assert position > 0 or found.tobytes() != other  # the precision of the back counts
            position += len(tokens)
            tokens = [int(wanted[0].argmax())]
        assert not hosts.errors


def test_each_host_gets_parts_of_the_file_that_its_stage_names(
    folder: Path, tmp_path: Path
) -> None:
    manifest = manifest_of(folder, "f16")
    (_, front), (_, back), (_, exit_) = parts_of(manifest, folder, tmp_path / "packed")
    kinds = [
        {
            format_of(t.ggml_type).name
            for t in part.part.file.tensors
            if len(t.shape) > 1 and t.name not in part.part.zeros
        }
        for part in (front, back, exit_)
    ]
    assert kinds[:2] == [{"q8_0"}, {"f16"}]
    assert "f16" not in kinds[2]
    sources = [part.part.source_sha256 for part in (front, back, exit_)]
    files = [model.files[0].sha256 for model in (manifest.model, *manifest.variants)]
    assert sources == [files[0], files[1], files[0]]


def test_part_of_the_other_precision_is_refused(folder: Path, tmp_path: Path) -> None:
    manifest = manifest_of(folder, "f16")
    back = manifest.stages[1]
    plain = manifest.model_copy(
        update={
            "variants": (),
            "stages": (manifest.stages[0], back.model_copy(update={"variant": None})),
        }
    )
    packed = pack(plain, locate(plain, folder / "m.json"), tmp_path / "plain")
    wrong = packed.host_folders["cloud"] / "s1.gguf"
    with pytest.raises(FormatError, match=r"made of the model .*, wanted"):
        stage_part(manifest, back, wrong, model_identity(manifest, back))
    assert stage_part(plain, plain.stages[1], wrong, model_identity(plain)).stage.variant is None


def test_variants_are_found_and_proved_by_hash(folder: Path, tmp_path: Path) -> None:
    manifest = manifest_of(folder, "q4_0")
    wanted = (folder / "tiny-chat.gguf", folder / "q4_0.gguf")
    assert locate(manifest, folder / "m.json") == wanted
    assert locate(manifest, tmp_path / "m.json", folder) == wanted
    assert locate(manifest, tmp_path / "m.json", folder / "tiny-chat.gguf") == wanted
    assert locate(manifest, folder / "m.json", TINY) == (TINY, wanted[1])
    (tmp_path / "tiny-chat.gguf").symlink_to(TINY)
    with pytest.raises(ConfigError, match=r"q4_0\.gguf: there is no such file"):
        locate(manifest, tmp_path / "m.json")
    content = bytearray(wanted[1].read_bytes())
    content[-1] ^= 1
    (tmp_path / "q4_0.gguf").write_bytes(content)
    with pytest.raises(FormatError, match="the manifest says"):
        locate(manifest, tmp_path / "m.json")


def test_variant_is_compared_with_the_manifest_and_the_model(
    folder: Path, random_models: dict[str, Path]
) -> None:
    manifest = manifest_of(folder, "f16")
    model, back = (open_tensor_file(folder / f"{name}.gguf") for name in ("tiny-chat", "f16"))
    check_model(manifest, model, [back])
    with pytest.raises(FormatError, match=r"\$\.variants\[0\]\.weight_bytes"):
        check_model(manifest, model, [open_tensor_file(folder / "q4_0.gguf")])
    lie = manifest.stages[1].model_copy(update={"precision": manifest.stages[0].precision})
    wrong = manifest.model_copy(update={"stages": (manifest.stages[0], lie)})
    with pytest.raises(FormatError, match=r"\$\.stages\[1\]\.precision"):
        check_model(wrong, model, [back])
    other = open_tensor_file(random_models["plain"])
    stranger = manifest.variants[0].model_copy(
        update={"n_layer": 4, "weight_bytes": other.weight_bytes}
    )
    changed = manifest.model_copy(update={"variants": (stranger,)})
    with pytest.raises(FormatError, match="layers: 4, wanted 8 as tiny-chat"):
        check_model(changed, model, [other])
