"""Entries of the catalog: what they declare, and the profile that follows from it.

An entry declares what is published (bandwidth, operations a second) and what share of it kernels
reach; rates by type follow from these.
"""

from __future__ import annotations

import json
from typing import Annotated

import yaml
from pydantic import Field

from devices.profile import (
    Bytes,
    DeviceKind,
    DeviceProfile,
    Figure,
    FileModel,
    FlashKind,
    FlashPoint,
    FlashProfile,
    HostProfile,
    Id,
    KernelRate,
    MemoryPool,
    Rate,
    WeightLayout,
)
from devices.profile_file import MOST_BYTES, parse
from devices.topology import LinkKind
from edgert.errors import FormatError

_PROCESS_BYTES = 120e6
_PROCESS_SOURCE = "edgert on x86-64 Linux, rounded up"

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(gt=0, le=1.0)]
# Integer kernels may do more operations than the published floating-point peak.
ComputeShare = Annotated[float, Field(gt=0, le=4.0)]
Source = Annotated[str, Field(min_length=8)]


class Declared(FileModel):
    """A published figure."""

    value: Positive
    source: Source


class PoolEntry(FileModel):
    """A memory; what is available, the system taking the rest, is assumed: nobody publishes it."""

    pool_id: Id
    total_bytes: Bytes
    available_bytes: Bytes
    bytes_per_s: Declared


class DeviceEntry(FileModel):
    """One compute unit.

    Attributes:
        bytes_per_s: Published or measured bandwidth of this unit.
        flops: Dense multiply-accumulate throughput at the precision its kernels compute in.
        layout: Of the weights that the kernels take.
        matvec: Share of `bytes_per_s` that a matrix times a vector reaches, by ggml type.
        matmat: Share of `flops` that a matrix times a batch reaches, by the same types.
        shares_source: How these shares are known.
    """

    device_id: Id
    kind: DeviceKind
    name: str
    pool_id: Id
    bytes_per_s: Declared
    flops: Declared
    layout: WeightLayout = "file"
    matvec: dict[str, Share]
    matmat: dict[str, ComputeShare]
    shares_source: Source
    node_s: Positive
    hand_over_s: Positive
    static_tokens: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    can_stream: bool = False
    power_w: Declared | None = None


class FlashEntry(FileModel):
    """Storage: small random reads one at a time, and large ones in sequence."""

    kind: FlashKind
    small_bytes_per_s: Declared
    large_bytes_per_s: Declared


class HostEntry(FileModel):
    """One file of the catalog; `link` is how the host is usually reached."""

    name: str
    system: str
    n_cores: Annotated[int, Field(ge=1)]
    n_threads: Annotated[int, Field(ge=1)]
    isa: tuple[str, ...] = ()
    pools: Annotated[tuple[PoolEntry, ...], Field(min_length=1)]
    devices: Annotated[tuple[DeviceEntry, ...], Field(min_length=1)]
    flash: FlashEntry
    link: LinkKind


def parse_entry(text: str, place: str) -> HostEntry:
    """Read an entry; FormatError names `$.path`, value and rule."""
    entry = parse(HostEntry, as_json(text, place), place)
    for index, device in enumerate(entry.devices):
        if device.matvec.keys() != device.matmat.keys():
            raise FormatError(
                f"$.devices[{index}].matmat: {', '.join(device.matmat)}, "
                f"wanted the types of matvec: {', '.join(device.matvec)}",
                path=place,
            )
    return entry


def expand(host_id: str, entry: HostEntry) -> HostProfile:
    """Return the profile that an entry stands for."""
    return HostProfile(
        host_id=host_id,
        name=entry.name,
        system=entry.system,
        pools=tuple(
            MemoryPool(
                pool_id=pool.pool_id,
                total_bytes=pool.total_bytes,
                available_bytes=pool.available_bytes,
                bytes_per_s=rate_of(pool.bytes_per_s),
            )
            for pool in entry.pools
        ),
        devices=tuple(_device(device, entry.n_threads) for device in entry.devices),
        flash=FlashProfile(
            kind=entry.flash.kind,
            points=(
                _point(4 << 10, 1, entry.flash.small_bytes_per_s),
                _point(4 << 20, 8, entry.flash.large_bytes_per_s),
            ),
        ),
        process_bytes=Figure(value=_PROCESS_BYTES, origin="declared", source=_PROCESS_SOURCE),
        n_cores=entry.n_cores,
        n_threads=entry.n_threads,
        isa=entry.isa,
    )


def _device(entry: DeviceEntry, n_threads: int) -> DeviceProfile:
    kernels = tuple(
        KernelRate(
            ggml_type=ggml_type,
            layout=entry.layout,
            n_threads=n_threads if entry.kind == "cpu" else None,
            matvec_bytes_per_s=_part(entry.bytes_per_s, entry.matvec[ggml_type], entry),
            matmat_flops=_part(entry.flops, entry.matmat[ggml_type], entry),
        )
        for ggml_type in entry.matvec
    )
    guess = "order of magnitude for this kind of device; not published"
    return DeviceProfile(
        device_id=entry.device_id,
        kind=entry.kind,
        name=entry.name,
        pool_id=entry.pool_id,
        bytes_per_s=rate_of(entry.bytes_per_s),
        kernels=kernels,
        node_s=Figure(value=entry.node_s, origin="declared", source=guess),
        hand_over_s=Figure(value=entry.hand_over_s, origin="declared", source=guess),
        static_tokens=entry.static_tokens,
        can_stream=entry.can_stream,
        power_w=figure_of(entry.power_w) if entry.power_w is not None else None,
    )


def _part(whole: Declared, share: float, entry: DeviceEntry) -> Rate:
    source = f"{share:g} of {whole.value:.4g} ({whole.source}); share: {entry.shares_source}"
    return Rate(value=share * whole.value, origin="declared", source=source)


def _point(request_bytes: int, n_in_flight: int, rate: Declared) -> FlashPoint:
    return FlashPoint(
        request_bytes=request_bytes, n_in_flight=n_in_flight, bytes_per_s=rate_of(rate)
    )


def rate_of(declared: Declared) -> Rate:
    """Return the rate that is declared."""
    return Rate(value=declared.value, origin="declared", source=declared.source)


def figure_of(declared: Declared) -> Figure:
    """Return the figure that is declared."""
    return Figure(value=declared.value, origin="declared", source=declared.source)


def as_json(text: str, place: str) -> bytes:
    """Turn YAML into JSON, so that both are read by the same strict rules."""
    if len(text) > MOST_BYTES:
        raise FormatError(f"{len(text):,} characters, wanted {MOST_BYTES:,} at most", path=place)
    try:
        return json.dumps(yaml.safe_load(text)).encode()
    except yaml.YAMLError as error:
        raise FormatError(f"not YAML: {str(error).splitlines()[0]}", path=place) from error
    except (TypeError, ValueError, RecursionError) as error:
        raise FormatError("holds what JSON does not: dates, sets or loops", path=place) from error
