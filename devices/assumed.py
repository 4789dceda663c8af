"""Figures for want of measured ones: modest, and marked as assumed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from devices import bounds
from devices.bounds import Bound
from devices.profile import (
    DeviceProfile,
    Figure,
    FlashKind,
    FlashPoint,
    FlashProfile,
    HostProfile,
    KernelRate,
    ProcessorReport,
    Rate,
    WeightLayout,
)
from devices.weight_types import BITS, CODEBOOKS, nearest

logger = logging.getLogger(__name__)

ASSUMED_HAND_OVER_S = 2e-5
_MEMORY_BYTES_PER_S = 10e9
_NODE_S = 1e-6
_PROCESS_BYTES = 120e6
_FLOPS_PER_THREAD = 20e9
_MATVEC_SHARE = 0.4
_CODEBOOK_SHARE = 0.5
_WITHIN = 1.02  # of a bound, so that rounding does not leave it
_SMALL_BYTES, _LARGE_BYTES = 4 << 10, 4 << 20
_TYPES = ("q4_0", "q8_0", "q4_K", "q6_K", "f16", "f32")
_LAYOUTS: tuple[WeightLayout, ...] = ("file", "repacked")
# Of slow models of each kind: small random reads one at a time, large ones in sequence.
_FLASH_BYTES_PER_S: dict[FlashKind, tuple[float, float]] = {
    "sd": (6e6, 40e6),
    "emmc": (15e6, 150e6),
    "sata": (25e6, 400e6),
    "ufs": (25e6, 1000e6),
    "nvme": (35e6, 1500e6),
    "virtual": (20e6, 500e6),
}


def assumed_memory() -> Rate:
    """Return a memory bandwidth that almost everything reaches."""
    return _rate(_MEMORY_BYTES_PER_S)


def assumed_flash(kind: FlashKind) -> FlashProfile:
    """Return the curve of a slow storage of this kind."""
    small, large = _FLASH_BYTES_PER_S[kind]
    points = (
        FlashPoint(request_bytes=_SMALL_BYTES, n_in_flight=1, bytes_per_s=_rate(small)),
        FlashPoint(request_bytes=_LARGE_BYTES, n_in_flight=4, bytes_per_s=_rate(large)),
    )
    return FlashProfile(kind=kind, points=points)


def assumed_processor(n_threads: int, memory: Figure) -> ProcessorReport:
    """Return rates for the usual types from the memory's bandwidth."""
    kernels = tuple(
        KernelRate(
            ggml_type=ggml_type,
            layout=layout,
            n_threads=n_threads,
            matvec_bytes_per_s=_rate(_MATVEC_SHARE * memory.value),
            matmat_flops=_rate(_FLOPS_PER_THREAD * n_threads),
        )
        for ggml_type in _TYPES
        for layout in _LAYOUTS
        if layout == "file" or ggml_type == "q4_0"
    )
    return ProcessorReport(
        kernels=kernels,
        node_s=Figure(value=_NODE_S, origin="assumed"),
        graph_s=Figure(value=ASSUMED_HAND_OVER_S, origin="assumed"),
        process_bytes=Figure(value=_PROCESS_BYTES, origin="assumed"),
    )


def with_types(host: HostProfile, types: Sequence[str]) -> HostProfile:
    """Return the host with assumed rates of weight types that its devices have none of.

    Each is derived from the most similar type that the device has a rate of. Devices that compute
    only what they list are left alone: NPUs, those with graphs built beforehand, those without
    any rate; so are types that a measurement found to have no kernels.

    Args:
        host: Measured, declared or assumed.
        types: Names of ggml types; those no weights have are left out.
    """
    refused = {absence.what for absence in host.absences if absence.about == "figure"}
    wanted = [name for name in types if f"{name} file" not in refused]
    devices = tuple(_with_types(device, wanted, host) for device in host.devices)
    return host.model_copy(update={"devices": devices})


def _with_types(device: DeviceProfile, types: Sequence[str], host: HostProfile) -> DeviceProfile:
    if device.kind == "npu" or device.static_tokens is not None or not device.kernels:
        return device
    # Rows as they are in the file where both are known: not every type can be interleaved.
    ordered = sorted(device.kernels, key=lambda kernel: kernel.layout == "file")
    known = {kernel.ggml_type: kernel for kernel in ordered}
    memory = host.pool(device.pool_id).bytes_per_s.value
    added = []
    for name in dict.fromkeys(types):
        like = None if name in known else nearest(name, known)
        if like is not None:
            added.append(_derived(name, known[like], device, memory))
    if added:
        names = ", ".join(kernel.ggml_type for kernel in added)
        logger.warning("%s %s: rates of %s are assumed", host.host_id, device.device_id, names)
    return device.model_copy(update={"kernels": (*device.kernels, *added)})


def _derived(name: str, like: KernelRate, device: DeviceProfile, memory: float) -> KernelRate:
    """Return the rate of a type from a similar one: a weight takes as long, however few its bits.

    With more bits it takes longer: bytes come no faster.
    """
    share = min(1.0, BITS[name] / BITS[like.ggml_type])
    slower = _CODEBOOK_SHARE if name in CODEBOOKS and like.ggml_type not in CODEBOOKS else 1.0
    usual = name in bounds.USUAL_TYPES
    of_memory = bounds.MATVEC_SHARE[device.kind] if usual else bounds.SLOW_MATVEC_SHARE
    matvec = _clamped(share * slower * like.matvec_bytes_per_s.value, of_memory, memory)
    of_matvec = bounds.MATMAT_SHARE[device.kind] if usual else bounds.SLOW_MATMAT_SHARE
    matmat = _clamped(slower * like.matmat_flops.value, of_matvec, matvec)
    source = f"derived from {like.ggml_type} {like.layout}"
    return like.model_copy(
        update={
            "ggml_type": name,
            "matvec_bytes_per_s": Rate(value=matvec, origin="assumed", source=source),
            "matmat_flops": Rate(value=matmat, origin="assumed", source=source),
        }
    )


def _clamped(value: float, share: Bound, other: float) -> float:
    return min(max(value, _WITHIN * share.least * other), share.most * other / _WITHIN)


def _rate(value: float) -> Rate:
    return Rate(value=value, origin="assumed")
