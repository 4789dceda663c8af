"""Rules of a manifest about variants: one model in several precisions, a part of its layers each.

What home keeps, embeddings and output, is of the model itself. That a variant has its width and its
vocabulary is for the runtime to check, which has the files.
"""

from __future__ import annotations

from collections.abc import Iterator

from partition.manifest import Manifest, ModelIdentity, Stage
from partition.manifest_rules import Violation, identity_rules


def variant_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that each variant is the same model in other files, and runs layers away from home."""
    for index, stage in enumerate(manifest.stages):
        if stage.variant is not None:
            yield from _of_stage(manifest, stage, f"$.stages[{index}]")
    for index, variant in enumerate(manifest.variants):
        path = f"$.variants[{index}]"
        yield from identity_rules(variant, path)
        yield from _same_model(manifest.model, variant, path)
        if not any(stage.variant == index for stage in manifest.stages):
            yield Violation(path, {"name": variant.name}, "one that a stage runs")
    yield from _files_once(manifest)
    if manifest.variants and "edge_cloud" not in manifest.requires:
        rule = "edge_cloud among them, as the model has variants"
        yield Violation("$.requires", manifest.requires, rule)


def _same_model(model: ModelIdentity, variant: ModelIdentity, path: str) -> Iterator[Violation]:
    if variant.format != "gguf":
        yield Violation(f"{path}.format", variant.format, "gguf")
    for name in ("format", "architecture", "n_layer"):
        saw, wanted = getattr(variant, name), getattr(model, name)
        if saw != wanted:
            yield Violation(f"{path}.{name}", saw, f"{wanted}, as model.{name} says")


def _files_once(manifest: Manifest) -> Iterator[Violation]:
    """Check that no file is of two of them: neither by its place nor by what it holds."""
    paths: dict[str, str] = {}
    contents: dict[str, str] = {}
    models = [(manifest.model, "$.model")]
    models += [(item, f"$.variants[{number}]") for number, item in enumerate(manifest.variants)]
    for model, place in models:
        for index, file in enumerate(model.files):
            here = f"{place}.files[{index}]"
            before = paths.setdefault(file.path, place)
            if before != place:
                rule = f"a path other than those of {before}"
                yield Violation(f"{here}.path", file.path, rule)
            before = contents.setdefault(file.sha256, place)
            if before != place:
                yield Violation(f"{here}.sha256", file.sha256, f"a file other than {before} has")


def _of_stage(manifest: Manifest, stage: Stage, path: str) -> Iterator[Violation]:
    if stage.variant is not None and stage.variant >= len(manifest.variants):
        rule = f"less than {len(manifest.variants)}, the variants of the manifest"
        yield Violation(f"{path}.variant", stage.variant, rule)
    wrong = {
        "it is at home, which has the model itself": stage.host_id == manifest.policies.home,
        "it has the embeddings": stage.embedding,
        "it has the head": stage.head,
        "its layers are shared": stage.share is not None,
    }
    for reason, found in wrong.items():
        if found:
            yield Violation(f"{path}.variant", stage.variant, f"none, as {reason}")
