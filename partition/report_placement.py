"""Where the report shows each weight: bars of memory against its limit, strips of layers."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from edgert.timeline import Timeline
from edgert.units import format_bytes
from partition.manifest import Host, Manifest, Pool, Stage

TIERS = (
    ("pinned", "pinned", "in memory"), ("streamed", "streamed", "read on every pass"),
    ("looked_up", "looked", "rows read when needed"), ("cached", "cached", "behind the cache"),
)  # fmt: skip
_HELD = (("window", "window"), ("cache", "expert cache"), ("kv", "KV cache"),
         ("buffers", "compute buffers"), ("other", "program"))  # fmt: skip
_LAYER = re.compile(r"blk\.([0-9]{1,5})\.")
_MOST_CELLS = 128
_SHORT_STRIP = 40


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar or cell, `percent` of it."""

    kind: str
    label: str
    percent: float


@dataclass(frozen=True, slots=True)
class Bar:
    """Bytes side by side.

    Attributes:
        title: What the whole of it is.
        segments: Its parts; what is left of it is free.
        note: What there is to say, such as the limit.
        over: Whether the parts exceed the limit.
    """

    title: str
    segments: tuple[Segment, ...]
    note: str
    over: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer, or a few where there are many; or what is outside the layers."""

    label: str
    title: str
    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True)
class StageView:
    """A stage as the report shows it."""

    title: str
    device: str
    precision: str
    tiers: tuple[str, ...]
    cells: tuple[Cell, ...]
    labelled: bool


@dataclass(frozen=True, slots=True)
class HostView:
    """A host with its memories and stages."""

    title: str
    bars: tuple[Bar, ...]
    stages: tuple[StageView, ...]


@dataclass(frozen=True, slots=True)
class _Known:
    """Bytes of tensors where the caller knows them, and what a timeline saw at its places."""

    sizes_bytes: Mapping[str, int]
    pinned_bytes: Mapping[str, int]
    program_bytes: Mapping[str, int]

    def of(self, names: Sequence[str]) -> int | None:
        """Return the bytes of tensors; None where one is not known."""
        sizes = [self.sizes_bytes.get(name) for name in names]
        known = [size for size in sizes if size is not None]
        return sum(known) if len(known) == len(sizes) else None

    def pinned(self, stage: Stage) -> int | None:
        """Return the bytes of a stage's pinned weights; None where nothing tells."""
        found = self.of(stage.tiers.pinned)
        if found is not None:
            return found
        places = (f"{stage.host_id}/{stage.device_id}", stage.stage_id, stage.host_id)
        seen = [self.pinned_bytes[place] for place in places if place in self.pinned_bytes]
        if seen:
            return seen[0]
        elsewhere = stage.tiers.streamed or stage.tiers.cached or stage.tiers.looked_up
        return None if elsewhere else sum(stage.precision.values())

    def program(self, host_id: str, pool_id: str, stages: Sequence[Stage]) -> int:
        """Return the bytes of programs in a memory, at these stages or beside them."""
        places = {f"{host_id}/{name}" for name in (pool_id, *(s.device_id for s in stages))}
        places |= {stage.stage_id for stage in stages}
        return sum(self.program_bytes.get(place, 0) for place in places)


def host_views(
    manifest: Manifest, timeline: Timeline, sizes_bytes: Mapping[str, int]
) -> tuple[HostView, ...]:
    """Return every host with its memory and its stages.

    Args:
        manifest: What was decided.
        timeline: Its memory tells what programs take, and what is pinned where `sizes_bytes` does
            not.
        sizes_bytes: Bytes of tensors by name; may be empty.
    """
    known = _Known(sizes_bytes, _most(timeline, "pinned"), _most(timeline, "program"))
    return tuple(_host(manifest, host, known) for host in manifest.hosts)


def _most(timeline: Timeline, kind: str) -> dict[str, int]:
    """Return the most that was held of something, by place."""
    seen: dict[str, int] = {}
    for point in timeline.memory:
        seen[point.place] = max(seen.get(point.place, 0), point.held_bytes.get(kind, 0))
    return seen


def pool_limits(manifest: Manifest) -> dict[str, int]:
    """Return the limit of every place a timeline may name: stages, devices, memories, hosts."""
    limits: dict[str, int] = {}
    for host in manifest.hosts:
        pools = {pool.pool_id: pool.limit_bytes for pool in host.pools}
        if len(pools) == 1:
            limits[host.host_id] = next(iter(pools.values()))
        for device in host.devices:
            limits[f"{host.host_id}/{device.device_id}"] = pools.get(device.pool_id, 0)
        for pool_id, limit_bytes in pools.items():
            limits.setdefault(f"{host.host_id}/{pool_id}", limit_bytes)
    for stage in manifest.stages:
        limit = limits.get(f"{stage.host_id}/{stage.device_id}")
        if limit is not None:
            limits.setdefault(stage.stage_id, limit)
    return limits


def _host(manifest: Manifest, host: Host, known: _Known) -> HostView:
    stages = [stage for stage in manifest.stages if stage.host_id == host.host_id]
    pool_of = {device.device_id: device.pool_id for device in host.devices}
    bars = []
    for pool in host.pools:
        mine = [stage for stage in stages if pool_of.get(stage.device_id) == pool.pool_id]
        bars.append(_memory_bar(host.host_id, pool, mine, known))
    flash = _flash_bar(stages, known)
    title = host.host_id if host.name == host.host_id else f"{host.host_id}: {host.name}"
    return HostView(
        title + (" (home host)" if manifest.policies.home == host.host_id else ""),
        tuple([*bars, flash] if flash else bars),
        tuple(_stage(stage, host, known) for stage in stages),
    )


def _memory_bar(host_id: str, pool: Pool, stages: Sequence[Stage], known: _Known) -> Bar:
    pinned = [known.pinned(stage) for stage in stages]
    held = {
        "pinned": sum(size or 0 for size in pinned),
        "window": sum(stage.tiers.window_bytes for stage in stages),
        "cache": sum(s.tiers.experts.cache_bytes for s in stages if s.tiers.experts is not None),
        "kv": sum(stage.kv_bytes for stage in stages),
        "buffers": sum(stage.buffer_bytes for stage in stages),
        "other": known.program(host_id, pool.pool_id, stages),
    }
    used, limit_bytes = sum(held.values()), pool.limit_bytes
    scale = max(limit_bytes, used, 1)
    labels = {"pinned": "pinned weights", **dict(_HELD)}
    segments = tuple(
        Segment(kind, f"{labels[kind]} {format_bytes(size)}", round(100 * size / scale, 3))
        for kind, size in held.items()
        if size
    )
    note = f"{format_bytes(used)} of {format_bytes(limit_bytes)}"
    if None in pinned:
        note += ", and pinned weights whose bytes are not known here"
    return Bar(f"{pool.pool_id}: memory", segments, note, over=used > limit_bytes)


def _flash_bar(stages: Sequence[Stage], known: _Known) -> Bar | None:
    """Return what stays on flash; None where nothing does, or its bytes are not known."""
    sizes: dict[str, int] = {}
    for name, kind, _ in TIERS[1:]:
        found = [known.of(getattr(stage.tiers, name)) for stage in stages]
        if None in found:
            return None
        sizes[kind] = sum(size or 0 for size in found)
    total = sum(sizes.values())
    if not total:
        return None
    labels = {kind: name.replace("_", " ") for name, kind, _ in TIERS}
    return Bar(
        "left on flash",
        tuple(
            Segment(kind, f"{labels[kind]} {format_bytes(size)}", round(100 * size / total, 3))
            for kind, size in sizes.items()
            if size
        ),
        format_bytes(total),
    )


def _stage(stage: Stage, host: Host, known: _Known) -> StageView:
    device = next((d for d in host.devices if d.device_id == stage.device_id), None)
    ends = [name for name, here in (("embedding", stage.embedding), ("head", stage.head)) if here]
    n_layers = stage.end_layer - stage.first_layer
    what = f"layers {stage.first_layer} to {stage.end_layer - 1}" if n_layers > 0 else "no layers"
    share = stage.share
    if share is not None:
        what += f", KV groups {share.first_group} to {share.end_group - 1} of {share.n_groups}"
    tiers = []
    for name, _, meaning in TIERS:
        names = getattr(stage.tiers, name)
        size = known.of(names)
        if names:
            weight = "" if size is None else f", {format_bytes(size)}"
            tiers.append(f"{len(names)} {name.replace('_', ' ')} ({meaning}){weight}")
    cells = _cells(stage, known)
    return StageView(
        title=f"{stage.stage_id}: " + ", ".join([what, *ends]),
        device=stage.device_id if device is None else f"{device.device_id}, {device.name}",
        precision=", ".join(f"{k} {format_bytes(v)}" for k, v in sorted(stage.precision.items())),
        tiers=(*tiers, f"layout {stage.tiers.layout}"),
        cells=cells,
        labelled=len(cells) <= _SHORT_STRIP,
    )


def _cells(stage: Stage, known: _Known) -> tuple[Cell, ...]:
    """Return a cell a layer, at most so many, and one for what is outside the layers."""
    n_layers = max(0, stage.end_layer - stage.first_layer)
    step = max(1, -(-n_layers // _MOST_CELLS))
    weights: dict[int | None, Counter[str]] = {}
    for name, kind, _ in TIERS:
        for tensor in getattr(stage.tiers, name):
            match = _LAYER.match(tensor)
            inside = match is not None and stage.first_layer <= int(match[1]) < stage.end_layer
            key = (int(match[1]) - stage.first_layer) // step if match and inside else None
            weights.setdefault(key, Counter())[kind] += known.sizes_bytes.get(tensor, 1)
    cells = []
    for index in range(-(-n_layers // step)):
        first = stage.first_layer + index * step
        last = min(first + step, stage.end_layer) - 1
        label = str(first) if first == last else f"{first}-{last}"
        cells.append(_cell(label, f"layer {label}", weights.get(index, Counter())))
    if None in weights:
        cells.append(_cell("+", "outside the layers", weights[None]))
    return tuple(cells)


def _cell(label: str, title: str, weights: Counter[str]) -> Cell:
    total = sum(weights.values()) or 1
    parts = [(kind, 100 * weights[kind] / total) for _, kind, _ in TIERS if weights[kind]]
    names = {kind: name.replace("_", " ") for name, kind, _ in TIERS}
    told = ", ".join(f"{percent:.0f}% {names[kind]}" for kind, percent in parts)
    return Cell(
        label, f"{title}: {told or 'no weights of its own'}",
        tuple(Segment(kind, names[kind], round(percent, 2)) for kind, percent in parts),
    )  # fmt: skip
