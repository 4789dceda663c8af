"""Who could share every layer with home, and what a share costs them: the question to the search.

From a model, a topology and a goal to `partition.tensor_shares`; one device of a host takes part.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from devices.topology import Topology
from edgert.errors import PlanError
from partition.build_problem import POWER_UNKNOWN, Overheads, Place, wants_power
from partition.cost import Missing, unit_seconds
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.manifest import TensorShare
from partition.popularity import Popularity
from partition.settings import Setting, language_goal_of, most_threads_of, overheads_of
from partition.tensor_memory import distinct_layers, of_each_kind, share_bytes
from partition.tensor_shares import ShareBytes, ShareHost, ShareProblem
from partition.tensor_split import HeadPart, Part, share_groups, split_workload, unlike_shares
from partition.tensor_star import Exchanges, reachable
from partition.units import Unit, UnitChain, language_units


@dataclass(frozen=True, slots=True)
class Ask:
    """One setting of one model on one topology, and how the output is computed."""

    workload: LanguageWorkload
    topology: Topology
    goal: Goal
    setting: Setting
    popularity: Popularity
    by_rows: bool

    def chain(self, workload: LanguageWorkload) -> UnitChain:
        """Return the units of the model or of a part of it.

        Layers that are alike share one unit, with the name of the first of them.
        """
        few, kinds = distinct_layers(workload)
        asked = language_goal_of(self.goal, self.setting)
        chain = language_units(few, asked, self.popularity)
        *layers, head = chain.units
        handed = (*[workload.activation_bytes] * len(kinds), 0)
        return UnitChain(chain.reads, (*(layers[kind] for kind in kinds), head), handed)


def share_places(ask: Ask, chain: UnitChain) -> list[Place]:
    """Return the fastest usable device of each host, home first.

    Raises:
        PlanError: home or every other host has none.
    """
    found, reasons = [], []
    for host in sorted(ask.topology.hosts, key=lambda host: host.host_id != ask.topology.home):
        best: tuple[float, Place] | None = None
        for device in host.devices:
            place = Place(host, device, at_home=host.host_id == ask.topology.home)
            why = _useless(ask, place) or _no_rate(place, chain) or _no_program(ask, place)
            if why is not None:
                reasons.append(f"{place.name}: {why}")
                continue
            seconds = _layers_s(chain, place)[0]
            if best is None or seconds < best[0]:
                best = (seconds, place)
        if best is not None:
            found.append(best[1])
    if len(found) < 2 or not found[0].at_home:
        raise PlanError("no two hosts, home among them, can share it: " + "; ".join(reasons))
    return found


def _useless(ask: Ask, place: Place) -> str | None:
    device, home = place.device, ask.topology.home
    if device.kind != "cpu" and "accelerator" not in ask.goal.abilities:
        return f"this runtime does not compute on a {device.kind}"
    if device.power_w is None and wants_power(ask.goal):
        return POWER_UNKNOWN
    if device.static_tokens is not None:
        return "its graphs are built ahead and cannot wait for other hosts in the middle"
    if not reachable(ask.topology, place.host.host_id):
        return f"unreachable: no links from {home} and back"
    return None


def _no_rate(place: Place, chain: UnitChain) -> str | None:
    for unit in _unlike(chain.units):
        seconds = unit_seconds(unit, place.device, "file")
        if isinstance(seconds, Missing):
            return f"no rate is known for {seconds.type_name} weights there"
    return None


def _unlike(units: Sequence[Unit]) -> Collection[Unit]:
    """Return every unit once: layers that are alike share one."""
    return {id(unit): unit for unit in units}.values()


def _no_program(ask: Ask, place: Place) -> str | None:
    """Say that the program of a device with memory of its own does not fit its host's."""
    if not place.elsewhere:
        return None
    program_bytes = host_bytes_of(place, overheads_at(ask, place, ask.workload))
    available_bytes = place.host.pool(place.program_pool).available_bytes
    if program_bytes <= available_bytes:
        return None
    return (
        f"its program takes {program_bytes:,} bytes of {place.host.host_id}'s "
        f"{place.program_pool}, {available_bytes:,} are there"
    )


def _layers_s(chain: UnitChain, place: Place) -> tuple[float, float]:
    """Return the seconds of all layers for a token and for the prompt."""
    layers = chain.units[:-1]
    of_unit = {id(unit): unit_seconds(unit, place.device, "repacked") for unit in _unlike(layers)}
    pairs = [of_unit[id(unit)] for unit in layers]
    known = [pair for pair in pairs if not isinstance(pair, Missing)]
    return sum(pair[0] for pair in known), sum(pair[1] for pair in known)


def share_problem(ask: Ask, chain: UnitChain, places: Sequence[Place]) -> ShareProblem:
    """Put into numbers what a share costs each of the places, home first."""
    sizes = {
        at_home: share_bytes(ask.workload, entrance=at_home, head=head_part(ask, at_home))
        for at_home in (True, False)
    }
    n_groups = share_groups(ask.workload)
    exchanges = exchanges_of(ask, chain)
    overheads: dict[tuple[bool, int], Overheads] = {}
    for place in places:
        if (place.at_home, n_threads_of(place)) not in overheads:
            overheads[place.at_home, n_threads_of(place)] = _most_overheads(ask, place)
    return ShareProblem(
        hosts=tuple(
            _host(
                ask,
                chain,
                place,
                sizes[place.at_home],
                overheads[place.at_home, n_threads_of(place)],
            )
            for place in places
        ),
        n_groups=n_groups,
        group_kv_bytes=sum(unit.kept_bytes for unit in chain.units) / n_groups,
        hub=0,
        least_hosts=2,
        own_s=exchanges.own_s,
        pair_factors=exchanges.pair_factors,
    )


def head_part(ask: Ask, at_home: bool) -> HeadPart:
    """Return which part of the output a host computes."""
    if ask.by_rows:
        return "rows"
    return "whole" if at_home else "none"


def _most_overheads(ask: Ask, place: Place) -> Overheads:
    """Count the overheads of the share that needs most; thin layers may pack worse in a buffer."""
    entrance, head = place.at_home, head_part(ask, place.at_home)
    n_groups = share_groups(ask.workload)
    every = Part(TensorShare(first_group=0, end_group=n_groups, n_groups=n_groups), entrance, head)
    few = of_each_kind(ask.workload)
    buffers = (
        overheads_at(ask, place, split_workload(few, Part(share, entrance, head))).buffer_bytes
        for share in unlike_shares(few)
    )
    whole = overheads_at(ask, place, split_workload(ask.workload, every))
    return replace(whole, buffer_bytes=max(buffers))


def _host(
    ask: Ask, chain: UnitChain, place: Place, sizes: tuple[ShareBytes, ...], overheads: Overheads
) -> ShareHost:
    fixed_bytes = fixed_bytes_of(place, overheads) - host_bytes_of(place, overheads)
    decode_s, prefill_s = _layers_s(chain, place)
    latency_s = transfer_s = (0.0, 0.0)
    exchanges = exchanges_of(ask, chain)
    if not place.at_home:
        latency_s = exchanges.latency_s(ask.topology, place.host.host_id)
        transfer_s = exchanges.transfer_s(ask.topology, place.host.host_id)
    return ShareHost(
        name=place.name,
        decode_s=decode_s,
        prefill_s=prefill_s,
        capacity_bytes=max(0, pool_bytes(place) - fixed_bytes),
        sizes=sizes,
        flash_bytes_per_s=flash_rate(ask, place),
        n_sweeps=max(1, exchanges.n_sweeps),
        exchange_decode_s=latency_s[0],
        exchange_prefill_s=latency_s[1],
        transfer_decode_s=transfer_s[0],
        transfer_prefill_s=transfer_s[1],
    )


def exchanges_of(ask: Ask, chain: UnitChain) -> Exchanges:
    """Return what hosts exchange in a pass, drafted tokens included."""
    prefill = chain.units[0].prefill
    return Exchanges(
        n_layers=len(ask.workload.run_layers),
        token_bytes=ask.workload.activation_bytes,
        n_prompt=prefill.n_tokens,
        n_sweeps=prefill.n_sweeps,
        by_rows=ask.by_rows,
        n_decoded=1 + ask.goal.n_drafted,
    )


def overheads_at(ask: Ask, place: Place, workload: LanguageWorkload) -> Overheads:
    """Count memory besides weights and KV cache of the model or of a part of it on a place."""
    return overheads_of(workload, ask.goal, ask.setting, n_threads_of(place))


def n_threads_of(place: Place) -> int:
    """Return the most threads that compute for a place: its own, or its host's processors'."""
    host, device = place.host, place.device
    processors = [device] if device.kind == "cpu" else [d for d in host.devices if d.kind == "cpu"]
    return max((most_threads_of(host, processor) for processor in processors), default=1)


def fixed_bytes_of(place: Place, overheads: Overheads) -> int:
    """Return the memory of a stage besides weights and KV cache, wherever it is."""
    process_bytes = int(place.host.process_bytes.value)
    return overheads.buffer_bytes + overheads.program_bytes + process_bytes


def host_bytes_of(place: Place, overheads: Overheads) -> int:
    """Return what of it is in the host's memory instead of the device's own."""
    return fixed_bytes_of(place, overheads) - overheads.buffer_bytes if place.elsewhere else 0


def pool_bytes(place: Place) -> int:
    """Return the memory that a place may take from."""
    return place.host.pool(place.device.pool_id).available_bytes


def flash_rate(ask: Ask, place: Place) -> float | None:
    """Return the bytes a second of streaming there; None where nothing streams."""
    flash = place.host.flash
    streams = place.device.can_stream and "streaming" in ask.goal.abilities
    return flash.streaming.value if flash is not None and streams else None
