"""Whether a manifest speaks of the model that it names: its layers, tensors, formats and cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from edgert.errors import FormatError
from edgert.model_variants import check_same_model
from edgert.packing.parts import stage_parts
from partition.manifest import Manifest, ModelIdentity, Stage
from quant.formats import format_of
from quant.model_spec import ModelSpec, kv_bytes, read_model_spec
from quant.parts.plan import plan_tensors
from quant.parts.spec import OUTPUT, Names
from quant.tensor_file import TensorFile

_LISTS = ("pinned", "streamed", "looked_up", "cached")


def check_model(manifest: Manifest, model: TensorFile, variants: Sequence[TensorFile] = ()) -> None:
    """Compare a manifest with the headers of its model and of that in other precisions.

    Raises:
        FormatError: names the manifest's `$.path`, its value and what the model has; or a variant
            is another model.
    """
    _check_identity(manifest.model, model, "$.model")
    for index, variant in enumerate(variants):
        _check_identity(manifest.variants[index], variant, f"$.variants[{index}]")
        check_same_model(model, variant)
    for index, stage in enumerate(manifest.stages):
        file = model if stage.variant is None else variants[stage.variant]
        spec = read_model_spec(file)
        n_run = spec.n_layer - _prediction_layers(file, spec)
        sizes = _share_sizes(manifest, stage, file, spec) if stage.share is not None else None
        _check_tensors(stage, f"$.stages[{index}]", file, sizes)
        _check_cache(manifest, stage, f"$.stages[{index}]", (spec, n_run))


def _check_identity(named: ModelIdentity, file: TensorFile, path: str) -> None:
    spec = read_model_spec(file)
    for name, saw, wanted in (
        ("n_layer", named.n_layer, spec.n_layer - _prediction_layers(file, spec)),
        ("architecture", named.architecture, spec.architecture),
        ("weight_bytes", named.weight_bytes, spec.weight_bytes),
    ):
        if saw != wanted:
            _refuse(f"{path}.{name}", saw, f"the model's {wanted!r}")


def _share_sizes(
    manifest: Manifest, stage: Stage, file: TensorFile, spec: ModelSpec
) -> dict[str, int]:
    """Return the bytes that a share has of each tensor."""
    sizes: dict[str, int] = {}
    for part in stage_parts(manifest, stage, spec.n_vocab):
        names = Names(part, OUTPUT not in file.by_name, spec.architecture)
        for tensor in plan_tensors(file, spec, names):
            if tensor.source is not None:
                sizes[tensor.source.name] = tensor.size_bytes
    return sizes


def _check_tensors(
    stage: Stage, path: str, file: TensorFile, sizes: Mapping[str, int] | None
) -> None:
    precision: dict[str, int] = {}
    for name in _LISTS:
        for position, tensor in enumerate(getattr(stage.tiers, name)):
            entry = file.by_name.get(tensor)
            if entry is None:
                _refuse(f"{path}.tiers.{name}[{position}]", tensor, "a tensor of the model")
            kind = format_of(entry.ggml_type).name
            size_bytes = entry.size_bytes if sizes is None else sizes.get(tensor, 0)
            precision[kind] = precision.get(kind, 0) + size_bytes
    if stage.precision != precision:
        _refuse(f"{path}.precision", stage.precision, f"the {precision} of its tensors")


def _check_cache(manifest: Manifest, stage: Stage, path: str, model: tuple[ModelSpec, int]) -> None:
    spec, n_run = model
    run = manifest.run
    try:
        whole = kv_bytes(spec, run.n_ctx, run.cache_type_k, run.cache_type_v)
    except ValueError as error:
        _refuse("$.run.cache_type_k", run.cache_type_k, f"a type that suits the model: {error}")
    least = whole * (stage.end_layer - stage.first_layer) // max(1, spec.n_layer)
    least = min(least, whole * n_run // max(1, spec.n_layer))
    if stage.share is not None:
        least = least * (stage.share.end_group - stage.share.first_group) // stage.share.n_groups
    if stage.kv_bytes < least:
        what = f"at least {least:,} for {run.n_ctx} positions"
        _refuse(f"{path}.kv_bytes", stage.kv_bytes, what)


def _prediction_layers(file: TensorFile, spec: ModelSpec) -> int:
    value = file.metadata.get(f"{spec.architecture}.nextn_predict_layers")
    return value if isinstance(value, int) else 0


def _refuse(path: str, value: object, wanted: str) -> NoReturn:
    raise FormatError(
        f"{path}: {str(value)[:120]!r}, wanted {wanted}: the manifest is not of this model",
        hint="make a new one: edgert plan MODEL -o FILE",
    )
