"""Seconds of ONNX nodes on a device: rates of float kernels where they are known, else assumed.

A profile has rates of the types that language models are stored in. What it says of float products
is used; what is missing is derived from the memory's bandwidth and the fastest product it knows,
and is called assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

from devices.profile import DeviceKind, DeviceProfile, Origin
from partition.units import Work

# Where a profile knows no product at all.
_ASSUMED_FLOPS: dict[DeviceKind, float] = {"cpu": 5e10, "gpu": 5e11, "npu": 1e12}
# A float product against the fastest one of small integers, which has four times the lanes and
# unpacks them first.
_FLOAT_SHARE = 0.5
_ORIGINS: tuple[Origin, ...] = ("measured", "declared", "assumed")
_FLOATS = ("f32", "f16", "bf16")


@dataclass(frozen=True, slots=True)
class FloatRates:
    """How fast a device runs graphs of floats.

    Attributes:
        flops: Operations a second of products.
        bytes_per_s: Weights read.
        node_s: Overhead of a node.
        origin: Of the worse known of operations and bytes.
        note: How what is assumed was derived; empty where nothing is.
    """

    flops: float
    bytes_per_s: float
    node_s: float
    origin: Origin
    note: str


def float_rates(device: DeviceProfile) -> FloatRates:
    """Return the rates of a device; assumed ones say from what."""
    known = {kernel.ggml_type: kernel for kernel in device.kernels}
    for name in _FLOATS:
        if name in known:
            rate = known[name].matmat_flops
            origin = max(rate.origin, device.bytes_per_s.origin, key=_ORIGINS.index)
            return FloatRates(rate.value, device.bytes_per_s.value, device.node_s.value, origin, "")
    if known:
        fastest = max(known.values(), key=lambda kernel: kernel.matmat_flops.value)
        flops = _FLOAT_SHARE * fastest.matmat_flops.value
        note = f"float products at half the rate of {fastest.ggml_type}, {flops / 1e9:.3g} GFLOP/s"
    else:
        flops = _ASSUMED_FLOPS[device.kind]
        note = f"float products at {flops / 1e9:.3g} GFLOP/s, for want of any rate of it"
    return FloatRates(flops, device.bytes_per_s.value, device.node_s.value, "assumed", note)


def node_seconds(work: Work, n_nodes: int, rates: FloatRates) -> float:
    """Return the seconds of one inference of a run of nodes.

    Products with weights wait for operations or for their bytes; products of activations and
    everything else count operations only.
    """
    types = {*work.flops, *work.read_bytes}
    products_s = sum(
        max(
            work.flops.get(name, 0.0) / rates.flops,
            work.read_bytes.get(name, 0.0) / rates.bytes_per_s,
        )
        for name in sorted(types)
    )
    other_s = (work.attention_flops + work.other_flops) / rates.flops
    return products_s + other_s + n_nodes * rates.node_s
