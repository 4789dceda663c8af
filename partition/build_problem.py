"""From workload, topology and goal to the plain numbers that a search works on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from devices.profile import DeviceProfile, HostProfile
from devices.topology import Topology
from partition.cost import Missing, link_hop, local_hop, unit_seconds
from partition.goal import Goal
from partition.problem import BY_TOKEN, DeviceOption, Hop, Metric, Problem, Rejection, UnitCost
from partition.units import Unit, UnitChain
from partition.weight_memory import WeightMemory, Window, window_of

_TOKEN_BYTES = 4.0
POWER_UNKNOWN = "its power is not known, so its energy is not"


@dataclass(frozen=True, slots=True)
class Overheads:
    """Memory of a stage besides weights and KV cache.

    Attributes:
        buffer_bytes: Compute buffers for the micro-batch, and outputs.
        program_bytes: Vocabulary, row tables and what else the runtime allocates.
        staging_bytes: Of repacking while loading.
        n_tokens: Computed at once.
    """

    buffer_bytes: int
    program_bytes: int
    staging_bytes: int
    n_tokens: int = 1


@dataclass(frozen=True, slots=True)
class Place:
    """A device with its host, as an index of the problem refers to it."""

    host: HostProfile
    device: DeviceProfile
    at_home: bool = True

    @property
    def name(self) -> str:
        """`host/device`."""
        return f"{self.host.host_id}/{self.device.device_id}"

    @property
    def program_pool(self) -> str:
        """The memory that programs of the host are in: its processor's."""
        found = (device.pool_id for device in self.host.devices if device.kind == "cpu")
        return next(found, self.device.pool_id)

    @property
    def elsewhere(self) -> bool:
        """Whether the device computes from another memory than programs are in."""
        return self.program_pool != self.device.pool_id


@dataclass(frozen=True, slots=True)
class Built:
    """A problem, what its indices mean, and the devices that are out from the start.

    Attributes:
        problem: What a search works on.
        places: Its devices.
        left_out: Devices that cannot be used, and why.
        memory: Weights of each unit.
        window: What streaming needs; weights beyond it count as kept with their unit.
        resident: Whether everything is held, tables included, with kernels for interleaved rows.
    """

    problem: Problem
    places: tuple[Place, ...]
    left_out: tuple[Rejection, ...]
    memory: tuple[WeightMemory, ...]
    window: Window
    resident: bool


def build_problem(
    chain: UnitChain,
    topology: Topology,
    goal: Goal,
    overheads: Overheads,
    *,
    resident: bool = False,
) -> Built:
    """Cost every unit on every device that the goal allows.

    Args:
        chain: The model for one choice of micro-batch and cache types.
        topology: What there is.
        goal: What is asked.
        overheads: Memory besides weights and cache, the same on every stage (an upper bound).
        resident: Everything in memory, with kernels for interleaved rows, and nothing streams. A
            stage that streams runs on rows as they are in the file: the two are two problems.
    """
    pools = [(host.host_id, pool.pool_id) for host in topology.hosts for pool in host.pools]
    capacities = [float(p.available_bytes) for host in topology.hosts for p in host.pools]
    places: list[Place] = []
    options: list[DeviceOption] = []
    left_out: list[Rejection] = []
    memory = tuple(unit.memory for unit in chain.units)
    window = window_of(memory, cached=len(chain.reads) > 1, n_tokens=overheads.n_tokens)
    case = _Case(chain, goal, overheads, window, resident)
    for host in topology.hosts:
        for device in host.devices:
            place = Place(host, device, at_home=host.host_id == topology.home)
            pool = pools.index((host.host_id, device.pool_id))
            made = _useless(place, topology, goal) or _option(place, case, pool)
            if isinstance(made, str):
                left_out.append(Rejection(place.name, made))
            else:
                places.append(place)
                options.append(made)
    hops, first, last = _hops(places, topology, chain)
    problem = Problem(
        n_units=len(chain.units), reads=chain.reads, devices=tuple(options),
        pool_bytes=tuple(capacities), hops=hops, first_hops=first, last_hops=last,
        objective=goal.minimise, ceilings=_of_a_pass(goal), tokens_per_pass=goal.tokens_per_pass,
    )  # fmt: skip
    return Built(problem, tuple(places), tuple(left_out), memory, window, resident)


def _of_a_pass(goal: Goal) -> dict[Metric, float]:
    """Return the ceilings as a search counts: by pass, of which speculation makes more tokens."""
    return {
        metric: most * (goal.tokens_per_pass if metric in BY_TOKEN else 1.0)
        for metric, most in goal.ceilings.items()
    }


def wants_power(goal: Goal) -> bool:
    """Whether the goal is about energy: a device of unknown power would seem to be free."""
    return goal.minimise == "energy_j" or "energy_j" in goal.ceilings


def _useless(place: Place, topology: Topology, goal: Goal) -> str | None:
    host, device = place.host, place.device
    if device.kind != "cpu" and "accelerator" not in goal.abilities:
        return f"this runtime does not compute on a {device.kind}"
    if host.host_id != topology.home and not goal.abilities & {"pipeline", "edge_cloud"}:
        return "this runtime does not compute on other hosts"
    if host.host_id != topology.home and "hidden_states" not in goal.may_leave:
        return "hidden states may not leave home"
    if host.host_id != topology.home:
        for source, target in ((topology.home, host.host_id), (host.host_id, topology.home)):
            if topology.link(source, target) is None:
                return f"unreachable: no link from {source} to {target}"
    if device.power_w is None and wants_power(goal):
        return POWER_UNKNOWN
    if not device.kernels:
        return "no rate is known for it; edgert devices --measure"
    return None


@dataclass(frozen=True, slots=True)
class _Case:
    """What all devices of one problem have in common."""

    chain: UnitChain
    goal: Goal
    overheads: Overheads
    window: Window
    resident: bool


def _option(place: Place, case: _Case, pool: int) -> DeviceOption | str:
    resident, overheads = case.resident, case.overheads
    # Beside a cache the runtime repacks what stays; where it cannot the forecast says so.
    interleaved = resident or len(case.chain.reads) > 1
    streaming = place.device.can_stream and "streaming" in case.goal.abilities and not resident
    flash = place.host.flash if streaming else None
    units: list[UnitCost | None] = []
    for unit in case.chain.units:
        seconds = unit_seconds(unit, place.device, "repacked" if interleaved else "file")
        if isinstance(seconds, Missing):
            return f"no rate is known for {seconds.type_name} weights there"
        allowed = _may_hold(unit, place, case.goal)
        units.append(_cost(unit, seconds, case) if allowed else None)
    program_bytes = overheads.program_bytes + int(place.host.process_bytes.value)
    # A device with memory of its own holds no program; a goal about all memory counts it though.
    apart = place.elsewhere and "memory_bytes" not in (case.goal.minimise, *case.goal.ceilings)
    fixed_bytes = overheads.buffer_bytes + (0 if apart else program_bytes)
    fixed_bytes += overheads.staging_bytes if resident and place.device.kind == "cpu" else 0
    available = place.host.pool(place.program_pool).available_bytes
    if place.elsewhere and program_bytes > available:
        return (
            f"its program takes {program_bytes:,} bytes of {place.host.host_id}'s "
            f"{place.program_pool}, {available:,} are there"
        )
    return DeviceOption(
        name=place.name, pool=pool, units=tuple(units), fixed_bytes=fixed_bytes,
        window_bytes=case.window.n_bytes,
        flash_bytes_per_s=flash.streaming.value if flash is not None else None,
        n_sweeps=max(1, case.chain.units[0].prefill.n_sweeps),
        power_w=place.device.power_w.value if place.device.power_w is not None else 0.0,
    )  # fmt: skip


def _cost(unit: Unit, seconds: tuple[float, float], case: _Case) -> UnitCost:
    kept_bytes = unit.kept_bytes + case.window.floor_bytes(unit.memory)
    kept_bytes += unit.memory.lookup_bytes if case.resident else 0
    free_bytes = case.window.free_bytes(unit.memory, unit.weight_bytes[1:])
    return UnitCost(free_bytes, kept_bytes, *seconds)


def _may_hold(unit: Unit, place: Place, goal: Goal) -> bool:
    # The first unit has the ids, and the logits where they must not leave (`with_head_first`).
    if unit.index == 0 and not place.at_home and not {"input", "logits"} <= {*goal.may_leave}:
        return False
    if unit.layer is None:
        return True
    wanted = (s.host_id for s in goal.stays if s.first <= unit.layer < s.end)
    return all(name == place.host.host_id for name in wanted)


def _hops(
    places: Sequence[Place], topology: Topology, chain: UnitChain
) -> tuple[Mapping[tuple[int, int], Hop], tuple[Hop | None, ...], tuple[Hop | None, ...]]:
    """Hand over hidden states between devices; ids go in and come out."""
    n_decoded = chain.units[0].decode.n_tokens
    n_prompt = max(1, chain.units[0].prefill.n_tokens)
    hidden = float(max(chain.activation_bytes))
    hops: dict[tuple[int, int], Hop] = {}
    for i, source in enumerate(places):
        for j, target in enumerate(places):
            if i == j:
                continue
            if source.host.host_id == target.host.host_id:
                hops[i, j] = local_hop(source.device, hidden * n_decoded, hidden * n_prompt)
            elif (link := topology.link(source.host.host_id, target.host.host_id)) is not None:
                hops[i, j] = link_hop(link, hidden * n_decoded, hidden * n_prompt)
    first, last = [], []
    for place in places:
        away = place.host.host_id != topology.home
        there = topology.link(topology.home, place.host.host_id) if away else None
        back = topology.link(place.host.host_id, topology.home) if away else None
        ids = _TOKEN_BYTES * n_decoded
        # Logits that must not leave are made at home, from the hidden state of the last layer.
        returned = float(chain.activation_bytes[-1]) * n_decoded or ids
        none = Hop(0.0, 0.0)
        first.append(link_hop(there, ids, _TOKEN_BYTES * n_prompt) if there else none)
        last.append(link_hop(back, returned, returned) if back else none)
    return hops, tuple(first), tuple(last)
