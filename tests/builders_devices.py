"""Small host profiles and topologies, plausible unless a test changes them."""

from __future__ import annotations

from devices.profile import (
    AttentionRate,
    DeviceProfile,
    Figure,
    FlashPoint,
    FlashProfile,
    HostProfile,
    KernelRate,
    MemoryPool,
    ProcessorReport,
    Rate,
    Runtime,
)
from devices.topology import LinkProfile, Topology
from quant.formats import FORMATS

FINGERPRINT = "0123456789abcdef"


def rate(value: float) -> Rate:
    return Rate(value=value, origin="measured", spread=0.02)


def figure(value: float) -> Figure:
    return Figure(value=value, origin="measured")


def kernel(ggml_type: str = "q4_0", matvec: float = 8e9, matmat: float = 160e9) -> KernelRate:
    return KernelRate(
        ggml_type=ggml_type,
        n_threads=2,
        matvec_bytes_per_s=rate(matvec),
        matmat_flops=rate(matmat),
    )


def attention(head_length: int = 64) -> AttentionRate:
    return AttentionRate(
        cache_type="f16",
        head_length=head_length,
        n_threads=2,
        decode_flops=rate(10e9),
        prefill_flops=rate(80e9),
    )


def report(*kernels: KernelRate) -> ProcessorReport:
    return ProcessorReport(
        kernels=kernels or (kernel(),),
        node_s=figure(4e-7),
        graph_s=figure(4e-6),
        process_bytes=figure(56e6),
    )


def device(*kernels: KernelRate) -> DeviceProfile:
    return DeviceProfile(
        device_id="cpu",
        kind="cpu",
        name="a processor",
        pool_id="ram",
        bytes_per_s=rate(25e9),
        kernels=kernels or (kernel(),),
        node_s=figure(4e-7),
        hand_over_s=figure(4e-6),
        can_stream=True,
    )


def flash() -> FlashProfile:
    points = ((4096, 1, 60e6), (4096, 8, 250e6), (4 << 20, 1, 1.5e9), (4 << 20, 8, 2e9))
    return FlashProfile(
        kind="nvme",
        points=tuple(
            FlashPoint(request_bytes=size, n_in_flight=depth, bytes_per_s=rate(value))
            for size, depth, value in points
        ),
    )


def host(host_id: str = "home", *, fingerprint: str | None = FINGERPRINT) -> HostProfile:
    pool = MemoryPool(
        pool_id="ram", total_bytes=16 << 30, available_bytes=12 << 30, bytes_per_s=rate(25e9)
    )
    return HostProfile(
        host_id=host_id,
        name=host_id,
        system="linux-x86_64",
        fingerprint=fingerprint,
        pools=(pool,),
        devices=(device(),),
        flash=flash(),
        process_bytes=figure(56e6),
        runtimes=(Runtime(name="llama.cpp", version="0.3.36", backends=("CPU",)),),
        n_cores=2,
        n_threads=2,
    )


def link(source: str, target: str) -> LinkProfile:
    return LinkProfile(
        source=source,
        target=target,
        kind="ethernet_1g",
        round_trip_s=figure(3e-4),
        bytes_per_s=rate(110e6),
    )


def topology() -> Topology:
    return Topology(
        home="home",
        hosts=(host("home"), host("other")),
        links=(link("home", "other"), link("other", "home")),
    )


def of_any_type(limit_bytes: int, total_bytes: int) -> Topology:
    """One host with that much memory and rates for every type of weights."""
    kernels = [kernel(entry.name) for entry in FORMATS.values()]
    home = host().model_copy(update={"devices": (device(*kernels),)})
    pools = tuple(
        pool.model_copy(update={"available_bytes": limit_bytes, "total_bytes": total_bytes})
        for pool in home.pools
    )
    return Topology(home=home.host_id, hosts=(home.model_copy(update={"pools": pools}),))
