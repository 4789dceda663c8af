"""`edgert plan MODEL --back FILE`: one cut between edge and cloud, a precision on each side."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgert.cli.plan import say_where_the_model_is, summary, tensor_bytes
from edgert.cli.plan_fallback import check_place, plan_alone
from edgert.cli.plan_files import Drawing, check_targets, print_result, read_paths, write_results
from edgert.cli.progress import ProgressListener
from edgert.cli.split_planning import bind_split, chosen_inputs, gather_split, plan_split
from edgert.model_files import FileHashes
from partition.manifest_file import check_manifest, write_manifest
from partition.timeline import plan_timeline

if TYPE_CHECKING:
    from pathlib import Path

    from edgert.cli.command import Context
    from edgert.cli.plan_options import PlanOptions


def run_split(options: PlanOptions, path: Path, context: Context) -> int:
    """Plan, write what was asked for, and say what was decided.

    Raises:
        ConfigError: a flag is wrong, or a file cannot be cut.
        FormatError: a file is damaged, or of another model.
        PlanError: nothing satisfies the goal.
    """
    gathered = gather_split(options, path, context)
    targets = check_targets(options.result, (*read_paths(options, path), *gathered.paths))
    made = plan_split(gathered)
    plan = made.plan
    with ProgressListener(context, quiet=options.output.json) as progress:
        manifest = bind_split(made, gathered, FileHashes(context.directories.cache, progress))
    check_manifest(manifest, "the plan")
    fallback = check_place(targets)
    if fallback is not None:
        inputs = chosen_inputs(made, gathered, made.front)
        manifest, alone = plan_alone(manifest, inputs, fallback)
        write_manifest(alone, targets["fallback"], replace=options.result.force)
    others = [(item.name, item.tpot_s) for item in plan.others]
    drawing = Drawing(plan_timeline(plan.chosen), others, tensor_bytes(plan))
    write_results(targets, manifest, drawing, replace=options.result.force)
    say_where_the_model_is(targets.get("out"), gathered.files[made.front.name].path, context)
    print_result(options, manifest, summary(plan, manifest, explain=options.result.explain))
    return 0
