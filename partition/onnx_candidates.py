"""Ways to run an ONNX model: stages with the names that cross, their memory and their seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from devices.topology import Topology
from partition.build_problem import Place
from partition.onnx_cost import float_rates, node_seconds
from partition.onnx_model import OnnxWeight
from partition.onnx_problem import OnnxChain, fixed_bytes, home_hops, hop_between
from partition.problem import Metric

_START_S = 0.3  # making a session of a small model


@dataclass(frozen=True, slots=True)
class OnnxStage:
    """Units [first_unit, end_unit) on a device.

    Attributes:
        place: Where.
        first_unit: First unit.
        end_unit: One past the last.
        inputs: Names that it is fed, those it only hands on among them.
        outputs: Names that it hands on, and results of the model that it makes.
        weights: By name; one that several stages read is in each of them.
        live_bytes: Most activations alive at once, of those whose size is known.
        fixed_bytes: The runtime.
        compute_s: One inference.
    """

    place: Place
    first_unit: int
    end_unit: int
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: Mapping[str, OnnxWeight]
    live_bytes: int
    fixed_bytes: int
    compute_s: float

    @property
    def weight_bytes(self) -> int:
        """Bytes of its weights."""
        return sum(weight.size_bytes for weight in self.weights.values())

    @property
    def peak_bytes(self) -> int:
        """Most memory of the stage."""
        return self.fixed_bytes + self.weight_bytes + self.live_bytes


@dataclass(frozen=True, slots=True)
class OnnxCandidate:
    """One complete way to run the model.

    Attributes:
        stages: In order.
        hops_s: Handing over, inputs and results included, one inference.
        sent_bytes: Over links between hosts.
    """

    stages: tuple[OnnxStage, ...]
    hops_s: float
    sent_bytes: float

    @property
    def tpot_s(self) -> float:
        """Seconds of one inference."""
        return sum(stage.compute_s for stage in self.stages) + self.hops_s

    @property
    def load_s(self) -> float:
        """Seconds of reading weights; stages load at the same time."""
        return max(_load_s(stage) for stage in self.stages)

    @property
    def energy_j(self) -> float:
        """Energy of an inference, of devices whose power is known."""
        return sum(
            stage.compute_s * stage.place.device.power_w.value
            for stage in self.stages
            if stage.place.device.power_w is not None
        )

    @property
    def peak_bytes(self) -> int:
        """Most memory of all stages together."""
        return sum(stage.peak_bytes for stage in self.stages)

    def of(self, metric: Metric) -> float:
        """Return one metric; one inference is one token and the whole prompt."""
        match metric:
            case "tpot_s" | "ttft_s":
                return self.tpot_s
            case "memory_bytes":
                return float(self.peak_bytes)
            case "energy_j":
                return self.energy_j
            case "sent_bytes":
                return self.sent_bytes

    @property
    def name(self) -> str:
        """Name it for people: `host/cpu units 0..4, host/gpu0 units 4..9`."""
        if len(self.stages) == 1:
            return self.stages[0].place.name
        return ", ".join(f"{s.place.name} units {s.first_unit}..{s.end_unit}" for s in self.stages)


def onnx_candidate(
    chain: OnnxChain, topology: Topology, choices: Sequence[tuple[Place, int, int]]
) -> OnnxCandidate:
    """Name what crosses and what is held in stages of units [first, end) on a place each."""
    stages = tuple(_stage(chain, place, first, end) for place, first, end in choices)
    hops = [
        hop_between(topology, one.place, other.place, chain.handed_bytes[one.end_unit - 1])
        for one, other in pairwise(stages)
    ]
    hops += home_hops(chain, topology, (stages[0].place, stages[-1].place))
    known = [hop for hop in hops if hop is not None]
    return OnnxCandidate(
        stages, sum(hop.decode_s for hop in known), sum(hop.sent_bytes for hop in known)
    )


def over_memory(candidate: OnnxCandidate) -> str:
    """Return which memory the stages exceed together, empty where none."""
    needed: dict[tuple[str, str], int] = {}
    for stage in candidate.stages:
        key = (stage.place.host.host_id, stage.place.device.pool_id)
        needed[key] = needed.get(key, 0) + stage.peak_bytes
    for stage in candidate.stages:
        host, pool = stage.place.host, stage.place.device.pool_id
        available = host.pool(pool).available_bytes
        if needed[host.host_id, pool] > available:
            return (
                f"needs {needed[host.host_id, pool]:,} bytes of {host.host_id}'s {pool}, "
                f"{available:,} are there"
            )
    return ""


def _stage(chain: OnnxChain, place: Place, first: int, end: int) -> OnnxStage:
    workload = chain.workload
    first_node, end_node = chain.bounds[first], chain.bounds[end]
    nodes = workload.nodes[first_node:end_node]
    names = [name for node in nodes for name in node.weights]
    if first == 0:  # what no node reads is loaded with the first
        read = {name for node in workload.nodes for name in node.weights}
        names += [name for name in workload.weights if name not in read]
    live = [size for size in workload.live_bytes[first_node:end_node] if size is not None]
    rates = float_rates(place.device)
    made = [name for node in nodes for name in node.outputs if name in set(workload.outputs)]
    return OnnxStage(
        place=place,
        first_unit=first,
        end_unit=end,
        inputs=_crossing(chain, first) if first else workload.inputs,
        outputs=tuple(dict.fromkeys([*_crossing(chain, end), *made])),
        weights={name: workload.weights[name] for name in dict.fromkeys(names)},
        live_bytes=max(live, default=0),
        fixed_bytes=fixed_bytes(place),
        compute_s=sum(
            node_seconds(unit.decode, chain.bounds[i + 1] - chain.bounds[i], rates)
            for i, unit in enumerate(chain.units[first:end], start=first)
        ),
    )


def _crossing(chain: OnnxChain, unit: int) -> tuple[str, ...]:
    """Return the names that cross the cut before a unit, none after the last."""
    position = chain.bounds[unit]
    if position == len(chain.workload.nodes):
        return ()
    return chain.workload.cuts[position - 1].tensors


def _load_s(stage: OnnxStage) -> float:
    flash = stage.place.host.flash
    read_s = stage.weight_bytes / flash.streaming.value if flash is not None else 0.0
    return _START_S + read_s
