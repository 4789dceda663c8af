"""The plain ways to run a model, which a plan has to beat or give way to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from devices.topology import Topology
from edgert.errors import CapacityError
from partition.build_problem import Built, Place, build_problem
from partition.candidate_search import materialise
from partition.candidates import Candidate
from partition.cost import Missing, unit_seconds
from partition.evaluate import score
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.popularity import Popularity
from partition.problem import Rejection
from partition.settings import Prepared, language_goal_of
from partition.stage_tiers import stage_weights
from partition.units import UnitChain, language_units

_LEAST_MAPPED_SHARE = 0.58  # see _mapped_reads


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
    workload: LanguageWorkload,
    topology: Topology,
    goal: Goal,
    prepared: Sequence[Prepared],
    popularity: Popularity,
) -> tuple[PlainWay, ...]:
    """Predict llama.cpp alone on the home host, and the whole model on each single device."""
    home = topology.host(topology.home)
    leanest = min(prepared, key=lambda option: option.overheads.buffer_bytes)
    # It drafts nothing: a token a pass.
    asked = language_goal_of(replace(goal, n_drafted=0), leanest.setting)
    chain = language_units(workload, asked, popularity)
    alone = [
        _llama_cpp(chain, workload, Place(home, device), leanest)
        for device in home.devices
        if device.kind == "cpu"
    ]
    whole = [option for option in prepared if not option.cached]
    return (*alone, *_whole_on_each(workload, topology, goal, whole))


def _llama_cpp(
    chain: UnitChain, workload: LanguageWorkload, place: Place, prepared: Prepared
) -> PlainWay:
    """Memory-mapped, without repacking, its best setting where the model does not fit."""
    host, device = place.host, place.device
    name = f"llama.cpp alone on {place.name}"
    seconds = [unit_seconds(unit, device, "file") for unit in chain.units]
    if any(isinstance(pair, Missing) for pair in seconds):
        return PlainWay(name, None, "no rate is known for a weight type of this model")
    compute_s = sum(pair[0] for pair in seconds if not isinstance(pair, Missing))
    weights = stage_weights(workload, 0, len(workload.run_layers), head=True)
    other = prepared.overheads.buffer_bytes + prepared.overheads.program_bytes
    other += int(host.process_bytes.value) + sum(u.kept_bytes for u in chain.units)
    available = host.pool(device.pool_id).available_bytes
    if other > available:
        reason = f"needs {other:,} bytes without weights, {available:,} are there"
        return PlainWay(name, None, reason)
    if other + weights.every_bytes <= available:
        return PlainWay(name, compute_s, "everything fits")
    if host.flash is None:
        return PlainWay(name, None, "does not fit, and no flash to read from is known")
    read_bytes, why = _mapped_reads(chain, available - other)
    missing = other + weights.every_bytes - available
    read_s = read_bytes / host.flash.streaming.value
    return PlainWay(name, max(compute_s, read_s), f"{missing:,} bytes short: {why}")


def _mapped_reads(chain: UnitChain, room_bytes: int) -> tuple[float, str]:
    """Return what a token reads of a memory-mapped model that does not fit, and why.

    The page cache keeps the pages used last. What every token uses is a cyclic pass: once that does
    not fit, every page of it is read again on every token. Experts are no better off below about
    half of the model in memory: page faults read around what they want, which drives out what the
    next token wants. Above, the experts that are wanted most often stay.

    Measured with 64 experts of which 8 are used, Linux 6.18, llama.cpp memory-mapped: 40 and 51 %
    of the file in memory 4.9 s a token, which is the file at the flash's rate; 58 % the same for
    two tokens, then 0.5 s; 65 to 97 % 0.2 to 0.13 s.
    """
    classes = [sum(unit.weight_bytes[c] for unit in chain.units) for c in range(len(chain.reads))]
    dense_bytes = sum(unit.memory.stays_bytes + sum(unit.memory.dense) for unit in chain.units)
    experts = list(zip(chain.reads[1:], classes[1:], strict=True))
    active_bytes = dense_bytes + sum(share * size for share, size in experts)
    if not experts:
        why = "a cyclic pass defeats the page cache, so every token reads all"
        return active_bytes, why
    whole_bytes = dense_bytes + sum(size for _, size in experts)
    if room_bytes < max(active_bytes, _LEAST_MAPPED_SHARE * whole_bytes):
        why = "page faults read around what they want, so every token reads about all"
        return whole_bytes, why
    left_bytes, read_bytes = float(room_bytes - dense_bytes), 0.0
    for share, size in experts:
        held_bytes = min(left_bytes, size)
        left_bytes -= held_bytes
        read_bytes += share * (size - held_bytes)
    return read_bytes, "what every token uses stays, experts that are not in memory are read"


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
