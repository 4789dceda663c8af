"""Rules of a manifest that types cannot say: names, paths, settings, memory.

Every violation names its path, what is there and what was wanted. Rules about stages and how they
follow each other are in `partition.manifest_stage_rules`. What needs the model or the device is for
the runtime to check.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from edgert.strict_json import show_value
from partition.manifest import Host, Manifest, ModelIdentity, Predicted, Prediction, Stage

_LONGEST_COMPONENT_BYTES = 255


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a manifest breaks.

    Attributes:
        path: Where, such as `$.stages[1].first_layer`.
        value: What is there.
        rule: What was wanted.
    """

    path: str
    value: object
    rule: str

    def __str__(self) -> str:
        return f"{self.path}: {show_value(self.value)}, wanted {self.rule}"


Rule = Callable[[Manifest], Iterable[Violation]]


def path_rule(path: str) -> str | None:
    """Return the rule that a relative path breaks, None for a path that stays in its folder."""
    parts = path.split("/")
    broken = {
        "a relative path": path.startswith("/") or path[1:2] == ":",
        "forward slashes": "\\" in path,
        "printable characters": not path.isprintable(),
        "no empty part": "" in parts,
        "no . or ..": not {".", ".."}.isdisjoint(parts),
        "a path that does not start with ~": path.startswith("~"),
        f"parts of {_LONGEST_COMPONENT_BYTES} bytes at most": any(
            len(part.encode("utf-8", "replace")) > _LONGEST_COMPONENT_BYTES for part in parts
        ),
    }
    return next((rule for rule, found in broken.items() if found), None)


def repeated(ids: Iterable[str], path: Callable[[int], str]) -> Iterator[Violation]:
    """Find names that were there before."""
    seen: dict[str, int] = {}
    for index, name in enumerate(ids):
        if name in seen:
            yield Violation(path(index), name, f"a name other than that of {path(seen[name])}")
        seen.setdefault(name, index)


def file_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check the files of the model: paths inside their folder, each once, of enough bytes."""
    yield from identity_rules(manifest.model, "$.model")


def identity_rules(model: ModelIdentity, place: str) -> Iterator[Violation]:
    """Check the files of one model, or of one of its variants, which is at a path."""
    files = model.files
    for index, file in enumerate(files):
        rule = path_rule(file.path)
        if rule is not None:
            yield Violation(f"{place}.files[{index}].path", file.path, rule)
        if file.size_bytes == 0:
            yield Violation(f"{place}.files[{index}].size_bytes", 0, "1 or more")
    paths = [file.path for file in files]
    yield from repeated(paths, lambda index: f"{place}.files[{index}].path")
    for index, path in enumerate(paths):
        if any(other.startswith(f"{path}/") for other in paths):
            yield Violation(f"{place}.files[{index}].path", path, "a file, not the folder of one")
    size_bytes = sum(file.size_bytes for file in files)
    if model.weight_bytes > size_bytes:
        yield Violation(
            f"{place}.weight_bytes", model.weight_bytes,
            f"{size_bytes} at most, the bytes of the model's files",
        )  # fmt: skip


def host_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check names of hosts, memories and devices, and that every host has a part."""
    hosts = manifest.hosts
    yield from repeated((h.host_id for h in hosts), lambda index: f"$.hosts[{index}].host_id")
    for index, host in enumerate(hosts):
        yield from _inside_host(host, f"$.hosts[{index}]")
    used = {stage.host_id for stage in manifest.stages} | {manifest.policies.home}
    for index, host in enumerate(hosts):
        if host.host_id not in used:
            yield Violation(
                f"$.hosts[{index}].host_id", host.host_id, "a host with a stage, or home"
            )
    if manifest.policies.home not in {host.host_id for host in hosts}:
        yield Violation(
            "$.policies.home", manifest.policies.home, _one_of(h.host_id for h in hosts)
        )


def _inside_host(host: Host, path: str) -> Iterator[Violation]:
    pools = [pool.pool_id for pool in host.pools]
    yield from repeated(pools, lambda index: f"{path}.pools[{index}].pool_id")
    yield from repeated(
        (device.device_id for device in host.devices),
        lambda index: f"{path}.devices[{index}].device_id",
    )
    for index, device in enumerate(host.devices):
        if device.pool_id not in pools:
            yield Violation(f"{path}.devices[{index}].pool_id", device.pool_id, _one_of(pools))


def memory_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that what is known without the model fits into the limit of each memory."""
    yield from _weights_alone(manifest)
    for host_index, host in enumerate(manifest.hosts):
        pool_of = {device.device_id: device.pool_id for device in host.devices}
        for index, pool in enumerate(host.pools):
            needed = sum(
                _known_bytes(stage)
                for stage in manifest.stages
                if stage.host_id == host.host_id and pool_of.get(stage.device_id) == pool.pool_id
            )
            if needed > pool.limit_bytes:
                yield Violation(
                    f"$.hosts[{host_index}].pools[{index}].limit_bytes", pool.limit_bytes,
                    f"{needed} or more, what its stages take for KV, buffers, windows, caches and "
                    "weights wholly in memory",
                )  # fmt: skip


def _weights_alone(manifest: Manifest) -> Iterator[Violation]:
    """Check that the weights of each stage that is wholly in memory fit into it by themselves."""
    limits = {
        (host.host_id, device.device_id): pool.limit_bytes
        for host in manifest.hosts
        for device in host.devices
        for pool in host.pools
        if pool.pool_id == device.pool_id
    }
    for index, stage in enumerate(manifest.stages):
        limit_bytes = limits.get((stage.host_id, stage.device_id))
        weight_bytes = sum(stage.precision.values())
        if limit_bytes is not None and _is_resident(stage) and weight_bytes > limit_bytes:
            rule = f"{limit_bytes} bytes at most, its memory's limit, as none of them are elsewhere"
            yield Violation(f"$.stages[{index}].precision", weight_bytes, rule)


def _is_resident(stage: Stage) -> bool:
    """Whether every weight of a stage is in memory, whole."""
    tiers = stage.tiers
    return not (tiers.streamed or tiers.cached or tiers.looked_up)


def _known_bytes(stage: Stage) -> int:
    """Return the memory of a stage that its manifest tells; weights where all of them stay."""
    tiers = stage.tiers
    return (
        stage.kv_bytes
        + stage.buffer_bytes
        + tiers.window_bytes
        + (tiers.experts.cache_bytes if tiers.experts is not None else 0)
        + (sum(stage.precision.values()) if _is_resident(stage) else 0)
    )


def run_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check the settings against each other."""
    run = manifest.run
    for name, value, most_name, most in (
        ("n_batch", run.n_batch, "n_ctx", run.n_ctx),
        ("n_ubatch", run.n_ubatch, "n_batch", run.n_batch),
        ("n_logits_max", run.n_logits_max, "n_batch", run.n_batch),
    ):
        if value > most:
            yield Violation(f"$.run.{name}", value, f"{most} at most, as run.{most_name} says")
    if run.draft != "none" and run.draft_max >= run.n_logits_max:
        rule = f"less than run.n_logits_max, {run.n_logits_max}: every drafted token is verified"
        yield Violation("$.run.draft_max", run.draft_max, rule)
    yield from _speculation(manifest)
    if manifest.goal.n_prompt > run.n_ctx:
        yield Violation(
            "$.goal.n_prompt", manifest.goal.n_prompt, f"{run.n_ctx} at most, as run.n_ctx says"
        )
    for metric, ceiling in manifest.goal.ceilings.items():
        if ceiling < 0 or (ceiling == 0 and metric != "bytes_sent"):
            yield Violation(f"$.goal.ceilings.{metric}", ceiling, "more than 0")


def _speculation(manifest: Manifest) -> Iterator[Violation]:
    """Check that a pass makes no more tokens than are drafted, and its own."""
    run, path = manifest.run, "$.run.tokens_per_pass"
    if run.draft == "none" and run.tokens_per_pass != 1:
        yield Violation(path, run.tokens_per_pass, "1, as run.draft is none")
    elif run.draft != "none" and run.tokens_per_pass > run.draft_max + 1:
        rule = f"{run.draft_max + 1} at most, one more than run.draft_max"
        yield Violation(path, run.tokens_per_pass, rule)


def prediction_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that every predicted figure lies in its range, and that memory is within its limits."""
    for name in Predicted.model_fields:
        figure = getattr(manifest.predicted, name)
        if isinstance(figure, Prediction) and not figure.low <= figure.value <= figure.high:
            yield Violation(
                f"$.predicted.{name}.value", figure.value,
                f"{figure.low} to {figure.high}, its low and high",
            )  # fmt: skip
    used = {stage.host_id for stage in manifest.stages}
    limits = [sum(p.limit_bytes for p in host.pools) for host in manifest.hosts
              if host.host_id in used]  # fmt: skip
    peak_bytes = manifest.predicted.peak_memory_bytes.value
    if peak_bytes > max(limits, default=0):
        rule = f"{max(limits, default=0)} at most, the memory of the largest host with a stage"
        yield Violation("$.predicted.peak_memory_bytes.value", peak_bytes, rule)


def _one_of(names: Iterable[str]) -> str:
    return f"one of {', '.join(names)}"
