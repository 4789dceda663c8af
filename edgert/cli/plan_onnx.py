"""`edgert plan MODEL.onnx`: which device runs which part of a graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import edgert
from edgert.cli.plan_files import Drawing, check_targets, print_result, read_paths, write_results
from edgert.cli.planning import goal_for, hardware
from edgert.cli.progress import ProgressListener
from edgert.cli.this_host import Asked
from edgert.errors import ConfigError
from edgert.model_files import FileHashes
from edgert.units import format_bytes, format_seconds
from partition.manifest import ModelFile, ModelIdentity
from partition.manifest_file import check_manifest
from partition.onnx_bind import bind_onnx
from partition.onnx_plan import OnnxPlan, make_onnx_plan, onnx_timeline
from partition.onnx_workload import OnnxWorkload, describe_onnx

if TYPE_CHECKING:
    from pathlib import Path

    from edgert.cli.command import Context
    from edgert.cli.plan_options import PlanOptions
    from partition.manifest import Manifest

_MOST_DIMENSION = (1 << 31) - 1
_MOST_DIGITS = len(str(_MOST_DIMENSION))

_MOST_LAYERS = 1 << 16  # layers of graphs are not named by --stay


def run_onnx(path: Path, options: PlanOptions, context: Context) -> int:
    """Plan, write what was asked for, and say what was decided.

    Raises:
        ConfigError: a flag is wrong, or is for language models.
        FormatError: the model is damaged.
        PlanError: nothing satisfies the goal.
    """
    _refuse_language_flags(options)
    workload = describe_onnx(path, dimensions(options.goal.dimensions))
    inputs = (*read_paths(options, path), *(path.parent / name for name in workload.external))
    targets = check_targets(options.result, inputs)
    asked = Asked(path, (), options.model.threads, list_runtimes=False)
    topology = hardware(options.model, options.hardware, asked, context)
    plan = make_onnx_plan(workload, topology, goal_for(options, 1, topology, _MOST_LAYERS))
    with ProgressListener(context, quiet=options.output.json) as progress:
        hashes = FileHashes(context.directories.cache, progress)
        manifest = bind_onnx(plan, identity(plan, hashes), edgert.__version__)
    check_manifest(manifest, "the plan")
    others = [(item.name, item.tpot_s) for item in plan.others]
    drawing = Drawing(onnx_timeline(plan.chosen), others, _weight_bytes(workload))
    write_results(targets, manifest, drawing, replace=options.result.force)
    print_result(options, manifest, summary(plan, manifest, explain=options.result.explain))
    return 0


def identity(plan: OnnxPlan, hashes: FileHashes) -> ModelIdentity:
    """Hash the model and the files beside it that hold its weights."""
    workload = plan.chain.workload
    names = [workload.path.name, *workload.external]
    files = tuple(
        ModelFile(
            path=name,
            size_bytes=(workload.path.parent / name).stat().st_size,
            sha256=hashes.of(workload.path.parent / name),
        )
        for name in dict.fromkeys(names)
    )
    return ModelIdentity(
        format="onnx",
        name=workload.path.stem,
        architecture="onnx",
        n_layer=len(plan.chain.units),
        # Small numbers take less in a file than in memory.
        weight_bytes=min(workload.weight_bytes, sum(file.size_bytes for file in files)),
        files=files,
    )


def dimensions(texts: tuple[str, ...]) -> Mapping[str, int]:
    """Read sizes of open dimensions, `NAME=N` each."""
    found = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        if not name or not value.isascii() or not value.isdigit():
            raise ConfigError(
                f"--dimension {text[:80]}: wanted NAME=N", hint="such as --dimension batch=1"
            )
        digits = value.lstrip("0") or "0"
        if len(digits) > _MOST_DIGITS or not 1 <= int(digits) <= _MOST_DIMENSION:
            raise ConfigError(f"--dimension {text[:80]}: wanted 1 to {_MOST_DIMENSION}")
        found[name] = int(digits)
    return found


def summary(plan: OnnxPlan, manifest: Manifest, *, explain: bool) -> Iterator[str]:
    """Say what was decided, in lines; with every reason when asked to explain."""
    chosen = plan.chosen
    yield f"plan: {chosen.name}"
    yield (
        f"  {format_seconds(chosen.tpot_s)} an inference, "
        f"loaded after {format_seconds(chosen.load_s)}"
    )
    for stage in chosen.stages:
        limit = stage.place.host.pool(stage.place.device.pool_id).available_bytes
        yield (
            f"  {stage.place.name}: peak {format_bytes(stage.peak_bytes)} of {format_bytes(limit)} "
            f"({format_bytes(stage.weight_bytes)} weights, {format_bytes(stage.live_bytes)} "
            f"activations, {format_bytes(stage.fixed_bytes)} program)"
        )
    yield f"  binds: {plan.binds}"
    for warning in manifest.warnings:
        yield f"  warning: {warning}"
    if explain:
        yield from _explanation(plan)


def _explanation(plan: OnnxPlan) -> Iterator[str]:
    yield "why:"
    for item in plan.reasons:
        yield f"  {item.what}: {item.choice}; {item.reason}"
    yield "next best:"
    for other in plan.others:
        peak = format_bytes(other.peak_bytes)
        yield f"  {other.name}: {format_seconds(other.tpot_s)} an inference, peak {peak}"
    yield "baselines:"
    for way in plan.plain:
        seconds = way.tpot_s
        speed = "not possible" if seconds is None else f"{format_seconds(seconds)} an inference"
        yield f"  {way.name}: {speed}; {way.reason}"
    if plan.rejected:
        yield "not possible:"
    for rejection in plan.rejected:
        yield f"  {rejection.option}: {rejection.reason}"


def _refuse_language_flags(options: PlanOptions) -> None:
    given = {
        "--stay": bool(options.goal.stays),
        "--routing-trace": options.goal.routing_trace is not None,
        "--tokens-per-pass": options.goal.tokens_per_pass > 1,
        "--ctx-size": options.model.ctx_size is not None,
        "--pareto": options.result.pareto,
    }
    for flag, is_given in given.items():
        if is_given:
            raise ConfigError(f"{flag} is for language models (GGUF)", hint="leave it out")


def _weight_bytes(workload: OnnxWorkload) -> dict[str, int]:
    return {name: weight.size_bytes for name, weight in workload.weights.items()}
