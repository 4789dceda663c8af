"""The plain ways to run a model, which a plan has to beat or give way to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from devices.profile import DeviceProfile, HostProfile
from devices.topology import Topology
from partition.candidates import Candidate, candidates, overheads_of, settings
from partition.cost import Missing, unit_seconds
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.popularity import Popularity
from partition.stage_tiers import stage_weights
from partition.units import LanguageGoal, language_units


@dataclass(frozen=True, slots=True)
class PlainWay:
    """A baseline and its prediction.

    Attributes:
        name: For people.
        tpot_s: Seconds a token; None where it is not possible.
        reason: How it was predicted, or why it is not possible.
        candidate: What executes it here, where this runtime can.
    """

    name: str
    tpot_s: float | None
    reason: str
    candidate: Candidate | None = None


def plain_ways(
    workload: LanguageWorkload, topology: Topology, goal: Goal, popularity: Popularity
) -> tuple[PlainWay, ...]:
    """Predict llama.cpp alone on the home host, and the whole model on each single device."""
    home = topology.host(topology.home)
    ways = [
        _llama_cpp(workload, home, device, goal, popularity)
        for device in home.devices
        if device.kind == "cpu"
    ]
    ways += [
        _one_device(workload, topology, (host, device), goal, popularity)
        for host in topology.hosts
        for device in host.devices
    ]
    return tuple(ways)


def _llama_cpp(
    workload: LanguageWorkload,
    host: HostProfile,
    device: DeviceProfile,
    goal: Goal,
    popularity: Popularity,
) -> PlainWay:
    """Memory-mapped, without repacking, its best setting where the model does not fit.

    The page cache keeps the pages used last; a pass over the weights is cyclic, so as soon as a
    page is short every page is read again on every token.
    """
    name = f"llama.cpp alone on {host.host_id}/{device.device_id}"
    setting = next(settings(goal))
    language_goal = LanguageGoal(
        goal.n_prompt, goal.n_ctx, setting.n_ubatch, setting.cache_type, setting.cache_type
    )
    chain = language_units(workload, language_goal, popularity)
    seconds = [unit_seconds(unit, device, "file") for unit in chain.units]
    compute_s = sum(pair[0] for pair in seconds if not isinstance(pair, Missing))
    if any(isinstance(pair, Missing) for pair in seconds):
        return PlainWay(name, None, "no rate is known for a weight type of this model")
    overheads = overheads_of(workload, goal, setting)
    weights = stage_weights(workload, 0, len(workload.run_layers), head=True)
    other = overheads.buffer_bytes + overheads.program_bytes + int(host.process_bytes.value)
    other += sum(unit.kept_bytes for unit in chain.units)
    available = host.pool(device.pool_id).available_bytes
    if other > available:
        return PlainWay(
            name, None, f"needs {other:,} bytes without weights, {available:,} are there"
        )
    if other + weights.every_bytes <= available:
        return PlainWay(name, compute_s, "everything fits")
    if host.flash is None:
        return PlainWay(name, None, "does not fit, and no flash to read from is known")
    read_s = weights.whole_bytes / host.flash.streaming.value
    missing = other + weights.every_bytes - available
    return PlainWay(
        name, max(compute_s, read_s),
        f"{missing:,} bytes short: a cyclic pass defeats the page cache, so every token reads all",
    )  # fmt: skip


def _one_device(
    workload: LanguageWorkload,
    topology: Topology,
    where: tuple[HostProfile, DeviceProfile],
    goal: Goal,
    popularity: Popularity,
) -> PlainWay:
    """Everything in the memory of one device."""
    host, device = where
    name = f"whole model on {host.host_id}/{device.device_id}"
    alone = host.model_copy(
        update={"devices": (device.model_copy(update={"can_stream": False}),), "flash": None}
    )
    others = [h for h in topology.hosts if h.host_id == topology.home != host.host_id]
    bare = [h.model_copy(update={"devices": (_idle(h),)}) for h in others]
    hosts: Sequence[HostProfile] = (*bare, alone)
    narrowed = topology.model_copy(update={"hosts": tuple(hosts)})
    simple = replace(goal, ceilings={}, stays=())
    found, rejected = candidates(workload, narrowed, simple, popularity)
    if not found:
        named = [r.reason for r in rejected if r.option == f"{host.host_id}/{device.device_id}"]
        reasons = named or [r.reason for r in rejected]
        return PlainWay(name, None, reasons[-1] if reasons else "not possible")
    best = min(found, key=lambda candidate: candidate.tpot_s)
    return PlainWay(name, best.tpot_s, "everything fits", best)


def _idle(host: HostProfile) -> DeviceProfile:
    """Return the host's first device without rates, so that nothing is placed on it."""
    return host.devices[0].model_copy(update={"kernels": ()})
