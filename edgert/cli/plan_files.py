"""The files that `edgert plan` writes: manifest, report, simulated trace."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.atomic_file import write_file
from edgert.cli.opening import user_path
from edgert.errors import ConfigError
from edgert.timeline import Timeline, chrome_trace
from partition.manifest_file import write_manifest

if TYPE_CHECKING:
    from edgert.cli.plan_options import PlanOutputFlags
    from partition.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Drawing:
    """What a report shows beside the manifest.

    Attributes:
        timeline: Simulated.
        others: The next best ways and their seconds a token.
        sizes_bytes: Of tensors by name; those that are missing are not drawn to scale.
    """

    timeline: Timeline
    others: Sequence[tuple[str, float]]
    sizes_bytes: Mapping[str, int] = field(default_factory=dict)


def check_targets(flags: PlanOutputFlags) -> dict[str, Path]:
    """Check where results go before anything is measured or planned."""
    named = {"out": flags.out, "report": flags.report, "trace": flags.simulated}
    targets = {name: user_path(text) for name, text in named.items() if text is not None}
    for name, path in targets.items():
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise ConfigError(f"--{name} {path}: cannot be written there", hint="name a file")
    out = targets.get("out")
    if out is not None and out.exists() and not flags.force:
        raise ConfigError(f"--out {out}: the file exists", hint="--force replaces it")
    return targets


def write_results(
    targets: Mapping[str, Path], manifest: Manifest, drawing: Drawing, *, replace: bool
) -> None:
    """Write what was asked for; `replace` allows another manifest in place of the one there."""
    if "report" in targets:
        from partition.report import Alternative, html_report

        others = [Alternative(name, tpot_s, "next best") for name, tpot_s in drawing.others]
        page = html_report(manifest, drawing.timeline, others, drawing.sizes_bytes)
        write_file(targets["report"], page.encode(), replace=True)
    if "trace" in targets:
        write_file(targets["trace"], chrome_trace([drawing.timeline]).encode(), replace=True)
    if "out" in targets:
        write_manifest(manifest, targets["out"], replace=replace)
