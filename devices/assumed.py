"""Figures for want of measured ones: modest, and marked as assumed."""

from __future__ import annotations

from devices.profile import (
    Figure,
    FlashKind,
    FlashPoint,
    FlashProfile,
    KernelRate,
    ProcessorReport,
    Rate,
    WeightLayout,
)

ASSUMED_HAND_OVER_S = 2e-5
_MEMORY_BYTES_PER_S = 10e9
_NODE_S = 1e-6
_PROCESS_BYTES = 120e6
_FLOPS_PER_THREAD = 20e9
_MATVEC_SHARE = 0.4
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


def _rate(value: float) -> Rate:
    return Rate(value=value, origin="assumed")
