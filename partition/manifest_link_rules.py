"""Rules of a manifest about what crosses stages and hosts, and what a runtime must be able to do.

A transport without a peer key is allowed: a plan is made before hosts have exchanged keys. A
runtime connects to no peer whose key it does not know.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from partition.manifest import Ability, Manifest, Stage, Transport
from partition.manifest_rules import Violation, path_rule
from partition.manifest_stage_rules import Group, stage_groups

# Follow exactly from the stages; the other abilities depend on more than a manifest says.
_DERIVED: tuple[Ability, ...] = (
    "resident", "streaming", "expert_cache", "nested_precision", "pipeline", "tensor_parallel",
    "accelerator", "onnx", "vocabulary_shards",
)  # fmt: skip


def transport_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that transports join stages that follow each other, each pair once, none missing."""
    pairs: set[tuple[str, str]] = set()
    wrong = False
    for index, transport in enumerate(manifest.transport):
        pair = (transport.source_stage, transport.target_stage)
        path = f"$.transport[{index}]"
        found = list(_ends(manifest, transport, path))
        if not found:
            found = list(_kind(manifest, transport, path))
        if pair in pairs:
            found.append(
                Violation(f"{path}.target_stage", pair[1], f"one transport from {pair[0]}")
            )
        pairs.add(pair)
        wrong = wrong or bool(found)
        yield from found
    if not wrong:
        yield from _missing(manifest, pairs)


def policy_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that what crosses from home to other hosts is named in the policy."""
    policies, stages = manifest.policies, manifest.stages
    groups = stage_groups(stages)
    crossing = []
    for stage in (stages[index] for index in groups[0]):
        if stage.host_id != policies.home:
            what = "input" if stage.embedding or len(groups[0]) == 1 else "hidden_states"
            crossing.append((what, f"stage {stage.stage_id} is not at home"))
    for sources, targets in _hops(manifest, groups):
        at_home = [i for i in sources if stages[i].host_id == policies.home]
        away = [i for i in targets if stages[i].host_id != policies.home]
        if at_home and away:
            what = "hidden_states" if stages[at_home[0]].end_layer else "embeddings"
            crossing.append((what, f"stage {stages[away[0]].stage_id} is not at home"))
    crossing += [
        ("logits", f"stage {stage.stage_id} has the head and is not at home")
        for stage in stages
        if stage.head and stage.host_id != policies.home
    ]
    for what, reason in crossing:
        if what not in policies.may_leave:
            rule = f"{what} among them, as {reason}"
            yield Violation("$.policies.may_leave", policies.may_leave, rule)
    if len({*policies.may_leave}) != len(policies.may_leave):
        yield Violation("$.policies.may_leave", policies.may_leave, "each once")
    yield from _fallback(manifest)


def _fallback(manifest: Manifest) -> Iterator[Violation]:
    """Check that a fallback lies beside the manifest and that there are hosts that may fail."""
    fallback = manifest.policies.fallback
    if fallback is None:
        return
    rule = path_rule(fallback.path)
    if rule is not None:
        yield Violation("$.policies.fallback.path", fallback.path, rule)
    if len(manifest.hosts) == 1:
        yield Violation("$.policies.fallback", {}, "none, as home is the only host")


def ability_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that `requires` names what the stages need, and nothing that none of them does."""
    needed = needed_abilities(manifest)
    for ability in _DERIVED:
        if ability in needed and ability not in manifest.requires:
            rule = f"{ability} among them, as {needed[ability]}"
            yield Violation("$.requires", manifest.requires, rule)
    for index, ability in enumerate(manifest.requires):
        if ability in _DERIVED and ability not in needed:
            yield Violation(f"$.requires[{index}]", ability, "only what a stage needs")
        if ability == "edge_cloud" and len(manifest.hosts) == 1:
            yield Violation(f"$.requires[{index}]", ability, "it with several hosts only")
        if ability in manifest.requires[:index]:
            yield Violation(f"$.requires[{index}]", ability, "each once")


def needed_abilities(manifest: Manifest) -> dict[Ability, str]:
    """Return the abilities that follow from the stages, each with its reason."""
    stages = manifest.stages
    kinds = {(h.host_id, d.device_id): d.kind for h in manifest.hosts for d in h.devices}
    needed: dict[Ability, str] = {}

    def need(ability: Ability, reason: str) -> None:
        needed.setdefault(ability, reason)

    if len(stage_groups(stages)) > 1:
        need("pipeline", "stages follow each other")
    for stage in stages:
        name = f"stage {stage.stage_id}"
        if stage.tiers.streamed:
            need("streaming", f"{name} streams")
        if stage.tiers.cached:
            need("expert_cache", f"{name} caches experts")
        if stage.is_nested:
            need("nested_precision", f"{name} has nested experts")
        if not (stage.tiers.streamed or stage.tiers.cached):
            need("resident", f"{name} neither streams nor caches")
        if stage.share is not None:
            need("tensor_parallel", f"{name} has a share of its layers")
        if kinds.get((stage.host_id, stage.device_id)) in ("gpu", "npu"):
            need("accelerator", f"{name} is on {stage.device_id}")
        if stage.share is None and stage.host_id != manifest.policies.home:
            need("pipeline", f"{name} is on {stage.host_id} and prompts begin at home")
    if sum(stage.head for stage in stages) > 1:
        need("vocabulary_shards", "several stages have the head")
    if manifest.model.format == "onnx":
        need("onnx", "the model is ONNX")
    return needed


def _ends(manifest: Manifest, transport: Transport, path: str) -> Iterator[Violation]:
    groups = stage_groups(manifest.stages)
    number = {manifest.stages[i].stage_id: n for n, group in enumerate(groups) for i in group}
    for end in ("source_stage", "target_stage"):
        name = getattr(transport, end)
        if name not in number:
            yield Violation(f"{path}.{end}", name, f"one of {', '.join(number)}")
            return
    source, target = number[transport.source_stage], number[transport.target_stage]
    beside = source == target and transport.source_stage != transport.target_stage
    home_again = (source, target) == (len(groups) - 1, 0) and _returns(manifest, groups)
    if not (target == source + 1 or beside or home_again):
        rule = f"a stage right after {transport.source_stage}"
        yield Violation(f"{path}.target_stage", transport.target_stage, rule)


def _kind(manifest: Manifest, transport: Transport, path: str) -> Iterator[Violation]:
    stages = {stage.stage_id: stage for stage in manifest.stages}
    source, target = stages[transport.source_stage], stages[transport.target_stage]
    keys = {host.host_id: host.peer_key for host in manifest.hosts}
    if transport.kind == "memory" and source.host_id != target.host_id:
        rule = f"exchange or service between hosts {source.host_id} and {target.host_id}"
        yield Violation(f"{path}.kind", transport.kind, rule)
    yield from _codec(transport, source, target, path)
    if transport.peer_key is None:
        return
    if transport.kind == "memory":
        yield Violation(f"{path}.peer_key", transport.peer_key, "none inside a host")
    elif keys.get(target.host_id) not in (None, transport.peer_key):
        rule = f"{keys[target.host_id]}, as host {target.host_id} has"
        yield Violation(f"{path}.peer_key", transport.peer_key, rule)


def _codec(transport: Transport, source: Stage, target: Stage, path: str) -> Iterator[Violation]:
    """Check that precision is lost only between hosts that follow each other, within a bound."""
    if transport.codec != "f32" and transport.kind == "memory":
        yield Violation(f"{path}.codec", transport.codec, "f32 inside a host")
    elif transport.codec != "f32" and source.share is not None and target.share is not None:
        yield Violation(f"{path}.codec", transport.codec, "f32 between shares of layers")
    if (transport.codec == "adaptive") != (transport.bound is not None):
        rule = "a bound, as the codec is adaptive"
        if transport.codec != "adaptive":
            rule = f"none, as the codec is {transport.codec}"
        yield Violation(f"{path}.bound", transport.bound, rule)


def _missing(manifest: Manifest, pairs: set[tuple[str, str]]) -> Iterator[Violation]:
    stages = manifest.stages
    for sources, targets in _hops(manifest, stage_groups(stages)):
        before = [stages[index] for index in sources]
        for target in (stages[index] for index in targets):
            same_device = any(_device(stage) == _device(target) for stage in before)
            joined = any((stage.stage_id, target.stage_id) in pairs for stage in before)
            if not same_device and not joined:
                rule = f"one from {before[0].stage_id} to {target.stage_id}, on another device"
                yield Violation("$.transport", manifest.transport, rule)


def _hops(manifest: Manifest, groups: tuple[Group, ...]) -> Iterator[tuple[Group, Group]]:
    """Return which groups hand activations to which, back to the first one where its head is."""
    yield from pairwise(groups)
    if _returns(manifest, groups):
        yield groups[-1], groups[0]


def _returns(manifest: Manifest, groups: tuple[Group, ...]) -> bool:
    return len(groups) > 1 and any(manifest.stages[index].head for index in groups[0])


def _device(stage: Stage) -> tuple[str, str]:
    return stage.host_id, stage.device_id
