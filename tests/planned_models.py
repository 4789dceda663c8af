"""Manifests of the embedded model on disk, changed as tests want them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import builders_devices as build
from devices.discover import fingerprint
from devices.flash_behind import storage_behind
from devices.host import n_usable_cpus
from devices.store import ProfileStore
from edgert.cli import main
from edgert.cli.this_host import heads_of, types_of
from edgert.config import directories
from edgert.llama.build import kernel_build
from edgert.loading import model_path
from partition.manifest import ExpertCache, Tiers
from partition.manifest_file import canonical_json, read_manifest, write_manifest
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file


def outcome(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main.run(arguments)
    out, err = capsys.readouterr()
    return code, out, err


def altered(path: Path, **changes: object) -> Path:
    """Write a copy of a manifest in which the host or something at the top is different."""
    manifest = read_manifest(path)
    host_changes = {k: v for k, v in changes.items() if k == "fingerprint"}
    top = {k: v for k, v in changes.items() if k != "fingerprint"}
    host = manifest.hosts[0].model_copy(update=host_changes)
    changed = manifest.model_copy(update={"hosts": (host,), **top})
    out = path.parent / "altered.json"
    out.write_bytes(canonical_json(changed))
    return out


def caching(path: Path) -> Path:
    """Rewrite a manifest of a mixture so that its experts are cached, six matrices of them."""
    manifest = read_manifest(path)
    (stage,) = manifest.stages
    stacks = tuple(name for name in stage.tiers.pinned if "_exps" in name)
    looked_up = ("token_embd.weight",)
    kept = tuple(name for name in stage.tiers.pinned if name not in (*stacks, *looked_up))
    experts = ExpertCache(cache_bytes=6 * 256 * 256 * 18 // 32, bits=(4,))
    tiers = Tiers(
        layout="repacked", pinned=kept, looked_up=looked_up, cached=stacks, experts=experts
    )
    changed = manifest.model_copy(
        update={
            "stages": (stage.model_copy(update={"tiers": tiers}),),
            "requires": ("expert_cache",),
        }
    )
    out = path.parent / "caching.json"
    write_manifest(changed, out, replace=False)
    return out


def remember_figures(model: Path | None = None) -> None:
    """Store figures of this host as if measured before: measuring wants a quiet machine."""
    file = open_tensor_file(model or model_path(None))
    heads = heads_of(read_model_spec(file))
    assert heads is not None
    kernels = [build.kernel(name) for name in types_of(file)]
    attention = (build.attention(heads.head_length),)
    device = build.device(*kernels).model_copy(update={"attention": attention})
    mark = fingerprint(kernel_build(), n_usable_cpus())
    host = build.host(fingerprint=mark).model_copy(update={"devices": (device,)})
    cache = directories(os.environ).cache
    ProfileStore(cache / "devices", mark).save(host, storage_behind(cache).name)


def streaming(path: Path, model: Path) -> Path:
    """Rewrite a manifest so that some weights stream; everything else stays as it was."""
    manifest = read_manifest(path)
    (stage,) = manifest.stages
    layers = [name for name in stage.tiers.pinned if name.startswith(("blk.1.ffn", "blk.2.ffn"))]
    matrices = tuple(name for name in layers if "norm" not in name)
    tiers = stage.tiers.model_copy(
        update={
            "layout": "file",
            "streamed": matrices,
            "pinned": tuple(name for name in stage.tiers.pinned if name not in matrices),
            "window_bytes": 8 << 20,
        }
    )
    changed = manifest.model_copy(
        update={
            "stages": (stage.model_copy(update={"tiers": tiers}),),
            "requires": ("streaming",),
        }
    )
    out = model.parent / "streaming.json"
    write_manifest(changed, out, replace=False)
    return out
