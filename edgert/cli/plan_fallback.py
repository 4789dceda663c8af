"""`edgert plan --fallback`: a second plan, of home alone, for when another host is gone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import edgert
from edgert.cli.nested_planning import plan_of
from edgert.errors import ConfigError
from edgert.fallback_manifest import with_fallback
from partition.bind import bind
from partition.manifest_file import check_manifest

if TYPE_CHECKING:
    from collections.abc import Mapping

    from edgert.cli.planning import Inputs
    from partition.manifest import Manifest

_HINT = "name a file beside the one of -o"


def check_place(targets: Mapping[str, Path]) -> str | None:
    """Return the path by which a manifest names its fallback, None where none is asked for.

    Raises:
        ConfigError: no manifest is written, or the fallback would not lie beside it.
    """
    fallback = targets.get("fallback")
    if fallback is None:
        return None
    out = targets.get("out")
    if out is None:
        raise ConfigError("--fallback wants the manifest that falls back", hint="-o FILE")
    folder = out.absolute().parent
    try:
        return fallback.absolute().relative_to(folder).as_posix()
    except ValueError as error:
        raise ConfigError(f"--fallback {fallback}: not in {folder}", hint=_HINT) from error


def plan_alone(manifest: Manifest, inputs: Inputs, path: str) -> tuple[Manifest, Manifest]:
    """Return a manifest that names its fallback, and that.

    Args:
        manifest: Of several hosts.
        inputs: What it was planned from.
        path: By which it names the fallback.

    Raises:
        ConfigError: the plan needs none.
        PlanError: home alone cannot run the model.
    """
    if len(manifest.hosts) == 1:
        raise ConfigError(
            "the plan is of home alone, and needs no fallback", hint="leave out --fallback"
        )
    home = inputs.topology.home
    only = {"hosts": (inputs.topology.host(home),), "links": ()}
    goal = replace(
        inputs.goal, ceilings={}, stays=(), may_leave=(), cache_types=(manifest.run.cache_type_k,)
    )
    alone = replace(inputs, topology=inputs.topology.model_copy(update=only), goal=goal)
    made = bind(plan_of(alone), manifest.model, edgert.__version__, inputs.popularity)
    check_manifest(made, "the fallback")
    named = with_fallback(manifest, made, path)
    check_manifest(named, "the plan")
    return named, made
