"""Seconds of a unit on a device, of a hop over a link: rooflines over measured rates, no more.

Source: the per-operator roofline max(operations / rate, bytes / bandwidth) summed over operators,
with rates by weight type as measured through the kernels that will run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from devices.profile import DeviceProfile, KernelRate, WeightLayout
from devices.topology import LinkProfile
from partition.problem import Hop
from partition.units import Unit, Work

# Nodes of llama.cpp's graph for each product with weights: norms, rotations, cache writes, sums.
_NODES_PER_PRODUCT = 4
# Without a rate of their own they are costed by bandwidth: nothing has to be unpacked.
_PLAIN_TYPES = frozenset({"f32", "f16", "bf16"})


@dataclass(frozen=True, slots=True)
class Missing:
    """A weight type that a device has no rate for."""

    type_name: str


def unit_seconds(
    unit: Unit, device: DeviceProfile, layout: WeightLayout
) -> tuple[float, float] | Missing:
    """Return (decode of one token, prefill of the prompt) in seconds, or the type that is missing.

    Decode counts every token that the unit's `decode` work has, drafted ones included.
    """
    seconds = []
    for work in (unit.decode, unit.prefill):
        found = work_seconds(work, device, layout)
        if isinstance(found, Missing):
            return found
        nodes = unit.n_products * _NODES_PER_PRODUCT * max(1, work.n_sweeps)
        seconds.append(found + nodes * device.node_s.value)
    return seconds[0], seconds[1]


def work_seconds(work: Work, device: DeviceProfile, layout: WeightLayout) -> float | Missing:
    """Return the seconds of one phase without the overhead of nodes."""
    if not work.n_tokens:
        return 0.0
    kernels = kernels_of(device, layout)
    computed = [_computed_tokens(n_tokens, device) for n_tokens in work.sweeps]
    padding = sum(computed) / work.n_tokens
    seconds = 0.0
    for type_name, read_bytes in work.read_bytes.items():
        kernel = kernels.get(type_name)
        flops = padding * work.flops.get(type_name, 0.0)
        if kernel is not None:
            seconds += _product_seconds(kernel, flops, read_bytes, max(computed))
        elif type_name in _PLAIN_TYPES:
            seconds += read_bytes / device.bytes_per_s.value
        else:
            return Missing(type_name)
    return seconds + _attention_seconds(work, device, padding, max(computed))


def kernels_of(device: DeviceProfile, layout: WeightLayout) -> Mapping[str, KernelRate]:
    """Return rates by weight type: those of the layout, else those of the other one.

    Types without interleaved kernels run as they are in the file, in every layout; where only one
    rate is declared it stands for both.
    """
    ordered = sorted(device.kernels, key=lambda kernel: kernel.layout == layout)
    return {kernel.ggml_type: kernel for kernel in ordered}


def link_hop(link: LinkProfile, decode_bytes: float, prefill_bytes: float) -> Hop:
    """Return the cost of handing activations over a link: half a round trip and the bytes."""
    latency_s = link.round_trip_s.value / 2
    rate = link.bytes_per_s.value
    return Hop(latency_s + decode_bytes / rate, latency_s + prefill_bytes / rate, decode_bytes)


def local_hop(source: DeviceProfile, decode_bytes: float, prefill_bytes: float) -> Hop:
    """Return the cost of handing activations to another device of the same host."""
    rate = source.bytes_per_s.value
    fixed_s = source.hand_over_s.value
    return Hop(fixed_s + decode_bytes / rate, fixed_s + prefill_bytes / rate)


def allreduce_s(round_trips_s: Mapping[str, float], n_bytes: float, rate: float) -> float:
    """Return the seconds of one star allreduce: everyone sends to the hub, the hub answers all.

    Source: TPI-LLM (arXiv 2410.00531) section on allreduce: two hops and two transfers, the hub's
    link carrying the data of every other host.

    Args:
        round_trips_s: From the hub to each other host.
        n_bytes: Of one host's partial sums.
        rate: Of the slowest link, bytes a second.
    """
    if not round_trips_s:
        return 0.0
    return max(round_trips_s.values()) + 2 * len(round_trips_s) * n_bytes / rate


def _product_seconds(kernel: KernelRate, flops: float, read_bytes: float, n_tokens: int) -> float:
    """Between one token and the measured batch the slower of the two limits holds.

    Args:
        kernel: Its rates.
        flops: Of all tokens that are computed, padding included.
        read_bytes: Of all sweeps.
        n_tokens: Computed at once.
    """
    by_bytes = read_bytes / kernel.matvec_bytes_per_s.value
    if n_tokens == 1:
        return by_bytes
    return max(by_bytes, flops / kernel.matmat_flops.value)


def _attention_seconds(work: Work, device: DeviceProfile, padding: float, n_tokens: int) -> float:
    """Attention is small dot products: its own rate decides, where it was measured."""
    by_bytes = work.attention_bytes / device.bytes_per_s.value
    if not device.attention or not work.attention_flops:
        return by_bytes
    rate = min(
        device.attention,
        key=lambda rate: (abs(rate.head_length - work.head_length), rate.cache_type),
    )
    flops = rate.decode_flops if n_tokens == 1 else rate.prefill_flops
    return max(by_bytes, padding * work.attention_flops / flops.value)


def _computed_tokens(n_tokens: int, device: DeviceProfile) -> int:
    """Return the tokens that pre-built graphs of fixed sizes compute for one micro-batch."""
    if not device.static_tokens:
        return n_tokens
    sizes, left, computed = sorted(device.static_tokens, reverse=True), n_tokens, 0
    for size in sizes:
        computed += left // size * size
        left %= size
    return computed + (sizes[-1] if left else 0)
