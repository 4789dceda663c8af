"""Makes part files: of the layers, the shares and the ends that a host's stages have."""

from __future__ import annotations

from collections.abc import Iterator

from edgert.errors import ConfigError, FormatError
from edgert.model_files import check_hash, paths_of
from edgert.packing.blobs import Recipe
from edgert.packing.materialise import Artifact, HostPart, Role
from partition.manifest import Manifest, Stage
from quant.model_spec import read_model_spec
from quant.parts.cuts import vocabulary_rows
from quant.parts.spec import Head, HeadRows, PartSpec, Share
from quant.parts.write import PartContent, part_content, source_identity
from quant.tensor_file import TensorFile, open_tensor_file

_TIERS = ("pinned", "streamed", "looked_up", "cached")


def parts_of_model(part: HostPart) -> tuple[Artifact, ...]:
    """Give a host part files instead of the model.

    Raises:
        ConfigError: the model cannot be taken apart so, with the reason.
        FormatError: the manifest is not of this model.
    """
    artifacts: list[Artifact] = []
    for stage in part.stages:
        file = open_tensor_file(paths_of(part.manifest, part.model_paths, stage.variant)[0])
        contents = []
        for spec in stage_parts(part.manifest, stage, read_model_spec(file).n_vocab):
            content = part_content(file, spec, model_identity(part.manifest, stage))
            contents.append(content)
            role: Role = "entrance" if spec.is_entrance else "part"
            path = part_path(stage, spec)
            artifacts.append(Artifact(path, role, _recipe(part, stage, content), stage.stage_id))
        _check_tiers(part.manifest, stage, file, contents)
    return tuple(artifacts)


def stage_parts(manifest: Manifest, stage: Stage, n_vocab: int) -> tuple[PartSpec, ...]:
    """Return which parts of the model a stage runs, in the order in which a token passes them.

    Embeddings are a file of their own: rows of it are looked up outside of llama.cpp, and a graph
    that hidden states enter needs neither memory for the table nor for as many logits. So is a head
    whose stage does not end with the last layer: it stays at home, and what it reads comes back.

    Args:
        manifest: A valid one.
        stage: Of it.
        n_vocab: Tokens of the model.

    Raises:
        ConfigError: some rows of the head are nowhere.
    """
    n_layer = manifest.model.n_layer
    has_layers = stage.first_layer < stage.end_layer
    share = None
    if stage.share is not None:
        share = Share(stage.share.first_group, stage.share.end_group, stage.share.n_groups)
    head = _head(manifest, stage, share, n_vocab)
    ends = has_layers and stage.end_layer == n_layer
    specs = []
    if stage.embedding:
        specs.append(PartSpec(0, 0, True, "none"))
    if has_layers:
        own_head: Head = head if ends else "none"
        specs.append(PartSpec(stage.first_layer, stage.end_layer, False, own_head, share))
    if head != "none" and not ends:
        specs.append(PartSpec(n_layer, n_layer, False, head))
    return tuple(specs)


def part_path(stage: Stage, spec: PartSpec) -> str:
    """Return where a part of a stage lies in the host's folder."""
    name = f"{stage.stage_id}.gguf"
    if spec.is_entrance:
        return f"entrance/{name}"
    return f"exit/{name}" if spec.is_exit else name


def model_identity(manifest: Manifest, stage: Stage | None = None) -> str:
    """Return what parts call the manifest's model, or the variant of it that a stage runs."""
    model = manifest.model if stage is None else manifest.model_of(stage)
    return source_identity([file.sha256 for file in model.files])


def _head(manifest: Manifest, stage: Stage, share: Share | None, n_vocab: int) -> Head:
    """Return a stage's part of the head: where several stages have it, rows by their shares."""
    if not stage.head:
        return "none"
    sharing = [other.share for other in manifest.stages if other.head]
    if share is None or len(sharing) == 1:
        return "whole"
    n_groups = sum(own.end_group - own.first_group for own in sharing if own is not None)
    if n_groups != share.n_groups:
        raise ConfigError(
            f"{len(sharing)} stages have the head, but only {n_groups} of {share.n_groups} groups",
            hint="plan again: one stage has the head, or all that share the last layer",
        )
    return HeadRows(*vocabulary_rows(n_vocab, share))


def _recipe(part: HostPart, stage: Stage, content: PartContent) -> Recipe:
    files = part.manifest.model_of(stage).files
    paths = paths_of(part.manifest, part.model_paths, stage.variant)

    def check() -> None:
        for file, path in zip(files, paths, strict=True):
            check_hash(path, file, part.hashes.of(path))

    source = str(paths[0])
    return Recipe(content.key, content.size_bytes, source, check, content.read)


def _check_tiers(
    manifest: Manifest, stage: Stage, file: TensorFile, contents: list[PartContent]
) -> None:
    """Refuse a stage that names tensors which none of its parts has."""
    held = {t.source.name for c in contents for t in c.tensors if t.source is not None}
    for tier, name in _placed(stage):
        if name not in held:
            what = "a tensor of its parts" if name in file.by_name else "a tensor of the model"
            path = f"$.stages[{manifest.stages.index(stage)}].tiers.{tier}"
            raise FormatError(
                f"{path}: {name!r}, wanted {what}: the manifest is not of this model",
                hint="make a new one: edgert plan MODEL -o FILE",
            )


def _placed(stage: Stage) -> Iterator[tuple[str, str]]:
    for tier in _TIERS:
        for name in getattr(stage.tiers, tier):
            yield tier, name
