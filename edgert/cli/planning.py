"""What `edgert plan` hands to the planner: model, hardware and goal, from flags and files."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devices.assumed import with_types
from devices.host import default_memory_budget
from devices.topology import Topology
from edgert.cli.nested_planning import ask_again, ask_by_flags
from edgert.cli.opening import embedded_model, model_path, user_path
from edgert.cli.this_host import Asked, has_measured, heads_of, this_host, types_of
from edgert.errors import ConfigError
from edgert.model_files import FileHashes
from edgert.units import parse_bytes
from partition.goal import ALL_ABILITIES, LARGEST_CONTEXT, Goal, Stay
from partition.language_workload import LanguageWorkload, describe_language
from partition.manifest import RUNTIME_ABILITIES, CacheType, ModelFile, ModelIdentity
from partition.nested_plan import NestedAsk
from partition.popularity import Popularity, popularity_of, read_routing_trace
from partition.problem import SHORT_METRICS, Metric
from quant.model_spec import ModelSpec, read_model_spec
from quant.nested.file import read_nested
from quant.tensor_file import TensorFile, open_tensor_file

if TYPE_CHECKING:
    from pathlib import Path

    from devices.profile import HostProfile
    from edgert.cli.command import Context
    from edgert.cli.options import ModelFlags
    from edgert.cli.plan_options import GoalFlags, HardwareFlags, PlanOptions
    from partition.manifest import Manifest

_METRICS: dict[str, Metric] = {
    name.replace("_", "-"): metric for metric, name in SHORT_METRICS.items()
}
_CACHE_TYPES: tuple[CacheType, ...] = ("f16", "q8_0", "q4_0")
_DEPARTURES = ("input", "hidden_states", "logits")
_DEFAULT_CONTEXT = 4096
_CONTEXT_STEP = 256  # llama.cpp makes caches of whole blocks of cells
_DEFAULT_PROMPT = 128
_STAY = re.compile(r"([0-9]{1,5}):([0-9]{1,5})=([a-z0-9][a-z0-9._-]{0,63})")
# Set for running a model; a plan chooses them itself, or leaves them at their defaults.
_UNPLANNED = (
    "cache_type_k",
    "cache_type_v",
    "batch_size",
    "threads_batch",
    "packed",
    "load_anyway",
)
_OF_NESTED = ("expert_bits", "quality")


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything a plan is made from."""

    file: TensorFile
    workload: LanguageWorkload
    topology: Topology
    goal: Goal
    popularity: Popularity
    nested: NestedAsk | None = None


def gather(options: PlanOptions, context: Context) -> Inputs:
    """Read the model's header, the hardware and the goal.

    Raises:
        ConfigError: a flag is wrong, or the hardware is implausible.
        FormatError: the model is damaged.
    """
    path = model_path(options.model, context.env) or embedded_model()
    file = open_tensor_file(path)
    spec = read_model_spec(file)
    nested = read_nested(file)
    refuse_unplanned(context, nested=nested is not None)
    cache = context.directories.cache
    ask = None if nested is None else ask_by_flags(nested, options.model, cache)
    workload = describe_language(file, spec)
    if options.goal.dimensions:
        raise ConfigError("--dimension is for ONNX models")
    topology = hardware(options.model, options.hardware, asked_for(file, options.model), context)
    n_ctx = context_for(options, file, spec, context)
    goal = goal_for(options, n_ctx, topology, len(workload.run_layers))
    return Inputs(file, workload, topology, goal, read_popularity(options, spec), ask)


def read_popularity(options: PlanOptions, spec: ModelSpec) -> Popularity:
    """Read what a routing trace says of the experts, if one is given."""
    trace = options.goal.routing_trace
    if trace is None:
        return Popularity()
    experts = (spec.n_layer, spec.n_expert, spec.n_expert_used)
    return read_routing_trace(user_path(trace), *experts)


def goal_again(manifest: Manifest) -> Goal:
    """Return the goal that a manifest was made for, for the runtime that is here."""
    metrics = {name: metric for metric, name in SHORT_METRICS.items()}
    run = manifest.run
    return Goal(
        n_prompt=manifest.goal.n_prompt,
        n_ctx=run.n_ctx,
        minimise=metrics[manifest.goal.minimise],
        ceilings={metrics[name]: most for name, most in manifest.goal.ceilings.items()},
        cache_types=(run.cache_type_k,),
        ubatches=(run.n_ubatch,),
        tokens_per_pass=run.tokens_per_pass,
        n_drafted=run.draft_max if run.draft != "none" else 0,
        draft=run.draft,
    ).checked()


def inputs_again(
    path: Path, manifest: Manifest, context: Context, *, measure: bool = True
) -> Inputs:
    """Return what a plan like a manifest needs here: its goal, bound, threads, routing trace.

    The bound is that of the manifest, or what is free now where that is less. Rates that are not
    known are measured, or assumed without `measure`.
    """
    from edgert.cli.options import ModelFlags
    from edgert.cli.plan_options import HardwareFlags

    file = open_tensor_file(path)
    spec = read_model_spec(file)
    stage = manifest.stages[0]
    limit = min(manifest.pool_of(stage).limit_bytes, default_memory_budget().budget_bytes)
    flags = ModelFlags(memory=str(limit), threads=manifest.device_of(stage).n_threads)
    topology = hardware(
        flags, HardwareFlags(no_measure=not measure), asked_for(file, flags), context
    )
    experts = (spec.n_layer, spec.n_expert, spec.n_expert_used)
    popularity = popularity_of(manifest.routing, *experts)
    if popularity is None and manifest.routing is not None:
        context.say("note: the manifest's routing trace is of another model, and is left out")
    goal = goal_again(manifest)
    workload = describe_language(file, spec)
    nested = read_nested(file)
    ask = None if nested is None else ask_again(nested, manifest, context.directories.cache)
    return Inputs(file, workload, topology, goal, popularity or Popularity(), ask)


def hardware(model: ModelFlags, flags: HardwareFlags, asked: Asked, context: Context) -> Topology:
    """Return the hosts to plan for: a file's, known devices, or this host."""
    if flags.topology is not None and flags.devices:
        raise ConfigError("--topology and --device exclude each other")
    if flags.topology is not None:
        from devices.profile_file import parse_topology, read_bounded

        content = read_bounded(user_path(flags.topology))
        return _bounded(_with_types(parse_topology(content, flags.topology), asked.types), model)
    if flags.devices:
        from devices.catalog import catalog_topology

        return _bounded(_with_types(catalog_topology(flags.devices), asked.types), model)
    host = _measured_host(asked, flags, context)
    return _bounded(Topology(home=host.host_id, hosts=(host,)), model)


def _with_types(topology: Topology, types: tuple[str, ...]) -> Topology:
    """Assume rates of the model's weight types where hosts have none of them."""
    hosts = tuple(with_types(host, types) for host in topology.hosts)
    return topology.model_copy(update={"hosts": hosts})


def identity(inputs: Inputs, hashes: FileHashes) -> ModelIdentity:
    """Hash the model's files; a hash that is remembered costs nothing."""
    spec, file = inputs.workload.spec, inputs.file
    return ModelIdentity(
        format="gguf",
        name=spec.name,
        architecture=spec.architecture,
        n_layer=len(inputs.workload.run_layers),
        weight_bytes=spec.weight_bytes,
        files=tuple(
            ModelFile(
                path=shard.path.name, size_bytes=shard.size_bytes,
                sha256=hashes.of(shard.path),
            )
            for shard in file.shards
        ),
    )  # fmt: skip


def asked_for(file: TensorFile, model: ModelFlags) -> Asked:
    """Ask for the weight types and heads of a language model."""
    heads = heads_of(read_model_spec(file))
    return Asked(file.path, types_of(file), model.threads, list_runtimes=False, heads=heads)


def _measured_host(asked: Asked, flags: HardwareFlags, context: Context) -> HostProfile:
    """Return this host; rates of this model that were never measured are measured now."""
    if flags.measure and flags.no_measure:
        raise ConfigError("--measure and --no-measure exclude each other")
    known = flags.no_measure or has_measured(asked, context.directories)
    if known and not flags.measure:
        return this_host(asked, context.directories, context.env)
    context.say("measuring this host for a minute or more; anything else that runs disturbs it")
    return this_host(replace(asked, measure=True), context.directories, context.env)


def _bounded(topology: Topology, model: ModelFlags) -> Topology:
    """Put the bound on the process in place of what the home host has free."""
    host = topology.host(topology.home)
    if model.memory is None:
        return topology
    limit_bytes = parse_bytes(model.memory)
    total_bytes = host.pool(host.devices[0].pool_id).total_bytes
    if limit_bytes > total_bytes:
        raise ConfigError(
            f"--memory {model.memory}: {host.name} has {total_bytes:,} bytes",
            hint="name a bound on the process that its memory holds",
        )
    return topology.model_copy(
        update={
            "hosts": tuple(
                _with_limit(other, limit_bytes) if other.host_id == host.host_id else other
                for other in topology.hosts
            )
        }
    )


def context_for(options: PlanOptions, file: TensorFile, spec: ModelSpec, context: Context) -> int:
    """Return the positions that are planned; ConfigError beyond a table of learned ones."""
    asked = options.model.ctx_size or min(spec.n_ctx_train, _DEFAULT_CONTEXT)
    table = file.by_name.get("position_embd.weight")
    n_most = LARGEST_CONTEXT if table is None else table.shape[1]
    if asked > n_most:
        raise ConfigError(
            f"--ctx-size {asked} is more than the {n_most} positions this model has",
            hint=f"use --ctx-size {n_most}",
        )
    n_ctx = min(-(-asked // _CONTEXT_STEP) * _CONTEXT_STEP, n_most)
    if options.model.ctx_size not in (None, n_ctx):
        context.say(f"note: a context of {n_ctx} positions: llama.cpp rounds {asked} up")
    n_prompt = _prompt_tokens(options, n_ctx)
    if n_prompt >= n_ctx and n_ctx > 1:
        raise ConfigError(
            f"--prompt-tokens {n_prompt} leaves no room for a reply in a context of {n_ctx}",
            hint=f"--prompt-tokens {max(1, n_ctx // 2)}, or a larger -c",
        )
    return n_ctx


def _prompt_tokens(options: PlanOptions, n_ctx: int) -> int:
    return options.goal.prompt_tokens or max(1, min(_DEFAULT_PROMPT, n_ctx // 2))


def refuse_unplanned(context: Context, *, nested: bool = False) -> None:
    """Refuse flags of the runtime that a plan decides, or that it does not know about."""
    for name in _UNPLANNED if nested else (*_UNPLANNED, *_OF_NESTED):
        if context.origins.get(name, "default") == "flag":
            flag = name.replace("_", "-")
            raise ConfigError(
                f"--{flag} is not something to plan with",
                hint=_unplanned_hint(name),
            )


def _unplanned_hint(name: str) -> str | None:
    if name in _OF_NESTED:
        return "it chooses widths of nested experts, and this model has none"
    return "--cache-types lists KV types the plan may use" if "cache" in name else None


def _with_limit(host: HostProfile, limit_bytes: int) -> HostProfile:
    """Bound the memory that the process itself takes from: the pool of the first device."""
    main = host.devices[0].pool_id
    pools = tuple(
        pool.model_copy(
            update={
                "available_bytes": limit_bytes,
            }
        )
        if pool.pool_id == main
        else pool
        for pool in host.pools
    )
    return host.model_copy(update={"pools": pools})


def goal_for(options: PlanOptions, n_ctx: int, topology: Topology, n_layer: int) -> Goal:
    """Return what the flags ask for, checked."""
    flags, model = options.goal, options.model
    elsewhere = options.hardware.topology is not None or bool(options.hardware.devices)
    ubatches = Goal().ubatches if model.ubatch_size is None else (model.ubatch_size,)
    draft = flags.tokens_per_pass > 1
    return Goal(
        n_prompt=_prompt_tokens(options, n_ctx),
        n_ctx=n_ctx,
        minimise=_METRICS[flags.goal],
        ceilings=_ceilings(flags, model),
        cache_types=_cache_types(flags.cache_types),
        ubatches=ubatches,
        abilities=ALL_ABILITIES if elsewhere or options.hardware.future else RUNTIME_ABILITIES,
        may_leave=_may_leave(flags.may_leave) if len(topology.hosts) > 1 else (),
        stays=tuple(_stay(text, topology, n_layer) for text in flags.stays),
        tokens_per_pass=flags.tokens_per_pass,
        n_drafted=16 if draft else 0,
        draft="ngram" if draft else "none",
    ).checked()


def _ceilings(flags: GoalFlags, model: ModelFlags) -> dict[Metric, float]:
    given: dict[Metric, float | None] = {
        "tpot_s": flags.max_tpot,
        "ttft_s": flags.max_ttft,
        "energy_j": flags.max_energy,
        "sent_bytes": _bytes_or_nothing(flags.max_bytes_sent),
    }
    del model  # its --memory bounds a pool, which is stricter than a ceiling on the sum
    return {metric: float(most) for metric, most in given.items() if most is not None}


def _bytes_or_nothing(text: str | None) -> int | None:
    """Parse a size that may be 0: nothing is sent."""
    if text is None or text.strip() == "0":
        return None if text is None else 0
    return parse_bytes(text)


def _cache_types(text: str) -> tuple[CacheType, ...]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in _CACHE_TYPES]
    if unknown or not names:
        raise ConfigError(
            f"--cache-types {text}: {unknown[0] if unknown else 'nothing'!r} is no KV cache type",
            hint=f"choose from {', '.join(_CACHE_TYPES)}",
        )
    return tuple(kind for kind in dict.fromkeys(names) if kind in _CACHE_TYPES)


def _may_leave(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in _DEPARTURES]
    if unknown:
        raise ConfigError(
            f"--may-leave {text}: {unknown[0]!r} is nothing that could leave",
            hint=f"choose from {', '.join(_DEPARTURES)}",
        )
    return names


def _stay(text: str, topology: Topology, n_layer: int) -> Stay:
    match = _STAY.fullmatch(text)
    if match is None:
        raise ConfigError(f"--stay {text[:80]}: wanted FIRST:END=HOST", hint="as --stay 0:4=phone")
    first, end, host = int(match[1]), int(match[2]), match[3]
    known = [item.host_id for item in topology.hosts]
    if host not in known:
        raise ConfigError(f"--stay {text}: no host {host}", hint=f"there are {', '.join(known)}")
    if not first < end <= n_layer:
        raise ConfigError(
            f"--stay {text}: layers {first}..{end}, the model has 0..{n_layer}",
            hint=f"ranges are half-open: 0:{n_layer} is the whole model",
        )
    if first == 0 and host != topology.home:
        raise ConfigError(
            f"--stay {text}: layer 0 must be on {topology.home}, where prompts begin",
            hint="--may-leave input,hidden_states,logits lets prompts leave",
        )
    return Stay(first, end, host)
