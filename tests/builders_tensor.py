"""Stars of known hosts, and the ways to share every layer of a model between them."""

from __future__ import annotations

from collections.abc import Sequence

from builders_plan import BOARD, workload
from devices.catalog import known_host, usual_link
from devices.profile import Figure, HostProfile
from devices.topology import LinkKind, Topology
from partition.candidates import Candidate
from partition.goal import ALL_ABILITIES, Goal
from partition.language_workload import LanguageWorkload
from partition.popularity import Popularity
from partition.tensor_candidates import tensor_candidates

GOAL = Goal(
    n_prompt=64, n_ctx=512, ubatches=(32,), abilities=ALL_ABILITIES, may_leave=("hidden_states",)
)


def star(hosts: Sequence[HostProfile], kind: LinkKind = "ethernet_10g") -> Topology:
    home = hosts[0].host_id
    links = tuple(
        usual_link(kind, *pair)
        for host in hosts[1:]
        for pair in ((home, host.host_id), (host.host_id, home))
    )
    return Topology(home=home, hosts=tuple(hosts), links=links)


def boards(n_hosts: int) -> Topology:
    return star([known_host(BOARD, f"board{index}") for index in range(n_hosts)])


def shared(shape: str, topology: Topology, goal: Goal = GOAL) -> Candidate:
    found, rejected = tensor_candidates(workload(shape), topology, goal, Popularity())
    assert found, rejected
    return min(found, key=lambda candidate: candidate.tpot_s)


def refused(model: LanguageWorkload, topology: Topology, goal: Goal = GOAL) -> str:
    found, rejected = tensor_candidates(model, topology, goal, Popularity())
    assert not found
    return "; ".join(item.reason for item in rejected)


def powered(host: HostProfile, power_w: float) -> HostProfile:
    """Return the host with its processor alone, of a known power."""
    power = Figure(value=power_w, origin="declared")
    processor = next(device for device in host.devices if device.kind == "cpu")
    return host.model_copy(update={"devices": (processor.model_copy(update={"power_w": power}),)})
