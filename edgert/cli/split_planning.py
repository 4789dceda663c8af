"""`edgert plan MODEL --back FILE`: what a plan with one cut is made from, and its manifest."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import edgert
from edgert.cli.opening import find_model
from edgert.cli.planning import (
    Inputs,
    asked_for,
    context_for,
    goal_for,
    hardware,
    identity,
    read_popularity,
    refuse_unplanned,
)
from edgert.cli.this_host import types_of
from edgert.codec_bounds import read_bound
from edgert.errors import ConfigError
from edgert.model_files import FileHashes
from edgert.model_variants import check_same_model
from edgert.weights.packed import model_key
from partition.bind import bind
from partition.language_workload import describe_language
from partition.manifest import Codec
from partition.split_link import SplitCodecs
from partition.split_plan import SplitAsk, SplitPlan, make_split_plan
from partition.split_stages import SplitFile
from quant.activations.settings import DEFAULT_BOUND
from quant.model_spec import read_model_spec
from quant.nested.file import read_nested
from quant.parts.rules import why_not_apart
from quant.tensor_file import TensorFile, open_tensor_file

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.plan_options import PlanOptions
    from partition.manifest import Manifest

_CODECS: tuple[Codec, ...] = ("f32", "f16", "adaptive")


@dataclass(frozen=True, slots=True)
class SplitInputs:
    """Everything a plan with one cut is made from.

    Attributes:
        ask: Files, codecs and contexts to choose from.
        files: By the names in it.
        inputs: The rest, with the first file for home.
    """

    ask: SplitAsk
    files: dict[str, TensorFile]
    inputs: Inputs

    @property
    def paths(self) -> tuple[Path, ...]:
        """All files that are read."""
        return tuple(s.path for file in self.files.values() for s in file.shards)


def wants_split(options: PlanOptions) -> bool:
    """Whether the flags ask for one cut; ConfigError for flags that make no sense without."""
    flags = options.split
    if flags.backs:
        if options.result.pareto:
            raise ConfigError("--pareto does not compare cuts", hint="leave it or --back out")
        return True
    for name, value in (("--front", flags.fronts), ("--least-context", flags.least_context)):
        if value:
            raise ConfigError(f"{name} is for plans with one cut", hint="--back FILE asks for one")
    return False


def gather_split(options: PlanOptions, first: Path, context: Context) -> SplitInputs:
    """Read the headers of all files, the hardware and the goal.

    Args:
        options: Of the command.
        first: The model for home.
        context: Of the command.

    Raises:
        ConfigError: a flag is wrong, or a file is no model that can be cut.
        FormatError: a file is damaged, or another model.
    """
    refuse_unplanned(context)
    if options.hardware.topology is None and not options.hardware.devices:
        raise ConfigError(
            "--back wants another host to plan for",
            hint="--topology FILE, or --device twice: home first",
        )
    fronts = [first, *(find_model(name, context.env) for name in options.split.fronts)]
    backs = [find_model(name, context.env) for name in options.split.backs]
    files = _open_all([*fronts, *backs])
    model = files[first.name]
    spec = read_model_spec(model)
    types = dict.fromkeys(name for file in files.values() for name in types_of(file))
    asked = replace(asked_for(model, options.model), types=tuple(types))
    topology = hardware(options.model, options.hardware, asked, context)
    n_ctx = context_for(options, model, spec, context)
    known = {name: _described(name, file) for name, file in files.items()}
    workload = known[first.name].workload
    goal = goal_for(options, n_ctx, topology, len(workload.run_layers))
    inputs = Inputs(model, workload, topology, goal, read_popularity(options, spec))
    ask = SplitAsk(
        fronts=tuple(dict.fromkeys(known[path.name] for path in fronts)),
        backs=tuple(dict.fromkeys(known[path.name] for path in backs)),
        codecs=_codecs(options, [files[path.name] for path in fronts], context),
        contexts=_contexts(n_ctx, options.split.least_context, goal.n_prompt),
    )
    return SplitInputs(ask, files, inputs)


def plan_split(gathered: SplitInputs) -> SplitPlan:
    """Make the plan; see `partition.split_plan`."""
    inputs = gathered.inputs
    return make_split_plan(gathered.ask, inputs.topology, inputs.goal, inputs.popularity)


def chosen_inputs(made: SplitPlan, gathered: SplitInputs, file: SplitFile) -> Inputs:
    """Return what a plan of one of the chosen files alone would be made from."""
    own = gathered.files[file.name]
    return replace(gathered.inputs, file=own, workload=file.workload, goal=made.plan.goal)


def bind_split(made: SplitPlan, gathered: SplitInputs, hashes: FileHashes) -> Manifest:
    """Return the manifest: home's file is the model, the other one a variant of it."""
    inputs = gathered.inputs
    files = (made.front, made.back)
    front, back = (identity(chosen_inputs(made, gathered, file), hashes) for file in files)
    variants = {made.back.name: back} if made.back.name != made.front.name else {}
    return bind(made.plan, front, edgert.__version__, inputs.popularity, variants)


def _open_all(paths: Sequence[Path]) -> dict[str, TensorFile]:
    """Open every file once; all must be the first one's model, in other precisions."""
    files: dict[str, TensorFile] = {}
    for path in paths:
        known = files.get(path.name)
        if known is not None:
            if not known.path.samefile(path):
                raise ConfigError(
                    f"{path} has the name of {known.path}: beside a manifest both would be one",
                    hint="rename one of them",
                )
            continue
        file = open_tensor_file(path)
        if files:
            check_same_model(next(iter(files.values())), file)
        files[path.name] = file
    return files


def _described(name: str, file: TensorFile) -> SplitFile:
    spec = read_model_spec(file)
    reason = why_not_apart(spec.architecture, shares=False)
    if read_nested(file) is not None:
        reason = "its experts are nested, which no cut is planned with"
    if reason is not None:
        raise ConfigError(f"{name} cannot be cut: {reason}", hint="leave --back out")
    return SplitFile(name, describe_language(file, spec))


def _codecs(options: PlanOptions, fronts: Sequence[TensorFile], context: Context) -> SplitCodecs:
    """Read which codecs are allowed, and the bounds that were calibrated for the files at home."""
    text = options.split.codecs
    names = [name.strip() for name in text.split(",") if name.strip()]
    allowed = tuple(codec for codec in _CODECS if codec in names)
    unknown = [name for name in names if name not in _CODECS]
    if unknown or not allowed:
        raise ConfigError(
            f"--codecs {text}: {unknown[0] if unknown else 'nothing'!r} is no codec",
            hint=f"choose from {', '.join(_CODECS)}",
        )
    bounds = {}
    for file in fronts if "adaptive" in allowed else ():
        key = model_key(file)
        for cut in range(1, read_model_spec(file).n_layer):
            with suppress(ConfigError):  # nothing was calibrated there
                found, _ = read_bound(context.directories.cache / "codecs", key, cut)
                bounds[file.path.name, cut] = found.bound
    return SplitCodecs(allowed, DEFAULT_BOUND, bounds)


def _contexts(most: int, least: int | None, n_prompt: int) -> tuple[int, ...]:
    """Return the contexts to try: the longest first, halved down to the shortest."""
    if least is None or least >= most:
        return (most,)
    if least <= n_prompt:
        raise ConfigError(
            f"--least-context {least} leaves no room for a reply to a prompt of {n_prompt}",
            hint=f"--least-context {2 * n_prompt}, or fewer --prompt-tokens",
        )
    found = []
    while most > least:
        found.append(most)
        most = max(least, most // 2)
    return (*found, least)
