"""The plain ways to run a model, which a plan has to beat or give way to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from devices.profile import DeviceProfile, HostProfile
from devices.topology import Topology
from edgert.errors import CapacityError
from partition.build_problem import Built, build_problem
from partition.candidates import Candidate, materialise
from partition.cost import Missing, unit_seconds
from partition.evaluate import score
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.problem import Rejection
from partition.settings import Prepared
from partition.stage_tiers import stage_weights


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
    workload: LanguageWorkload, topology: Topology, goal: Goal, prepared: Sequence[Prepared]
) -> tuple[PlainWay, ...]:
    """Predict llama.cpp alone on the home host, and the whole model on each single device."""
    home = topology.host(topology.home)
    alone = [
        _llama_cpp(workload, home, device, min(prepared, key=_buffers))
        for device in home.devices
        if device.kind == "cpu"
    ]
    return (*alone, *_whole_on_each(workload, topology, goal, prepared))


def _buffers(prepared: Prepared) -> int:
    return prepared.overheads.buffer_bytes


def _llama_cpp(
    workload: LanguageWorkload, host: HostProfile, device: DeviceProfile, prepared: Prepared
) -> PlainWay:
    """Memory-mapped, without repacking, its best setting where the model does not fit.

    The page cache keeps the pages used last; a pass over the weights is cyclic, so as soon as a
    page is short every page is read again on every token.
    """
    name = f"llama.cpp alone on {host.host_id}/{device.device_id}"
    seconds = [unit_seconds(unit, device, "file") for unit in prepared.chain.units]
    if any(isinstance(pair, Missing) for pair in seconds):
        return PlainWay(name, None, "no rate is known for a weight type of this model")
    compute_s = sum(pair[0] for pair in seconds if not isinstance(pair, Missing))
    weights = stage_weights(workload, 0, len(workload.run_layers), head=True)
    other = prepared.overheads.buffer_bytes + prepared.overheads.program_bytes
    other += int(host.process_bytes.value) + sum(u.kept_bytes for u in prepared.chain.units)
    available = host.pool(device.pool_id).available_bytes
    if other > available:
        reason = f"needs {other:,} bytes without weights, {available:,} are there"
        return PlainWay(name, None, reason)
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


def _whole_on_each(
    workload: LanguageWorkload, topology: Topology, goal: Goal, prepared: Sequence[Prepared]
) -> list[PlainWay]:
    """Put everything into the memory of one device, for each of them at its best setting."""
    free = replace(goal, ceilings={})  # they are held against every way alike, later
    best: dict[str, Candidate] = {}
    reasons: dict[str, str] = {}
    for option in prepared:
        built = build_problem(option.chain, topology, free, option.overheads, resident=True)
        reasons |= {item.option: item.reason for item in built.left_out}
        for index, place in enumerate(built.places):
            found = _alone(workload, option, built, index, goal)
            if isinstance(found, str):
                reasons[place.name] = found
            elif place.name not in best or found.tpot_s < best[place.name].tpot_s:
                best[place.name] = found
    names = [f"{h.host_id}/{d.device_id}" for h in topology.hosts for d in h.devices]
    return [_way(name, best.get(name), reasons.get(name, "not possible")) for name in names]


def _alone(
    workload: LanguageWorkload, prepared: Prepared, built: Built, device: int, goal: Goal
) -> Candidate | str:
    """Return the whole model on one device, or why that is not possible."""
    outcome = score(built.problem, [(device, 0, built.problem.n_units)])
    if isinstance(outcome, Rejection):
        return outcome.reason
    try:
        return materialise(workload, prepared, built, outcome, goal)
    except CapacityError as error:
        return error.message


def _way(name: str, candidate: Candidate | None, reason: str) -> PlainWay:
    if candidate is None:
        return PlainWay(f"whole model on {name}", None, " ".join(reason.split()))
    return PlainWay(f"whole model on {name}", candidate.tpot_s, "everything fits", candidate)
