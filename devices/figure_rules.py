"""Rules for the figures of profiles and topologies: bounds, and what they say of one another."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from devices import bounds
from devices.bounds import Bound
from devices.profile import (
    DeviceProfile,
    Figure,
    FlashKind,
    FlashProfile,
    HostProfile,
    MemoryPool,
)
from devices.topology import LinkProfile, Topology


@dataclass(frozen=True, slots=True)
class Violation:
    """One figure that cannot be: where it is, what it is and the rule."""

    path: str
    value: object
    rule: str

    def __str__(self) -> str:
        value = f"{self.value:.4g}" if isinstance(self.value, float) else f"{self.value}"
        return f"{self.path}: {value}, {self.rule}"


def violations(thing: Topology | HostProfile) -> tuple[Violation, ...]:
    """Return every rule that is broken, with where."""
    if isinstance(thing, HostProfile):
        return tuple(_host(thing, "$"))
    return tuple(_topology(thing))


def _topology(topology: Topology) -> Iterator[Violation]:
    known = [host.host_id for host in topology.hosts]
    yield from _unique(known, "$.hosts[{}].host_id")
    if topology.home not in known:
        yield Violation("$.home", topology.home, f"wanted one of {', '.join(known)}")
    for index, host in enumerate(topology.hosts):
        yield from _host(host, f"$.hosts[{index}]")
    pairs = [f"{link.source} -> {link.target}" for link in topology.links]
    yield from _unique(pairs, "$.links[{}]")
    for index, link in enumerate(topology.links):
        yield from _link(link, f"$.links[{index}]", known)


def _link(link: LinkProfile, path: str, known: Sequence[str]) -> Iterator[Violation]:
    for name, end in (("source", link.source), ("target", link.target)):
        if end not in known:
            yield Violation(f"{path}.{name}", end, f"wanted one of {', '.join(known)}")
    if link.source == link.target:
        yield Violation(f"{path}.target", link.target, "wanted another host than the source")
    rate, trip = bounds.LINK[link.kind], bounds.ROUND_TRIP[link.kind]
    yield from _within(f"{path}.bytes_per_s.value", link.bytes_per_s.value, rate)
    yield from _within(f"{path}.round_trip_s.value", link.round_trip_s.value, trip)


def _host(host: HostProfile, path: str) -> Iterator[Violation]:
    yield from _unique([pool.pool_id for pool in host.pools], f"{path}.pools[{{}}].pool_id")
    yield from _unique([one.device_id for one in host.devices], f"{path}.devices[{{}}].device_id")
    process = host.process_bytes.value
    yield from _within(f"{path}.process_bytes.value", process, bounds.PROCESS_SIZE)
    pools = {pool.pool_id: pool for pool in host.pools}
    for index, pool in enumerate(host.pools):
        yield from _pool(pool, f"{path}.pools[{index}]")
    for index, device in enumerate(host.devices):
        place = f"{path}.devices[{index}]"
        owner = pools.get(device.pool_id)
        if owner is None:
            wanted = f"wanted one of {', '.join(pools)}"
            yield Violation(f"{place}.pool_id", device.pool_id, wanted)
            continue
        yield from _device(device, owner, place)
    if host.flash is not None:
        yield from _flash(host.flash, host.pools, f"{path}.flash")


def _pool(pool: MemoryPool, path: str) -> Iterator[Violation]:
    yield from _within(f"{path}.total_bytes", pool.total_bytes, bounds.MEMORY_SIZE)
    if pool.available_bytes > pool.total_bytes:
        rule = f"wanted {pool.total_bytes} at most, the total"
        yield Violation(f"{path}.available_bytes", pool.available_bytes, rule)
    yield from _within(f"{path}.bytes_per_s.value", pool.bytes_per_s.value, bounds.MEMORY_RATE)


def _device(device: DeviceProfile, pool: MemoryPool, path: str) -> Iterator[Violation]:
    memory = pool.bytes_per_s.value
    alone = device.bytes_per_s.value
    yield from _relation(f"{path}.bytes_per_s.value", alone, memory, bounds.DEVICE_SHARE)
    yield from _within(f"{path}.node_s.value", device.node_s.value, bounds.NODE_TIME)
    hand_over = device.hand_over_s.value
    yield from _within(f"{path}.hand_over_s.value", hand_over, bounds.HAND_OVER_TIME)
    if device.power_w is not None:
        yield from _within(f"{path}.power_w.value", device.power_w.value, bounds.POWER)
    keys = [f"{k.ggml_type} {k.layout} {k.n_threads or ''}".strip() for k in device.kernels]
    yield from _unique(keys, f"{path}.kernels[{{}}]")
    for index, kernel in enumerate(device.kernels):
        place = f"{path}.kernels[{index}]"
        yield from _known_type(f"{place}.ggml_type", kernel.ggml_type)
        usual = kernel.ggml_type in bounds.USUAL_TYPES
        share = bounds.MATVEC_SHARE[device.kind] if usual else bounds.SLOW_MATVEC_SHARE
        matvec, matmat = kernel.matvec_bytes_per_s.value, kernel.matmat_flops.value
        yield from _relation(f"{place}.matvec_bytes_per_s.value", matvec, memory, share)
        depth = bounds.MATMAT_SHARE[device.kind] if usual else bounds.SLOW_MATMAT_SHARE
        yield from _relation(f"{place}.matmat_flops.value", matmat, matvec, depth)
    yield from _attention(device, memory, path)


def _attention(device: DeviceProfile, memory: float, path: str) -> Iterator[Violation]:
    best = max((kernel.matmat_flops.value for kernel in device.kernels), default=None)
    keys = [f"{a.cache_type} {a.head_length} {a.n_threads or ''}".strip() for a in device.attention]
    yield from _unique(keys, f"{path}.attention[{{}}]")
    for index, attention in enumerate(device.attention):
        place = f"{path}.attention[{index}]"
        yield from _known_type(f"{place}.cache_type", attention.cache_type)
        decode, prefill = attention.decode_flops.value, attention.prefill_flops.value
        share = bounds.ATTENTION_DECODE_SHARE
        yield from _relation(f"{place}.decode_flops.value", decode, memory, share)
        if best is not None:
            share = bounds.ATTENTION_PREFILL_SHARE
            yield from _relation(f"{place}.prefill_flops.value", prefill, best, share)


def _flash(flash: FlashProfile, pools: Iterable[MemoryPool], path: str) -> Iterator[Violation]:
    memory = max(pool.bytes_per_s.value for pool in pools)
    keys = [f"{point.request_bytes} x {point.n_in_flight}" for point in flash.points]
    yield from _unique(keys, f"{path}.points[{{}}]")
    for index, point in enumerate(flash.points):
        place, value = f"{path}.points[{index}].bytes_per_s.value", point.bytes_per_s.value
        rate, latency = _flash_bounds(flash.kind, point.bytes_per_s)
        if point.request_bytes >= bounds.LARGE_REQUEST_BYTES:
            yield from _within(place, value, rate)
        elif point.request_bytes <= bounds.SMALL_REQUEST_BYTES and point.n_in_flight == 1:
            seconds = f"{place} ({point.request_bytes} bytes at a time, seconds for each)"
            yield from _within(seconds, point.request_bytes / value, latency)
        elif value > rate.most:
            yield from _within(place, value, rate)
        yield from _relation(place, value, memory, bounds.FLASH_SHARE)
    yield from _curve(flash, path)


def _flash_bounds(kind: FlashKind, figure: Figure) -> tuple[Bound, Bound]:
    """Return bounds of large requests and of seconds for a small one, by who says so."""
    if figure.origin == "measured":
        return bounds.MEASURED_FLASH[kind], bounds.MEASURED_FLASH_LATENCY[kind]
    return bounds.FLASH[kind], bounds.FLASH_LATENCY[kind]


def _curve(flash: FlashProfile, path: str) -> Iterator[Violation]:
    """Compare points of the same depth: larger requests are not several times slower."""
    best: dict[int, float] = {}
    order = sorted(enumerate(flash.points), key=lambda item: item[1].request_bytes)
    for index, point in order:
        value = point.bytes_per_s.value
        before = best.get(point.n_in_flight)
        if before is not None:
            place = f"{path}.points[{index}].bytes_per_s.value"
            yield from _relation(place, value, before, bounds.LARGER_REQUEST_SHARE)
        best[point.n_in_flight] = max(before or 0.0, value)


def _known_type(path: str, name: str) -> Iterator[Violation]:
    if name not in bounds.GGML_TYPES:
        yield Violation(path, name, "wanted a type of ggml, such as q4_0 or f16")


def _within(path: str, value: float, bound: Bound) -> Iterator[Violation]:
    problem = bound.problem(value)
    if problem is not None:
        yield Violation(path, value, problem)


def _relation(path: str, value: float, other: float, share: Bound) -> Iterator[Violation]:
    """Bound a value by another one of the same profile."""
    bound = Bound(share.least * other, share.most * other, share.what)
    yield from _within(path, value, bound)


def _unique(names: Sequence[str], path: str) -> Iterator[Violation]:
    seen: set[str] = set()
    for index, name in enumerate(names):
        if name in seen:
            yield Violation(path.format(index), name, "wanted every one once")
        seen.add(name)
