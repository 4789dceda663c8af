"""Which files a host needs for its stages, by kind of part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from edgert.errors import ConfigError
from edgert.model_files import FileHashes, paths_of
from edgert.packing.blobs import Blob, Recipe, file_blob
from partition.manifest import Manifest, Stage

Role = Literal["model", "part", "entrance"]
PartKind = Literal["whole", "layers", "share"]


@dataclass(frozen=True, slots=True)
class HostPart:
    """What a manifest places on one host.

    Attributes:
        manifest: All of it.
        host_id: The host.
        stages: Those on it.
        model_paths: The files of the model and of its variants, in the manifest's order.
        hashes: Checks them before parts are made of them.
    """

    manifest: Manifest
    host_id: str
    stages: tuple[Stage, ...]
    model_paths: tuple[Path, ...]
    hashes: FileHashes = field(default_factory=FileHashes)

    @property
    def kind(self) -> PartKind:
        """What of the model the host needs."""
        if any(stage.share is not None for stage in self.stages):
            return "share"
        n_layers = sum(stage.end_layer - stage.first_layer for stage in self.stages)
        has_ends = any(s.embedding for s in self.stages) and any(s.head for s in self.stages)
        is_whole = n_layers == self.manifest.model.n_layer
        is_onnx = self.manifest.model.format == "onnx"
        return "whole" if is_whole and (has_ends or is_onnx) else "layers"


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file of a host.

    Attributes:
        path: Its place in the host's folder.
        role: What it is: a file of the model, a part of it for a stage, or embeddings and
            tokenizer alone.
        blob: Its content.
        stage_id: Of which stage it is a part.
    """

    path: str
    role: Role
    blob: Blob | Recipe
    stage_id: str | None = None


class Materialiser(Protocol):
    """Makes the files of one kind of part; raises ConfigError for what it cannot make."""

    def __call__(self, part: HostPart) -> tuple[Artifact, ...]:
        """Return the files; their content is read when they are stored."""


def whole_model(part: HostPart) -> tuple[Artifact, ...]:
    """Give a host the model's own files."""
    return tuple(
        Artifact(file.path, "model", file_blob(path, file.sha256, file.size_bytes))
        for file, path in zip(
            part.manifest.model.files, paths_of(part.manifest, part.model_paths), strict=True
        )
    )


_MISSING = {
    "whole": "the whole model",
    "layers": "a file of its layers only",
    "share": "a file of its share of the layers",
}


def materialise(
    part: HostPart, materialisers: Mapping[PartKind, Materialiser]
) -> tuple[Artifact, ...]:
    """Return the files of a host; ConfigError names what cannot be made yet."""
    if not part.stages:
        return ()  # home, when it only talks to the others
    for stage in part.stages:
        if stage.tiers.layout == "packed":
            raise ConfigError(
                f"stage {stage.stage_id} on host {part.host_id} reads the packed layout, which "
                "belongs to one processor and is not bundled",
                hint="run edgert pack --layout packed MODEL on that host",
            )
    maker = materialisers.get(part.kind)
    if maker is None:
        stages = ", ".join(_describe(stage) for stage in part.stages)
        raise ConfigError(
            f"host {part.host_id} ({stages}) needs {_MISSING[part.kind]}, "
            "which this edgert does not make yet",
            hint="plan for one host, or copy the whole model to each host yourself",
        )
    return maker(part)


def _describe(stage: Stage) -> str:
    layers = f"stage {stage.stage_id}: layers {stage.first_layer} to {stage.end_layer}"
    if stage.share is None:
        return layers
    share = stage.share
    return f"{layers}, groups {share.first_group} to {share.end_group} of {share.n_groups}"
