"""The files that `edgert plan` writes: manifest, report, simulated trace."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.atomic_file import write_file
from edgert.cli.opening import user_path
from edgert.errors import ConfigError
from edgert.timeline import Timeline, chrome_trace
from partition.manifest_file import canonical_json, write_manifest

if TYPE_CHECKING:
    from edgert.cli.plan_options import PlanOptions, PlanOutputFlags
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


def read_paths(options: PlanOptions, model: Path) -> tuple[Path, ...]:
    """Return the files that a plan is made from."""
    named = (options.hardware.topology, options.goal.routing_trace)
    return (model, *(user_path(text) for text in named if text is not None))


def check_targets(flags: PlanOutputFlags, inputs: Sequence[Path] = ()) -> dict[str, Path]:
    """Check where results go before anything is measured or planned.

    Args:
        flags: What is written where.
        inputs: Files that are read, which no result may replace. Those that a model's header
            names are known only once it is read: check again then.

    Raises:
        ConfigError: a target cannot be written, is written or read under another flag, or exists
            without --force.
    """
    named = {
        "out": flags.out, "report": flags.report, "trace": flags.simulated,
        "fallback": flags.fallback,
    }  # fmt: skip
    targets = {name: user_path(text) for name, text in named.items() if text is not None}
    taken = {os.path.realpath(path): "is what the plan is made from" for path in inputs}
    for name, path in targets.items():
        flag, place = f"--{name} {path}", os.path.realpath(path)
        if not _can_hold_file(path):
            raise ConfigError(f"{flag}: cannot be written there", hint="name a file")
        if place in taken:
            raise ConfigError(f"{flag}: {taken[place]}", hint="name another file")
        taken[place] = f"is where --{name} goes too"
        if os.path.lexists(path) and not flags.force:
            raise ConfigError(f"{flag}: the file exists", hint="--force replaces it")
    return targets


def _can_hold_file(path: Path) -> bool:
    """Whether a path is a regular file, or free in a folder that is there."""
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except FileNotFoundError:
        return path.absolute().parent.is_dir()
    except OSError:
        return False


def write_results(
    targets: Mapping[str, Path], manifest: Manifest, drawing: Drawing, *, replace: bool
) -> None:
    """Write what was asked for; `replace` allows files in place of those there."""
    if "report" in targets:
        from partition.report import Alternative, html_report

        others = [Alternative(name, tpot_s, "next best") for name, tpot_s in drawing.others]
        page = html_report(manifest, drawing.timeline, others, drawing.sizes_bytes)
        write_file(targets["report"], page.encode(), replace=replace)
    if "trace" in targets:
        content = chrome_trace([drawing.timeline]).encode()
        write_file(targets["trace"], content, replace=replace)
    if "out" in targets:
        write_manifest(manifest, targets["out"], replace=replace)


def print_result(options: PlanOptions, manifest: Manifest, lines: Iterable[str]) -> None:
    """Print the manifest for programs, or what was decided in lines for people."""
    if options.output.json:
        print(canonical_json(manifest).decode(), end="")
        return
    for line in lines:
        print(line)
