"""What is known about a host and its devices: figures that keep their origin, and their bounds.

These models are also the file format of profiles, catalog entries and topologies.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Origin = Literal["measured", "declared", "assumed"]
DeviceKind = Literal["cpu", "gpu", "npu"]
WeightLayout = Literal["file", "repacked"]
FlashKind = Literal["sd", "emmc", "sata", "ufs", "nvme", "virtual"]

Id = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")]
Bytes = Annotated[int, Field(ge=0, le=1 << 60)]
# A manifest quotes both in texts of 2000 letters.
Name = Annotated[str, Field(max_length=200)]
Reason = Annotated[str, Field(max_length=2000)]


class FileModel(BaseModel):
    """Base of everything that is written to a file: frozen, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Figure(FileModel):
    """A positive number, how it is known, and how far repeated measurements were apart.

    Attributes:
        value: In the unit that the field's name ends with.
        origin: measured here, declared by somebody (`source`), or assumed for want of better.
        spread: Half the range of the repetitions over their median; None when there was one.
        source: Where a declared figure is published.
        disturbed: Something else had the processors meanwhile: it is worse than it would be.
    """

    value: Annotated[float, Field(gt=0)]
    origin: Origin
    spread: Annotated[float, Field(ge=0)] | None = None
    source: Reason | None = None
    disturbed: bool = False


class Rate(Figure):
    """A throughput."""


class KernelRate(FileModel):
    """How fast a device multiplies by weights of one ggml type.

    Attributes:
        ggml_type: Name as in `quant.formats`, such as `q4_0`.
        layout: Rows as in the file, or interleaved for the processor.
        n_threads: Threads that took part; None for devices without.
        matvec_bytes_per_s: Weight bytes a second, one token at a time, weights larger than caches.
        matmat_flops: Two operations per weight and token a second, at `matmat_tokens` tokens.
        matmat_tokens: The batch it was measured at.
    """

    ggml_type: Name
    layout: WeightLayout = "file"
    n_threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    matvec_bytes_per_s: Rate
    matmat_flops: Rate
    matmat_tokens: Annotated[int, Field(ge=1)] = 512


class AttentionRate(FileModel):
    """How fast a device attends over its cache: four operations per head element and cached token.

    Attributes:
        cache_type: Type of cached keys and values.
        head_length: Elements of a head; shorter ones are slower.
        n_threads: Threads that took part; None for devices without.
        decode_flops: One token at a time.
        prefill_flops: A batch of `prefill_tokens` that sees the whole cache.
        prefill_tokens: The batch it was measured at.
    """

    cache_type: Name
    head_length: Annotated[int, Field(ge=1, le=4096)]
    n_threads: Annotated[int, Field(ge=1, le=4096)] | None = None
    decode_flops: Rate
    prefill_flops: Rate
    prefill_tokens: Annotated[int, Field(ge=1)] = 512


class Absence(FileModel):
    """Something that is not here, or cannot be used, and why.

    Attributes:
        what: What it is.
        reason: Why.
        about: What it says something of: hardware and software, which are looked at every time, or
            a figure that was measured badly or not at all, which holds as long as the figure does.
    """

    what: Name
    reason: Reason
    about: Literal["system", "figure"] = "system"


class Runtime(FileModel):
    """Software that computes, and what it can compute with here.

    Attributes:
        name: Such as `llama.cpp`.
        version: Of its package.
        backends: Its devices or execution providers, named as it names them.
        absences: What it could use on other machines, and why not here.
    """

    name: Name
    version: Name
    backends: tuple[Name, ...]
    absences: tuple[Absence, ...] = ()


class ProcessorReport(FileModel):
    """What a probe of the processor found; written by a child process, read by its parent.

    Attributes:
        kernels: Rates by type and layout.
        node_s: One node of a graph that computes nothing, threads synchronised.
        graph_s: Starting and ending a graph of one such node.
        process_bytes: Resident memory of the runtime with nothing loaded, library pages included.
        attention: Rates over the cache.
        skipped: Types and layouts that have no kernels here, and why.
    """

    kernels: tuple[KernelRate, ...]
    node_s: Figure
    graph_s: Figure
    process_bytes: Figure
    attention: tuple[AttentionRate, ...] = ()
    skipped: tuple[Absence, ...] = ()


class MemoryPool(FileModel):
    """Memory that some devices of a host share; unified memory is one pool, counted once.

    Attributes:
        pool_id: Name within the host.
        total_bytes: All of it.
        available_bytes: What models may take, everything else on the host accounted for.
        bytes_per_s: What all its processors together can draw.
    """

    pool_id: Id
    total_bytes: Bytes
    available_bytes: Bytes
    bytes_per_s: Rate


class DeviceProfile(FileModel):
    """One compute unit.

    Attributes:
        device_id: Name within the host, such as `cpu`, `gpu0`, `npu0`.
        kind: What it is.
        name: For people.
        pool_id: The memory it computes from.
        bytes_per_s: What it alone draws from that memory.
        kernels: Rates by ggml type; a type that is missing cannot be computed there, or on
            processors and GPUs was not measured (`assumed.with_types`).
        attention: Rates over the cache; empty where they were not measured.
        node_s: Overhead of one graph node: dispatch, synchronisation.
        hand_over_s: Passing activations to or from another device of the host.
        static_tokens: Batch sizes that exist as pre-built graphs; None when shapes are free.
        can_stream: Whether weights can be fetched from flash while it computes.
        power_w: Drawn while it computes; None when unknown.
    """

    device_id: Id
    kind: DeviceKind
    name: Name
    pool_id: Id
    bytes_per_s: Rate
    kernels: tuple[KernelRate, ...] = ()
    attention: tuple[AttentionRate, ...] = ()
    node_s: Figure
    hand_over_s: Figure
    static_tokens: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    can_stream: bool = False
    power_w: Figure | None = None


class FlashPoint(FileModel):
    """Read bandwidth at one request size and queue depth, past the page cache."""

    request_bytes: Annotated[int, Field(ge=512, le=1 << 30)]
    n_in_flight: Annotated[int, Field(ge=1, le=1024)]
    bytes_per_s: Rate


class FlashProfile(FileModel):
    """The storage that holds models.

    Attributes:
        kind: Bounds what is plausible.
        points: The curve; its largest and deepest point is what streaming sustains.
    """

    kind: FlashKind
    points: Annotated[tuple[FlashPoint, ...], Field(min_length=1)]

    @property
    def streaming(self) -> Rate:
        """What large requests, several in flight, sustain."""
        deepest = max(self.points, key=lambda point: (point.request_bytes, point.n_in_flight))
        return deepest.bytes_per_s


class HostProfile(FileModel):
    """One machine.

    Attributes:
        host_id: Name in topologies and manifests.
        name: For people.
        system: Operating system and machine type, such as `linux-x86_64`.
        fingerprint: Of the hardware and the kernels' build; None for hardware that is not here.
        pools: Its memories.
        devices: Its compute units.
        flash: Where models lie; None when it holds none.
        process_bytes: Memory of the runtime itself with nothing loaded.
        absences: What was looked for and is not usable.
        runtimes: Software that computes, with the backends it has here.
        measured_at_s: When the newest figure was measured, seconds since 1970.
        n_cores: Physical cores, for people and checks.
        n_threads: Threads that compute.
        isa: Instruction sets as the kernel names them.
    """

    host_id: Id
    name: Name
    system: Name
    fingerprint: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")] | None = None
    pools: Annotated[tuple[MemoryPool, ...], Field(min_length=1, max_length=64)]
    devices: Annotated[tuple[DeviceProfile, ...], Field(min_length=1, max_length=64)]
    flash: FlashProfile | None = None
    process_bytes: Figure
    absences: tuple[Absence, ...] = ()
    runtimes: tuple[Runtime, ...] = ()
    measured_at_s: Annotated[float, Field(ge=0)] | None = None
    n_cores: Annotated[int, Field(ge=1)] | None = None
    n_threads: Annotated[int, Field(ge=1)] | None = None
    isa: tuple[Name, ...] = ()

    def pool(self, pool_id: str) -> MemoryPool:
        """Return a memory by its name; KeyError if there is none."""
        return {pool.pool_id: pool for pool in self.pools}[pool_id]

    def device(self, device_id: str) -> DeviceProfile:
        """Return a device by its name; KeyError if there is none."""
        return {device.device_id: device for device in self.devices}[device_id]
