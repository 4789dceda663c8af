"""Rules of a manifest about its stages: every layer once, every tensor in one place.

Stages are listed in the order of the layers. A *group* is what runs the same layers: one stage, or
neighbours that share each layer between them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from partition.manifest import NESTED_PREFIX, Manifest, Stage, Tiers
from partition.manifest_rules import Violation, repeated

TIERS = ("pinned", "streamed", "looked_up", "cached")

_HEAD = re.compile(r"output(_norm)?\.(weight|bias)")
_NESTED = re.compile(NESTED_PREFIX + r"(\d)_(\d)")
_LAYER = re.compile(r"blk\.(\d{1,5})\.")

Group = tuple[int, ...]


def stage_groups(stages: Sequence[Stage]) -> tuple[Group, ...]:
    """Return the indices of the stages that run the same layers together."""
    groups: list[Group] = []
    for index, stage in enumerate(stages):
        before = stages[index - 1]
        together = index > 0 and stage.share is not None and before.share is not None
        if together and _layers(stage) == _layers(before):
            groups[-1] = (*groups[-1], index)
        else:
            groups.append((index,))
    return tuple(groups)


def place_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check the stages' names, and that their hosts and devices exist."""
    stages = manifest.stages
    yield from repeated((s.stage_id for s in stages), lambda index: f"$.stages[{index}].stage_id")
    devices = {h.host_id: [device.device_id for device in h.devices] for h in manifest.hosts}
    for index, stage in enumerate(stages):
        known = devices.get(stage.host_id)
        if known is None:
            rule = f"one of {', '.join(devices)}"
            yield Violation(f"$.stages[{index}].host_id", stage.host_id, rule)
        elif stage.device_id not in known:
            rule = f"one of {', '.join(known)} of host {stage.host_id}"
            yield Violation(f"$.stages[{index}].device_id", stage.device_id, rule)


def layer_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that the stages cover all layers once, in order."""
    stages, n_layer, expected = manifest.stages, manifest.model.n_layer, 0
    for first, *_ in stage_groups(stages):
        stage, path = stages[first], f"$.stages[{first}]"
        if stage.first_layer != expected:
            rule = f"{expected}: layers follow each other without gap or overlap"
            yield Violation(f"{path}.first_layer", stage.first_layer, rule)
        ends_here = stage.embedding or stage.head
        if stage.end_layer < stage.first_layer + (0 if ends_here else 1):
            rule = f"more than first_layer, which is {stage.first_layer}"
            yield Violation(f"{path}.end_layer", stage.end_layer, rule)
        expected = stage.end_layer
    if expected != n_layer:
        rule = f"{n_layer}, as model.n_layer says"
        yield Violation(f"$.stages[{len(stages) - 1}].end_layer", expected, rule)


def share_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that shares of the same layers are all of them, each once."""
    stages = manifest.stages
    for group in stage_groups(stages):
        expected, n_groups = 0, None
        for index in group:
            share, path = stages[index].share, f"$.stages[{index}].share"
            if share is None:
                break
            n_groups = share.n_groups if n_groups is None else n_groups
            if share.n_groups != n_groups:
                rule = f"{n_groups}, as in the stages beside it"
                yield Violation(f"{path}.n_groups", share.n_groups, rule)
            if share.first_group != expected:
                rule = f"{expected}: shares follow each other without gap or overlap"
                yield Violation(f"{path}.first_group", share.first_group, rule)
            if share.end_group <= share.first_group:
                rule = f"more than first_group, which is {share.first_group}"
                yield Violation(f"{path}.end_group", share.end_group, rule)
            expected = share.end_group
        if n_groups is not None and expected != n_groups:
            rule = f"{n_groups}, as n_groups says"
            yield Violation(f"$.stages[{group[-1]}].share.end_group", expected, rule)
        yield from _devices_once(stages, group)


def _devices_once(stages: Sequence[Stage], group: Group) -> Iterator[Violation]:
    """Check that no device has two shares of the same layers: they would be one."""
    seen: dict[tuple[str, str], int] = {}
    for index in group:
        place = (stages[index].host_id, stages[index].device_id)
        if place in seen:
            rule = f"a device other than that of $.stages[{seen[place]}], which shares its layers"
            yield Violation(f"$.stages[{index}].device_id", place[1], rule)
        seen.setdefault(place, index)


def end_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that embedding and head are at the ends, once; a language model has both."""
    groups = stage_groups(manifest.stages)
    for name in ("embedding", "head"):
        having = [
            index
            for index, group in enumerate(groups)
            if any(getattr(manifest.stages[stage], name) for stage in group)
        ]
        place = groups[0] if name == "embedding" else groups[-1]
        path = f"$.stages[{place[0]}].{name}"
        if not having and manifest.model.format == "gguf":
            yield Violation(path, False, f"true: no stage has the {name}")
        for extra in having[1:]:
            path = f"$.stages[{groups[extra][0]}].{name}"
            yield Violation(path, True, f"false: an earlier stage has the {name}")
        if having and groups[having[0]] != place and not _at_home(manifest, groups[0], name):
            wanted = "first" if name == "embedding" else "last stage or, at home, on the first"
            path = f"$.stages[{groups[having[0]][0]}].{name}"
            yield Violation(path, True, f"the {name} on the {wanted}")


def format_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that ONNX stages say their part of the graph, and others do not."""
    onnx = manifest.model.format == "onnx"
    for index, stage in enumerate(manifest.stages):
        if onnx != (stage.subgraph is not None):
            rule = "a subgraph, as the model is ONNX" if onnx else "none, as the model is GGUF"
            yield Violation(f"$.stages[{index}].subgraph", _key(stage.subgraph), rule)
        if onnx and stage.share is not None:
            rule = "none, as the model is ONNX"
            yield Violation(f"$.stages[{index}].share", _key(stage.share), rule)


def tier_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check each stage's tiers: no tensor twice, a window for streams, a cache for experts."""
    for index, stage in enumerate(manifest.stages):
        tiers, path = stage.tiers, f"$.stages[{index}].tiers"
        yield from _repeated_tensors(tiers, path)
        if bool(tiers.streamed) != bool(tiers.window_bytes):
            rule = "more than 0, as tensors are streamed" if tiers.streamed else "0, as none are"
            yield Violation(f"{path}.window_bytes", tiers.window_bytes, rule)
        if bool(tiers.cached) != (tiers.experts is not None):
            rule = "a cache for the cached tensors" if tiers.cached else "none, as none are cached"
            yield Violation(f"{path}.experts", _key(tiers.experts), rule)
        if tiers.experts is not None and tiers.experts.cache_bytes == 0:
            yield Violation(f"{path}.experts.cache_bytes", 0, "more than 0")
        if tiers.experts is not None and len({*tiers.experts.bits}) != len(tiers.experts.bits):
            yield Violation(f"{path}.experts.bits", tiers.experts.bits, "each width once")


def width_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check the widths of nested experts: in a cache, those of the file, with cuts between them."""
    for index, stage in enumerate(manifest.stages):
        experts, path = stage.tiers.experts, f"$.stages[{index}].tiers.experts"
        if not stage.is_nested:
            if experts is not None and experts.cuts:
                yield Violation(f"{path}.cuts", experts.cuts, "none, as no experts are nested")
            continue
        if experts is None:
            yield Violation(path, None, "a cache, as blocks of nested experts are made in one")
            continue
        bits, cuts = experts.bits, experts.cuts
        if not bits or list(bits) != sorted(set(bits)):
            yield Violation(f"{path}.bits", bits, "one width or more, ascending")
        elif len(cuts) != len(bits) - 1 or list(cuts) != sorted(cuts):
            yield Violation(f"{path}.cuts", cuts, f"{len(bits) - 1} shares, ascending")
        for base, top in _nested_widths(stage):
            if bits and not base <= min(bits) <= max(bits) <= top:
                yield Violation(f"{path}.bits", bits, f"widths of the file, {base} to {top}")


def _nested_widths(stage: Stage) -> Iterator[tuple[int, int]]:
    """Return base and top of each nested format of a stage."""
    for name in stage.precision:
        match = _NESTED.fullmatch(name)
        if match is not None:
            yield int(match[1]), int(match[2])


def tensor_rules(manifest: Manifest) -> Iterator[Violation]:
    """Check that tensors of a layer or the head are with its stage; others may be on several."""
    if manifest.model.format != "gguf":
        return
    for index, stage in enumerate(manifest.stages):
        if not any(getattr(stage.tiers, tier) for tier in TIERS):
            rule = "a tensor in this tier or in another one"
            yield Violation(f"$.stages[{index}].tiers.pinned", (), rule)
        for tier in TIERS:
            for place, name in enumerate(getattr(stage.tiers, tier)):
                match = _LAYER.match(name)
                if match and not stage.first_layer <= int(match[1]) < stage.end_layer:
                    rule = f"a tensor of layers [{stage.first_layer}, {stage.end_layer})"
                    yield Violation(f"$.stages[{index}].tiers.{tier}[{place}]", name, rule)
                if not stage.head and _HEAD.fullmatch(name):
                    rule = f"no tensor of the head, which stage {stage.stage_id} does not have"
                    yield Violation(f"$.stages[{index}].tiers.{tier}[{place}]", name, rule)


def _repeated_tensors(tiers: Tiers, path: str) -> Iterator[Violation]:
    places = [
        (name, f"{path}.{tier}[{index}]")
        for tier in TIERS
        for index, name in enumerate(getattr(tiers, tier))
    ]
    yield from repeated((name for name, _ in places), lambda index: places[index][1])


def _at_home(manifest: Manifest, first: Group, name: str) -> bool:
    """Whether a head on the first group is there to keep what it computes at home."""
    having = [manifest.stages[index] for index in first if manifest.stages[index].head]
    home = manifest.policies.home
    return name == "head" and bool(having) and all(stage.host_id == home for stage in having)


def _layers(stage: Stage) -> tuple[int, int]:
    return stage.first_layer, stage.end_layer


def _key(value: object) -> object:
    """Show whether an optional part is there."""
    return None if value is None else {"": value}
