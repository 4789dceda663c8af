"""From an ONNX model, a topology and a goal to a search problem: units between cuts, static shapes.

A problem's hops cost the same wherever the chain is cut, and cuts of a graph differ by orders of
magnitude. So there is a problem for each of a few limits on what may cross, and the plan keeps the
best placement of all, scored with what really crosses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from devices.topology import Topology
from partition.build_problem import POWER_UNKNOWN, Place, wants_power
from partition.cost import link_hop, local_hop
from partition.goal import Goal
from partition.onnx_cost import float_rates, node_seconds
from partition.onnx_units import onnx_units, unit_bounds
from partition.onnx_workload import OnnxWorkload
from partition.problem import DeviceOption, Hop, Problem, Rejection, UnitCost
from partition.units import Unit

_MOST_UNITS = 48
_MOST_LIMITS = 4


@dataclass(frozen=True, slots=True)
class OnnxChain:
    """A model as units in a row.

    Attributes:
        workload: The model.
        units: Runs of nodes between the chosen cuts.
        bounds: Where each unit's nodes begin, and one past the last node.
        handed_bytes: What crosses the cut after each unit; after the last what is returned.
        fed_bytes: What goes in.
        static_refusal: By unit, why it cannot be built ahead; empty where it can.
    """

    workload: OnnxWorkload
    units: tuple[Unit, ...]
    bounds: tuple[int, ...]
    handed_bytes: tuple[int, ...]
    fed_bytes: int
    static_refusal: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class CutProblem:
    """A problem over pieces of the chain.

    Attributes:
        problem: Its units are the pieces.
        places: What its devices are.
        pieces: Units [first, end) of the chain that each piece is.
    """

    problem: Problem
    places: tuple[Place, ...]
    pieces: tuple[tuple[int, int], ...]


def onnx_chain(workload: OnnxWorkload) -> OnnxChain:
    """Cut a model where it may be cut."""
    chain = onnx_units(workload, _MOST_UNITS)
    bounds = tuple(unit_bounds(workload, _MOST_UNITS))
    sizes = [workload.tensors[n].size_bytes for n in workload.inputs if n in workload.tensors]
    refusals = tuple(_refusal(workload, first, end) for first, end in pairwise(bounds))
    handed = chain.activation_bytes
    return OnnxChain(
        workload, chain.units, bounds, handed, sum(size or 0 for size in sizes), refusals
    )


def usable_places(
    chain: OnnxChain, topology: Topology, goal: Goal
) -> tuple[tuple[Place, ...], tuple[Rejection, ...]]:
    """Return the devices that may take part, and why the others may not."""
    places, left_out = [], []
    for host in topology.hosts:
        for device in host.devices:
            place = Place(host, device, at_home=host.host_id == topology.home)
            reason = _useless(place, topology, goal) or _all_dynamic(chain, place)
            if reason is None:
                places.append(place)
            else:
                left_out.append(Rejection(place.name, reason))
    return tuple(places), tuple(left_out)


def cut_problems(
    chain: OnnxChain, places: Sequence[Place], topology: Topology, goal: Goal
) -> tuple[CutProblem, ...]:
    """Return a problem for each limit on what may cross between devices.

    Args:
        chain: The model.
        places: From `usable_places`.
        topology: Their hosts and links.
        goal: What is asked.
    """
    sizes = sorted(set(chain.handed_bytes[:-1]))
    step = -(-len(sizes) // _MOST_LIMITS) or 1
    limits = sizes[::-1][::step] if len(places) > 1 else []
    made = [_problem(chain, places, topology, (goal, limit)) for limit in sorted(limits)]
    return tuple(made) or (_problem(chain, places, topology, (goal, None)),)


def is_static(place: Place) -> bool:
    """Whether a device runs only graphs that were built ahead, of fixed shapes."""
    return place.device.kind == "npu" or place.device.static_tokens is not None


def hop_between(topology: Topology, one: Place, other: Place, n_bytes: float) -> Hop | None:
    """Return the cost of handing bytes to the next device; None where it cannot be reached."""
    if one.host.host_id == other.host.host_id:
        return local_hop(one.device, n_bytes, n_bytes)
    link = topology.link(one.host.host_id, other.host.host_id)
    return link_hop(link, n_bytes, n_bytes) if link is not None else None


def home_hops(
    chain: OnnxChain, topology: Topology, places: tuple[Place, Place]
) -> tuple[Hop | None, Hop | None]:
    """Return the hops of inputs to the first device and of results from the last, home and back."""
    none = Hop(0.0, 0.0)
    first, last = (place.host.host_id for place in places)
    there, back = topology.link(topology.home, first), topology.link(last, topology.home)
    fed, returned = float(chain.fed_bytes), float(chain.handed_bytes[-1])
    entering = link_hop(there, fed, fed) if there is not None else None
    leaving = link_hop(back, returned, returned) if back is not None else None
    return (
        none if first == topology.home else entering,
        none if last == topology.home else leaving,
    )


def fixed_bytes(place: Place) -> int:
    """Return the memory of the runtime on a device's host."""
    return int(place.host.process_bytes.value) if place.device.kind == "cpu" else 0


def _problem(
    chain: OnnxChain,
    places: Sequence[Place],
    topology: Topology,
    ask: tuple[Goal, int | None],
) -> CutProblem:
    goal, limit = ask
    pieces = _pieces(chain, limit)
    pools = [(host.host_id, pool.pool_id) for host in topology.hosts for pool in host.pools]
    capacities = [float(p.available_bytes) for host in topology.hosts for p in host.pools]
    crossing = float(limit or 0)
    hops = {
        (i, j): hop
        for i, one in enumerate(places)
        for j, other in enumerate(places)
        if i != j and (hop := hop_between(topology, one, other, crossing)) is not None
    }
    ends = [home_hops(chain, topology, (place, place)) for place in places]
    problem = Problem(
        n_units=len(pieces),
        reads=(1.0,),
        devices=tuple(
            _option(chain, place, pieces, (goal, topology.home, pools)) for place in places
        ),
        pool_bytes=tuple(capacities),
        hops=hops,
        first_hops=tuple(first for first, _ in ends),
        last_hops=tuple(last for _, last in ends),
        objective=goal.minimise,
        ceilings=dict(goal.ceilings),
    )
    return CutProblem(problem, tuple(places), pieces)


def _pieces(chain: OnnxChain, limit: int | None) -> tuple[tuple[int, int], ...]:
    """Join units between which more than the limit would cross; all of them without a limit."""
    n_units = len(chain.units)
    allowed = [
        index + 1
        for index, size in enumerate(chain.handed_bytes[:-1])
        if limit is not None and size <= limit
    ]
    return tuple(pairwise([0, *allowed, n_units]))


def _option(
    chain: OnnxChain,
    place: Place,
    pieces: Sequence[tuple[int, int]],
    ask: tuple[Goal, str, list[tuple[str, str]]],
) -> DeviceOption:
    goal, home, pools = ask
    rates = float_rates(place.device)
    units: list[UnitCost | None] = []
    for first, end in pieces:
        static = is_static(place) and any(chain.static_refusal[first:end])
        away = first == 0 and place.host.host_id != home and "input" not in goal.may_leave
        if static or away:
            units.append(None)
            continue
        seconds = sum(
            node_seconds(unit.decode, chain.bounds[i + 1] - chain.bounds[i], rates)
            for i, unit in enumerate(chain.units[first:end], start=first)
        )
        weight_bytes = sum(unit.total_weight_bytes for unit in chain.units[first:end])
        units.append(UnitCost((weight_bytes,), 0.0, seconds, seconds))
    known = [size for size in chain.workload.live_bytes if size is not None]
    power = place.device.power_w
    return DeviceOption(
        name=place.name,
        pool=pools.index((place.host.host_id, place.device.pool_id)),
        units=tuple(units),
        # A stage's own peak is known only with its cut; that of the whole model is never below.
        fixed_bytes=fixed_bytes(place) + max(known, default=0),
        power_w=power.value if power is not None else 0.0,
    )


def _useless(place: Place, topology: Topology, goal: Goal) -> str | None:
    host, device = place.host, place.device
    runs = any(runtime.name == "ONNX Runtime" and runtime.backends for runtime in host.runtimes)
    if not device.kernels and not runs:
        return "neither ONNX Runtime nor a rate is known there"
    if device.kind != "cpu" and "accelerator" not in goal.abilities:
        return f"this runtime does not compute on a {device.kind}"
    if device.power_w is None and wants_power(goal):
        return POWER_UNKNOWN
    if host.host_id == topology.home:
        return None
    if not goal.abilities & {"pipeline", "edge_cloud"}:
        return "this runtime does not compute on other hosts"
    if "hidden_states" not in goal.may_leave:
        return "hidden states may not leave home"
    for source, target in ((topology.home, host.host_id), (host.host_id, topology.home)):
        if topology.link(source, target) is None:
            return f"unreachable: no link from {source} to {target}"
    return None


def _all_dynamic(chain: OnnxChain, place: Place) -> str | None:
    if is_static(place) and all(chain.static_refusal):
        return f"it runs graphs of fixed shapes only, and {chain.static_refusal[0]}"
    return None


def _refusal(workload: OnnxWorkload, first: int, end: int) -> str:
    """Return why nodes [first, end) cannot be built ahead of time."""
    if workload.open_dimensions:
        return f"the model leaves {workload.open_dimensions[0].dimension} open"
    for node, live in zip(workload.nodes[first:end], workload.live_bytes[first:end], strict=True):
        if node.flops is None:
            return f"{node.name}: {node.why_unknown}"
        if live is None:
            return f"{node.name}: a size is not known before it runs"
    return ""
