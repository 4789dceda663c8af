"""Who could share every layer with home, and what a share costs them: the question to the search.

From a model, a topology and a goal to `partition.tensor_shares`; one device of a host takes part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devices.topology import Topology
from edgert.errors import PlanError
from partition.build_problem import POWER_UNKNOWN, Overheads, Place, wants_power
from partition.cost import Missing, unit_seconds
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.popularity import Popularity
from partition.settings import Setting, language_goal_of, overheads_of
from partition.stage_tiers import page_bytes
from partition.tensor_shares import ShareHost, ShareProblem
from partition.tensor_split import divided_bytes, share_groups
from partition.tensor_star import Exchanges, reachable
from partition.units import UnitChain, language_units


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
        """Return the units of the model or of a part of it."""
        return language_units(workload, language_goal_of(self.goal, self.setting), self.popularity)


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
            why = _useless(ask, place) or _no_rate(place, chain)
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
    for unit in chain.units:
        seconds = unit_seconds(unit, place.device, "file")
        if isinstance(seconds, Missing):
            return f"no rate is known for {seconds.type_name} weights there"
    return None


def _layers_s(chain: UnitChain, place: Place) -> tuple[float, float]:
    """Return the seconds of all layers for a token and for the prompt."""
    pairs = [unit_seconds(unit, place.device, "repacked") for unit in chain.units[:-1]]
    known = [pair for pair in pairs if not isinstance(pair, Missing)]
    return sum(pair[0] for pair in known), sum(pair[1] for pair in known)


def share_problem(ask: Ask, chain: UnitChain, places: Sequence[Place]) -> ShareProblem:
    """Put into numbers what a share costs each of the places, home first."""
    workload, n_groups = ask.workload, share_groups(ask.workload)
    whole_bytes, group_bytes = divided_bytes(workload)
    head_bytes = sum(page_bytes(tensor.size_bytes) for tensor in workload.head.tensors)
    if ask.by_rows:
        group_bytes += head_bytes / n_groups
        whole_bytes += page_bytes(0) * len(workload.head.tensors)
    return ShareProblem(
        hosts=tuple(_host(ask, chain, place, 0 if ask.by_rows else head_bytes) for place in places),
        n_groups=n_groups,
        group_weight_bytes=group_bytes,
        group_kv_bytes=sum(unit.kept_bytes for unit in chain.units) / n_groups,
        whole_bytes=whole_bytes,
        hub=0,
        least_hosts=2,
    )


def _host(ask: Ask, chain: UnitChain, place: Place, head_bytes: int) -> ShareHost:
    overheads = overheads_of(ask.workload, ask.goal, ask.setting)
    fixed_bytes = fixed_bytes_of(place, overheads)
    decode_s, prefill_s = _layers_s(chain, place)
    own = head_bytes + ask.workload.entrance.dense_bytes if place.at_home else 0
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
        flash_bytes_per_s=flash_rate(ask, place),
        window_bytes=overheads.window_bytes,
        n_sweeps=max(1, exchanges.n_sweeps),
        exchange_decode_s=latency_s[0],
        exchange_prefill_s=latency_s[1],
        transfer_decode_s=transfer_s[0],
        transfer_prefill_s=transfer_s[1],
        own_bytes=own,
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


def fixed_bytes_of(place: Place, overheads: Overheads) -> int:
    """Return the memory of a place besides weights and KV cache."""
    fixed_bytes = overheads.buffer_bytes + overheads.program_bytes
    return fixed_bytes + (int(place.host.process_bytes.value) if place.device.kind == "cpu" else 0)


def pool_bytes(place: Place) -> int:
    """Return the memory that a place may take from."""
    return place.host.pool(place.device.pool_id).available_bytes


def flash_rate(ask: Ask, place: Place) -> float | None:
    """Return the bytes a second of streaming there; None where nothing streams."""
    flash = place.host.flash
    streams = place.device.can_stream and "streaming" in ask.goal.abilities
    return flash.streaming.value if flash is not None and streams else None
