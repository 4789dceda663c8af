"""From a plan to its manifest: adds what the planner does not know, the model's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal

from devices.profile import KernelRate
from devices.topology import Topology
from partition.baselines import PlainWay
from partition.build_problem import Place
from partition.candidates import Candidate
from partition.manifest import (
    RUNTIME_ABILITIES,
    Ability,
    Baseline,
    Codec,
    Decision,
    Device,
    Host,
    Manifest,
    ModelIdentity,
    Policies,
    Pool,
    Predicted,
    Prediction,
    Run,
    Stage,
    Transport,
)
from partition.manifest import Goal as AskedGoal
from partition.plan import Plan
from partition.popularity import Popularity, routing_of
from partition.problem import SHORT_METRICS
from partition.rates_used import link_warnings, links_used, time_range
from partition.reasons import Reason
from partition.settings import BATCH_TOKENS
from partition.stage_plan import StagePlan
from partition.stage_tiers import precision

_NO_VARIANTS: Mapping[str, ModelIdentity] = MappingProxyType({})
_MEMORY_RANGE = 0.05
_READ_RANGE = 0.02
# Which experts a text wants is known from another text at best, and some are read for nothing.
_CACHE_READ_RANGE = 0.4
# Of what a token wants, at most: experts that no token wanted before are in no cache.
# The mixture inside edgert reads 5 % right after a prompt of 128 tokens.
_FIRST_USES = 0.1


def bind(
    plan: Plan,
    model: ModelIdentity,
    tool_version: str,
    popularity: Popularity | None = None,
    variants: Mapping[str, ModelIdentity] = _NO_VARIANTS,
) -> Manifest:
    """Return the manifest of a plan.

    Args:
        plan: What was decided.
        model: Its files.
        tool_version: Says who made it.
        popularity: What the plan was made with; a trace is kept for making it anew.
        variants: Files of the model in other precisions, by the names that stages have for them.
    """
    chosen, goal = plan.chosen, plan.goal
    required = requirements(chosen, plan.topology.home)
    hosts = [stage.place.host.host_id for stage in chosen.stages]
    links = links_used(hosts, plan.topology, parallel=chosen.parallel)
    n_ubatch = chosen.setting.n_ubatch
    n_batch = min(max(BATCH_TOKENS, n_ubatch), goal.n_ctx)
    n_logits_max = min(goal.n_logits_max, n_batch)
    return Manifest(
        tool_version=tool_version,
        model=model,
        variants=tuple(variants.values()),
        goal=AskedGoal.model_validate(
            {
                "minimise": SHORT_METRICS[goal.minimise],
                "n_prompt": goal.n_prompt,
                "ceilings": {SHORT_METRICS[name]: most for name, most in goal.ceilings.items()},
            }
        ),
        hosts=hosts_of([stage.place for stage in chosen.stages], plan.topology),
        stages=tuple(_stage(s, index, (*variants,)) for index, s in enumerate(chosen.stages)),
        run=Run.model_validate(
            {
                "n_ctx": goal.n_ctx, "n_batch": n_batch,
                "n_ubatch": n_ubatch, "n_logits_max": n_logits_max,
                "cache_type_k": chosen.setting.cache_type,
                "cache_type_v": chosen.setting.cache_type,
                "draft": goal.draft, "draft_max": max(1, min(goal.n_drafted, n_logits_max - 1)),
                "tokens_per_pass": goal.tokens_per_pass,
            }
        ),
        transport=_star(chosen.stages) if chosen.parallel else _transport(chosen),
        policies=Policies.model_validate(
            {"home": plan.topology.home, "may_leave": tuple(goal.may_leave)}
        ),
        requires=required,
        predicted=_predicted(chosen, plan.topology),
        binds=plan.binds,
        decisions=decisions_of(plan.reasons),
        baselines=baselines_of(plan.plain),
        warnings=(*plan.warnings, *link_warnings(links), *unrunnable(required)),
        routing=None if popularity is None else routing_of(popularity),
    )  # fmt: skip


def decisions_of(reasons: Sequence[Reason]) -> tuple[Decision, ...]:
    """Write down what was decided and why."""
    return tuple(
        Decision(what=item.what, choice=item.choice, reason=item.reason) for item in reasons
    )


def baselines_of(ways: Sequence[PlainWay]) -> tuple[Baseline, ...]:
    """Write down what the model would do without a plan."""
    return tuple(
        Baseline(
            name=way.name, reason=way.reason,
            tpot_ms=None if way.tpot_s is None else 1e3 * way.tpot_s,
        )
        for way in ways
    )  # fmt: skip


def requirements(candidate: Candidate, home: str) -> tuple[Ability, ...]:
    """Return what a runtime at home must be able to do to execute a candidate, sorted."""
    found: set[Ability] = set()
    for stage in candidate.stages:
        if stage.tiers.cached:
            found.add("expert_cache")
        if stage.is_nested:
            found.add("nested_precision")
        if stage.tiers.streamed:
            found.add("streaming")
        if not (stage.tiers.cached or stage.tiers.streamed):
            found.add("resident")
        if stage.place.device.kind != "cpu":
            found.add("accelerator")
    if candidate.parallel:
        found.add("tensor_parallel")
    elif len(candidate.stages) > 1 or candidate.stages[0].place.host.host_id != home:
        found.add("pipeline")
    if candidate.split is not None:
        found.add("edge_cloud")
    if candidate.heads > 1:
        found.add("vocabulary_shards")
    return tuple(sorted(found))


def unrunnable(required: Sequence[Ability]) -> tuple[str, ...]:
    """Return the warning that this runtime cannot execute a plan, if it cannot."""
    missing = sorted(set(required) - RUNTIME_ABILITIES)
    if not missing:
        return ()
    return (f"this version of the runtime cannot execute it yet: {', '.join(missing)}",)


def hosts_of(places: Sequence[Place], topology: Topology) -> tuple[Host, ...]:
    """List the hosts that have stages, and home, where prompts and replies are."""
    hosts = []
    with_stages = (place.host.host_id for place in places)
    for host in dict.fromkeys((*with_stages, topology.home)):
        profile = topology.host(host)
        used = dict.fromkeys(
            place.device.device_id for place in places if place.host.host_id == host
        )
        devices = [profile.device(name) for name in used] or [profile.devices[0]]
        # The program is in its processor's memory, whatever it computes on.
        programs = [device.pool_id for device in profile.devices if device.kind == "cpu"][:1]
        hosts.append(
            Host(
                host_id=host, name=profile.name, fingerprint=profile.fingerprint,
                pools=tuple(
                    Pool(pool_id=name, limit_bytes=profile.pool(name).available_bytes)
                    for name in dict.fromkeys([*(d.pool_id for d in devices), *programs])
                ),
                devices=tuple(
                    Device(
                        device_id=device.device_id, kind=device.kind, name=device.name,
                        pool_id=device.pool_id, n_threads=_threads(device.kernels),
                        n_threads_batch=_threads(device.kernels),
                    )
                    for device in devices
                ),
            )
        )  # fmt: skip
    return tuple(hosts)


def _threads(kernels: Sequence[KernelRate]) -> int | None:
    return max((k.n_threads for k in kernels if k.n_threads is not None), default=None)


def _stage(stage: StagePlan, index: int, variants: Sequence[str]) -> Stage:
    every = {t.name: t for t in (*stage.weights.looked_up, *stage.weights.whole)}
    return Stage(
        stage_id=f"s{index}",
        host_id=stage.place.host.host_id,
        device_id=stage.place.device.device_id,
        first_layer=stage.first_layer,
        end_layer=stage.end_layer,
        embedding=stage.first_layer == 0 and (stage.share is None or index == 0),
        head=stage.head,
        precision=precision(every.values()),
        tiers=stage.tiers,
        share=stage.share,
        variant=variants.index(stage.source) if stage.source in variants else None,
        kv_bytes=stage.kv_bytes,
        buffer_bytes=stage.buffer_bytes,
    )


def _transport(chosen: Candidate) -> tuple[Transport, ...]:
    stages, split = chosen.stages, chosen.split
    codec: Codec = "f32" if split is None else split.codec
    bound = None if split is None else split.bound
    # A cloud scales behind balancers, which know the service's protocol.
    between: Literal["exchange", "service"] = "exchange" if split is None else "service"
    pairs = [(index, index + 1) for index in range(len(stages) - 1)]
    if stages[0].head and len(stages) > 1:
        pairs.append((len(stages) - 1, 0))
    found = []
    for source, target in pairs:
        hosts = {stages[index].place.host.host_id for index in (source, target)}
        within = len(hosts) == 1 and target > source
        found.append(
            Transport(
                source_stage=f"s{source}", target_stage=f"s{target}",
                kind="memory" if within else between, codec=codec, bound=bound,
            )
        )  # fmt: skip
    return tuple(found)


def _star(stages: Sequence[StagePlan]) -> tuple[Transport, ...]:
    """Join the first stage, which is at home, with each other one, both ways."""
    pairs = [(f"s{i}", f"s{j}") for n in range(1, len(stages)) for i, j in ((n, 0), (0, n))]
    return tuple(
        Transport(source_stage=source, target_stage=target, kind="exchange", codec="f32")
        for source, target in pairs
    )


def _predicted(chosen: Candidate, topology: Topology) -> Predicted:
    width = time_range(chosen, topology)
    read = sum(stage.forecast.read_bytes for stage in chosen.stages) / chosen.tokens_per_pass
    cached = any(stage.tiers.cached for stage in chosen.stages)
    first_uses = _FIRST_USES * sum(stage.forecast.wanted_bytes for stage in chosen.stages)
    reads = around(read, _CACHE_READ_RANGE if cached else _READ_RANGE)
    peak = max(_peaks(chosen).values())
    return Predicted(
        load_ms=around(1e3 * chosen.load_s, max(width, 0.25)),
        ttft_ms=around(1e3 * chosen.ttft_s, max(width, 0.25)),
        tpot_ms=around(1e3 * chosen.tpot_s, width),
        decode_tok_s=Prediction(
            value=1 / chosen.tpot_s, low=1 / chosen.tpot_s / (1 + width),
            high=1 / chosen.tpot_s / (1 - width),
        ),
        peak_memory_bytes=Prediction(
            value=float(peak), low=peak * (1 - _MEMORY_RANGE), high=float(peak)
        ),
        bytes_read_per_token=reads.model_copy(update={"high": max(reads.high, first_uses)}),
        bytes_sent_per_token=around(chosen.of("sent_bytes"), 0.02),
        energy_mj_per_token=(
            around(1e3 * chosen.energy_j, max(width, 0.25))
            if power_is_known(stage.place for stage in chosen.stages)
            else None
        ),
    )  # fmt: skip


def power_is_known(places: Iterable[Place]) -> bool:
    """Whether energy can be told: one device of unknown power would seem to be free."""
    return all(place.device.power_w is not None for place in places)


def _peaks(chosen: Candidate) -> dict[str, int]:
    """Return the peak of each host: stages of one host are one process."""
    peaks: dict[str, int] = {}
    for stage in chosen.stages:
        host = stage.place.host.host_id
        peaks[host] = peaks.get(host, 0) + stage.peak_bytes
    return peaks


def around(value: float, width: float) -> Prediction:
    """Return a figure with a range of so much of it on both sides."""
    return Prediction(value=value, low=value * (1 - width), high=value * (1 + width))
