"""What is known of a host from two measurements: the newer figure, unless it is only assumed."""

from __future__ import annotations

import logging
from typing import TypeVar

from devices.figure_rules import violations
from devices.profile import (
    Absence,
    AttentionRate,
    DeviceProfile,
    Figure,
    FlashProfile,
    HostProfile,
    KernelRate,
)

logger = logging.getLogger(__name__)

SomeFigure = TypeVar("SomeFigure", bound=Figure)

_PREFIXES = ("undisturbed batches of ", "undisturbed ", "measured ")


def merged(old: HostProfile, new: HostProfile) -> HostProfile:
    """Return the new profile with the old one's figures where it has none, or assumed ones.

    Old figures that contradict new ones are dropped, and it is said which.
    """
    found = _with_old_figures(old, new)
    if violations(found) and not violations(new):
        logger.warning("earlier figures of memory and nodes contradict new ones: dropped")
        found = new
    before = {device.device_id: device for device in old.devices}
    for device in new.devices:
        if device.device_id in before:
            found = _with_old_rates(found, before[device.device_id], device)
    return found.model_copy(update={"absences": _absences(old, new)})


def kept_flash(
    old: FlashProfile | None, new: FlashProfile | None, host: HostProfile
) -> FlashProfile | None:
    """Return the newer curve of one storage, the older where the newer is assumed.

    Args:
        old: Curve of an earlier measurement; dropped where it contradicts the host.
        new: Of now.
        host: With the memory that it is read into.
    """
    if old is None or (new is not None and new.streaming.origin != "assumed"):
        return new
    if violations(host.model_copy(update={"flash": old})) and not violations(
        host.model_copy(update={"flash": None})
    ):
        logger.warning("the earlier rate of a storage contradicts new figures: dropped")
        return new
    return old if old.streaming.origin != "assumed" or new is None else new


def _with_old_figures(old: HostProfile, new: HostProfile) -> HostProfile:
    pools = {pool.pool_id: pool for pool in old.pools}
    devices = {device.device_id: device for device in old.devices}
    return new.model_copy(
        update={
            "process_bytes": _better(old.process_bytes, new.process_bytes),
            "pools": tuple(
                pool.model_copy(
                    update={
                        "bytes_per_s": _better(pools[pool.pool_id].bytes_per_s, pool.bytes_per_s)
                    }
                )
                if pool.pool_id in pools
                else pool
                for pool in new.pools
            ),
            "devices": tuple(
                _with_old_times(devices[device.device_id], device)
                if device.device_id in devices
                else device
                for device in new.devices
            ),
        }
    )


def _with_old_times(old: DeviceProfile, new: DeviceProfile) -> DeviceProfile:
    return new.model_copy(
        update={
            "bytes_per_s": _better(old.bytes_per_s, new.bytes_per_s),
            "node_s": _better(old.node_s, new.node_s),
            "hand_over_s": _better(old.hand_over_s, new.hand_over_s),
        }
    )


def _better(old: SomeFigure, new: SomeFigure) -> SomeFigure:
    return old if new.origin == "assumed" and old.origin != "assumed" else new


def _with_old_rates(host: HostProfile, old: DeviceProfile, new: DeviceProfile) -> HostProfile:
    """Return the host with rates of the old device that the new one has not, if they fit."""
    device = host.device(new.device_id)
    now = {_key(rate) for rate in new.kernels if rate.matvec_bytes_per_s.origin != "assumed"}
    kernels = {}
    for rate in old.kernels:
        alone = device.model_copy(update={"kernels": (rate,), "attention": ()})
        if _key(rate) not in now and _fits(host, alone, f"{rate.ggml_type} {rate.layout}"):
            kernels[_key(rate)] = rate
    for rate in new.kernels:
        if _key(rate) in now or _key(rate) not in kernels:
            kernels[_key(rate)] = rate
    device = device.model_copy(update={"kernels": tuple(kernels.values())})
    heads_now = {_heads(rate) for rate in new.attention}
    attention = []
    for heads in old.attention:
        alone = device.model_copy(update={"attention": (heads,)})
        if _heads(heads) not in heads_now and _fits(host, alone, f"heads of {heads.head_length}"):
            attention.append(heads)
    device = device.model_copy(update={"attention": (*attention, *new.attention)})
    return _with_device(host, device)


def _fits(host: HostProfile, device: DeviceProfile, what: str) -> bool:
    """Whether an old rate is one that new figures do not contradict; warns where they do."""
    found = violations(_with_device(host, device).model_copy(update={"flash": None}))
    if found:
        logger.warning(
            "the earlier rate of %s contradicts new figures: dropped: %s", what, found[0]
        )
    return not found


def _with_device(host: HostProfile, device: DeviceProfile) -> HostProfile:
    devices = (device if one.device_id == device.device_id else one for one in host.devices)
    return host.model_copy(update={"devices": tuple(devices)})


def _absences(old: HostProfile, new: HostProfile) -> tuple[Absence, ...]:
    """Return the new absences, and old ones about figures that nobody measured again."""
    settled = {"flash rates", "memory bandwidth", "kernel rates", "program memory"}
    settled |= {_subject(absence) for absence in new.absences}
    for device in new.devices:
        settled |= {
            f"{rate.ggml_type} {rate.layout}"
            for rate in device.kernels
            if rate.matvec_bytes_per_s.origin == "measured"
        }
        settled |= {f"attention over heads of {rate.head_length}" for rate in device.attention}
        if device.node_s.origin == "measured":
            settled.add("graph nodes")
    kept = (
        absence
        for absence in old.absences
        if absence.about == "figure" and _subject(absence) not in settled
    )
    return (*new.absences, *kept)


def _subject(absence: Absence) -> str:
    """Return what an absence is about, without how it is lacking."""
    what = absence.what
    for prefix in _PREFIXES:
        what = what.removeprefix(prefix)
    return what


def _key(rate: KernelRate) -> tuple[str, str, int | None]:
    return rate.ggml_type, rate.layout, rate.n_threads


def _heads(rate: AttentionRate) -> tuple[str, int, int | None]:
    return rate.cache_type, rate.head_length, rate.n_threads
