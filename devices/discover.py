"""The profile of this host: what it has, what it lacks and why; measured, cached or assumed."""

from __future__ import annotations

import hashlib
import logging
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from devices import host
from devices.accelerators import absent
from devices.assumed import (
    ASSUMED_HAND_OVER_S,
    assumed_flash,
    assumed_memory,
    assumed_processor,
    with_types,
)
from devices.flash_behind import Storage, storage_behind
from devices.measure_flash import measure_curve
from devices.measure_memory import LEAST_BYTES, MemoryProbe, measure_memory
from devices.profile import (
    Absence,
    DeviceProfile,
    Figure,
    FlashProfile,
    HostProfile,
    MemoryPool,
    ProcessorReport,
    Rate,
    Runtime,
)
from devices.scratch import scratch_file
from edgert.errors import MeasurementError
from edgert.units import format_bytes

logger = logging.getLogger(__name__)

_SCRATCH_BYTES = 256 << 20
_ARRAY_BYTES = 512 << 20
_MEMORY_SHARE = 4  # a probe takes at most one part in so many of the memory that is free
_MEMORY_GRAIN_BYTES = 1 << 26
_LEAST_FILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Probes:
    """What runs in other processes; wired by the program, each may raise MeasurementError.

    Attributes:
        processor: Measures kernels.
        runtimes: By name, lists backends.
    """

    processor: Callable[[], ProcessorReport]
    runtimes: Sequence[tuple[str, Callable[[], Runtime]]]


@dataclass(frozen=True, slots=True)
class Wish:
    """What to find out.

    Attributes:
        place: The model, or the folder where models would lie.
        scratch: Folder for a temporary file to read, where `place` is not a large file.
        n_threads: Threads that compute.
        build: The kernels' build, part of the fingerprint.
        host_id: Name of this host in the profile.
        types: Weight types that rates are wanted of, assumed ones where none is known.
    """

    place: Path
    scratch: Path
    n_threads: int
    build: str
    host_id: str | None = None
    types: tuple[str, ...] = ()


def fingerprint(build: str, n_threads: int | None = None) -> str:
    """Identify this hardware together with the kernels' build.

    Args:
        build: What identifies the library of kernels.
        n_threads: Threads that compute; None for all that this process may use.
    """
    total_bytes = int(psutil.virtual_memory().total)
    parts = (
        host.cpu_name(),
        " ".join(host.cpu_features()),
        *host.cpu_parts(),
        platform.machine(),
        str(n_threads or host.n_usable_cpus()),
        str(round(total_bytes / _MEMORY_GRAIN_BYTES)),
        build,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def discover(wish: Wish, probes: Probes, cached: HostProfile | None = None) -> HostProfile:
    """Describe this host without measuring: figures of an earlier profile, else assumed ones.

    Args:
        wish: What to find out.
        probes: For the runtimes' backends.
        cached: Profile of an earlier measurement; its flash is of the storage behind `place`.
    """
    storage = storage_behind(wish.place)
    skipped: tuple[Absence, ...] = ()
    if cached is not None:
        processor, memory = cached.devices[0], cached.pools[0].bytes_per_s
        flash = cached.flash or _assumed_flash(storage)
        process_bytes = cached.process_bytes
        skipped = tuple(absence for absence in cached.absences if absence.about == "figure")
    else:
        logger.warning("no measured figures for this host: they are assumed; see --measure")
        memory = assumed_memory()
        report = assumed_processor(wish.n_threads, memory)
        processor = _processor(memory, report)
        flash, process_bytes = assumed_flash(storage.kind), report.process_bytes
    found = _host(wish, probes, (_pool(memory), processor, flash, process_bytes), skipped)
    measured_at_s = cached.measured_at_s if cached is not None else None
    return with_types(found.model_copy(update={"measured_at_s": measured_at_s}), wish.types)


def measure(wish: Wish, probes: Probes) -> HostProfile:
    """Describe this host with figures measured now; what cannot be measured is assumed.

    Each figure that had to be assumed is among the absences, with the reason.
    """
    failed: list[Absence] = []
    storage = storage_behind(wish.place)
    try:
        flash = measured_flash(wish, storage)
    except MeasurementError as error:
        failed.append(_failure("flash rates", error))
        flash = assumed_flash(storage.kind)
    memory = _measured_memory(wish, failed)
    try:
        report = probes.processor()
    except MeasurementError as error:
        failed.append(_failure("kernel rates", error))
        report = assumed_processor(wish.n_threads, memory)
    parts = (_pool(memory), _processor(memory, report), flash, report.process_bytes)
    found = _host(wish, probes, parts, (*report.skipped, *failed))
    measured = any(rate.matvec_bytes_per_s.origin == "measured" for rate in report.kernels)
    # What a probe was asked for and did not find has no kernels here.
    return found if measured else with_types(found, wish.types)


def measured_flash(wish: Wish, storage: Storage) -> FlashProfile:
    """Measure the flash behind the place, through the model or a temporary file beside it."""
    if wish.place.is_file() and wish.place.stat().st_size >= _LEAST_FILE_BYTES:
        return FlashProfile(kind=storage.kind, points=measure_curve(wish.place))
    if storage_behind(wish.scratch).name != storage.name:
        raise MeasurementError(
            f"{wish.place}: no file large enough to measure {storage.name} with",
            hint=f"name a model of {format_bytes(_LEAST_FILE_BYTES)} or more that lies there",
        )
    with scratch_file(wish.scratch, _SCRATCH_BYTES) as path:
        return FlashProfile(kind=storage.kind, points=measure_curve(path))


def _measured_memory(wish: Wish, failed: list[Absence]) -> Rate:
    free_bytes, _ = host.available_bytes()
    size_bytes = max(LEAST_BYTES, min(_ARRAY_BYTES, free_bytes // _MEMORY_SHARE))
    try:
        return measure_memory(MemoryProbe(wish.n_threads, size_bytes)).together
    except MeasurementError as error:
        failed.append(_failure("memory bandwidth", error))
        return assumed_memory()


def _failure(what: str, error: MeasurementError) -> Absence:
    logger.warning("%s are assumed: %s", what, error)
    return Absence(what=f"measured {what}", reason=error.message, about="figure")


def _assumed_flash(storage: Storage) -> FlashProfile:
    logger.warning("%s was never measured: its rate is assumed; see --measure", storage.name)
    return assumed_flash(storage.kind)


def _pool(bytes_per_s: Rate) -> MemoryPool:
    """Describe the memory: a control group's limit is all there is."""
    limits = [group.limit_bytes for group in host.memory_groups()]
    total_bytes = min([int(psutil.virtual_memory().total), *limits])
    budget = host.default_memory_budget()
    return MemoryPool(
        pool_id="ram",
        total_bytes=total_bytes,
        available_bytes=min(total_bytes, budget.budget_bytes),
        bytes_per_s=bytes_per_s,
    )


def _processor(memory: Rate, report: ProcessorReport) -> DeviceProfile:
    return DeviceProfile(
        device_id="cpu",
        kind="cpu",
        name=host.cpu_name(),
        pool_id="ram",
        bytes_per_s=memory,
        kernels=report.kernels,
        attention=report.attention,
        node_s=report.node_s,
        hand_over_s=_hand_over(report),
        can_stream=True,
    )


def _hand_over(report: ProcessorReport) -> Figure:
    """Take the cost of starting a graph: activations stay where they are in shared memory."""
    if report.graph_s.origin == "measured":
        return report.graph_s
    return Figure(value=ASSUMED_HAND_OVER_S, origin="assumed")


def _host(
    wish: Wish,
    probes: Probes,
    parts: tuple[MemoryPool, DeviceProfile, FlashProfile, Figure],
    skipped: Sequence[Absence],
) -> HostProfile:
    pool, processor, flash, process_bytes = parts
    runtimes, missing = _runtimes(probes)
    name = platform.node() or "this host"
    return HostProfile(
        host_id=wish.host_id or _host_id(name),
        name=name,
        system=f"{platform.system().lower()}-{platform.machine().lower()}",
        fingerprint=fingerprint(wish.build, wish.n_threads),
        pools=(pool,),
        devices=(processor,),
        flash=flash,
        process_bytes=process_bytes,
        absences=(*skipped, *missing),
        runtimes=runtimes,
        n_cores=host.n_physical_cores(),
        n_threads=wish.n_threads,
        isa=tuple(host.cpu_features()),
    )


def _runtimes(probes: Probes) -> tuple[tuple[Runtime, ...], list[Absence]]:
    found, missing = [], []
    for name, probe in probes.runtimes:
        try:
            runtime = probe()
        except MeasurementError as error:
            missing.append(Absence(what=name, reason=error.message))
            continue
        found.append(runtime)
        missing += absent(runtime.name, runtime.backends)
    return tuple(found), missing


def _host_id(name: str) -> str:
    letters = re.sub(r"[^a-z0-9._-]+", "-", name.lower()).lstrip("._-")
    return letters[:64] or "host"
