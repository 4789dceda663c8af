"""`edgert plan`: decide where every weight lives, and write the deployment manifest."""

from __future__ import annotations

from collections.abc import Iterator
from math import isfinite
from typing import TYPE_CHECKING

import edgert
from edgert.cli.nested_planning import plan_of
from edgert.cli.opening import embedded_model, model_path
from edgert.cli.plan_fallback import check_place, plan_alone
from edgert.cli.plan_files import Drawing, check_targets, print_result, read_paths, write_results
from edgert.cli.planning import Inputs, gather, identity
from edgert.cli.progress import ProgressListener
from edgert.cli.split_planning import wants_split
from edgert.errors import ConfigError
from edgert.model_files import FileHashes
from edgert.units import format_bytes, format_seconds
from partition.bind import bind
from partition.manifest_file import check_manifest, write_manifest
from partition.plan import Plan, frontier
from partition.problem import METRICS
from partition.timeline import plan_timeline

if TYPE_CHECKING:
    from pathlib import Path

    from edgert.cli.command import Context
    from edgert.cli.plan_options import PlanOptions
    from partition.candidates import Candidate
    from partition.manifest import Manifest


def run(options: PlanOptions, context: Context) -> int:
    """Plan, write what was asked for, and say what was decided."""
    path = model_path(options.model, context.env)
    targets = check_targets(options.result, read_paths(options, path or embedded_model()))
    if path is not None and path.suffix.lower() == ".onnx":
        from edgert.cli.plan_onnx import run_onnx

        if "fallback" in targets:
            raise ConfigError("--fallback is for language models", hint="leave it out")
        return run_onnx(path, options, context)
    check_place(targets)
    if wants_split(options):
        from edgert.cli.plan_split import run_split

        return run_split(options, path or embedded_model(), context)
    inputs = gather(options, context)
    shards = (shard.path for shard in inputs.file.shards)
    targets = check_targets(options.result, (*read_paths(options, inputs.file.path), *shards))
    if options.result.pareto:
        if targets or options.result.explain:
            raise ConfigError("--pareto lists plans and writes none", hint="leave it out")
        if inputs.nested is not None:
            raise ConfigError(
                "--pareto does not compare widths of nested experts",
                hint="--explain says what the next widths would cost",
            )
        return _pareto(inputs, options)
    plan = plan_of(inputs)
    with ProgressListener(context, quiet=options.output.json) as progress:
        hashes = FileHashes(context.directories.cache, progress)
        model = identity(inputs, hashes)
        manifest = bind(plan, model, edgert.__version__, inputs.popularity)
    check_manifest(manifest, "the plan")
    fallback = check_place(targets)
    if fallback is not None:
        manifest, alone = plan_alone(manifest, inputs, fallback)
        write_manifest(alone, targets["fallback"], replace=options.result.force)
    others = [(item.name, item.tpot_s) for item in plan.others]
    drawing = Drawing(plan_timeline(plan.chosen), others, tensor_bytes(plan))
    write_results(targets, manifest, drawing, replace=options.result.force)
    say_where_the_model_is(targets.get("out"), inputs.file.path, context)
    print_result(options, manifest, summary(plan, manifest, explain=options.result.explain))
    return 0


def say_where_the_model_is(out: Path | None, model: Path, context: Context) -> None:
    """Say what a manifest needs that does not lie beside its model: its paths are relative."""
    if out is None or out.absolute().parent == model.absolute().parent:
        return
    if model.absolute() != embedded_model():
        context.say(f"note: {model.name} does not lie beside {out}: run it with -m {model}")


def summary(plan: Plan, manifest: Manifest, *, explain: bool) -> Iterator[str]:
    """Say what was decided, in lines; with every reason when asked to explain."""
    predicted = manifest.predicted
    yield f"plan: {plan.chosen.name}"
    yield (
        f"  decode {_range(predicted.decode_tok_s.low, predicted.decode_tok_s.high)} tok/s, "
        f"first token of {plan.goal.n_prompt} after {format_seconds(plan.chosen.ttft_s)}, "
        f"loaded after {format_seconds(plan.chosen.load_s)}"
    )
    for stage in plan.chosen.stages:
        limit = stage.place.host.pool(stage.place.device.pool_id).available_bytes
        yield (
            f"  {stage.place.name}: peak {format_bytes(stage.peak_bytes)} of {format_bytes(limit)}"
            f" ({format_bytes(stage.forecast.held_bytes)} weights, "
            f"{format_bytes(stage.kv_bytes)} KV, {format_bytes(stage.fixed_bytes)} program and "
            f"buffers), {format_bytes(stage.forecast.read_bytes)} read a token"
        )
    yield f"  binds: {plan.binds}"
    for warning in manifest.warnings:
        yield f"  warning: {warning}"
    if not explain:
        return
    yield "why:"
    for item in plan.reasons:
        yield f"  {item.what}: {item.choice}; {item.reason}"
    yield "next best:"
    for other in plan.others:
        yield f"  {_line(other)}"
    yield "baselines:"
    for way in plan.plain:
        speed = "not possible" if way.tpot_s is None else f"{format_seconds(way.tpot_s)} a token"
        yield f"  {way.name}: {speed}; {way.reason}"
    if plan.rejected:
        yield "not possible:"
    for rejection in plan.rejected:
        yield f"  {rejection.option}: {rejection.reason}"


def _pareto(inputs: Inputs, options: PlanOptions) -> int:
    found = frontier(inputs.workload, inputs.topology, inputs.goal, METRICS, inputs.popularity)
    if options.output.json:
        import json

        # Energy is infinite where a device's power is unknown; JSON knows no infinity.
        rows = [
            {"name": item.name} | {m: v if isfinite(v := item.of(m)) else None for m in METRICS}
            for item in found
        ]
        print(json.dumps(rows))
        return 0
    for item in found:
        print(_line(item))
    return 0


def tensor_bytes(plan: Plan) -> dict[str, int]:
    """Return the bytes of every tensor that the plan places, by name; of shared ones none."""
    if plan.chosen.parallel:
        return {}
    return {
        tensor.name: tensor.size_bytes
        for stage in plan.chosen.stages
        for tensor in (*stage.weights.looked_up, *stage.weights.whole)
    }


def _line(candidate: Candidate) -> str:
    return (
        f"{candidate.name}: {format_seconds(candidate.tpot_s)} a token, first after "
        f"{format_seconds(candidate.ttft_s)}, peak {format_bytes(candidate.peak_bytes)}"
    )


def _range(low: float, high: float) -> str:
    return f"{low:.3g} to {high:.3g}"
