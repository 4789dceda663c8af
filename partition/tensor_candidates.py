"""Ways to run a model with every layer shared between hosts, home among them: tensor parallelism.

A star whose hub is home sums what the hosts computed twice a layer (`partition.tensor_star`).
Shares are chosen by `partition.tensor_shares`, parts made by `partition.tensor_split`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

from devices.profile import WeightLayout
from devices.topology import Topology
from edgert.errors import CapacityError, PlanError
from partition.build_problem import POWER_UNKNOWN, Overheads, Place, wants_power
from partition.candidates import Candidate
from partition.cost import Missing, unit_seconds
from partition.forecast import forecast_stage
from partition.goal import Goal
from partition.language_workload import LanguageWorkload
from partition.manifest import TensorShare, Tiers
from partition.popularity import Popularity
from partition.problem import Rejection
from partition.settings import Setting, language_goal_of, overheads_of, settings
from partition.stage_plan import StagePlan
from partition.stage_tiers import (
    StageWeights,
    choose_tiers,
    page_bytes,
    resident_tiers,
    stage_weights,
    staging_bytes,
)
from partition.tensor_shares import MOST_HOSTS, ShareHost, ShareProblem, Shares, choose_shares
from partition.tensor_split import (
    HeadPart,
    Part,
    divided_bytes,
    share_groups,
    split_workload,
    why_not_split,
)
from partition.tensor_star import Exchanges, reachable
from partition.units import UnitChain, language_units

OPTION = "every layer shared between hosts"


@dataclass(frozen=True, slots=True)
class _Ask:
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

    def at_home(self, place: Place) -> bool:
        """Whether a place is on the host of the person."""
        return place.host.host_id == self.topology.home


def tensor_candidates(
    workload: LanguageWorkload, topology: Topology, goal: Goal, popularity: Popularity
) -> tuple[tuple[Candidate, ...], tuple[Rejection, ...]]:
    """Find the best shares for every setting, and why there are none."""
    if len(topology.hosts) < 2 or "tensor_parallel" not in goal.abilities:
        return (), ()
    reason = _not_wanted(topology, goal) or why_not_split(workload)
    if reason is not None:
        return (), (Rejection(OPTION, reason),)
    found: list[Candidate] = []
    rejected: list[Rejection] = []
    by_rows = "vocabulary_shards" in goal.abilities and "logits" in goal.may_leave
    heads = (False, True) if by_rows and not workload.spec.tied_embeddings else (False,)
    for setting in settings(goal, few=True):
        for head in heads:
            ask = _Ask(workload, topology, goal, setting, popularity, head)
            try:
                found.append(_candidate(ask))
            except (PlanError, CapacityError) as error:
                label = f"{OPTION}, ubatch {setting.n_ubatch}, {setting.cache_type} KV"
                rejected.append(Rejection(label, error.message))
    return tuple(found), tuple(dict.fromkeys(rejected))


def _not_wanted(topology: Topology, goal: Goal) -> str | None:
    if len(topology.hosts) > MOST_HOSTS:
        return f"{len(topology.hosts)} hosts, {MOST_HOSTS} at most"
    if "hidden_states" not in goal.may_leave:
        return "hidden states may not leave home"
    if goal.stays:
        return "layers must stay on a host, and a share of each would leave it"
    return None


def _candidate(ask: _Ask) -> Candidate:
    """Choose the shares and forecast them.

    Raises:
        PlanError: no hosts hold the model together.
        CapacityError: a host does not hold its tensors as they are cut.
    """
    chain = ask.chain(ask.workload)
    places = _places(ask, chain)
    shares = choose_shares(_problem(ask, chain, places))
    numbered = _numbered(shares, share_groups(ask.workload))
    stages = tuple(_stage(ask, places[host], share) for host, share in numbered)
    exchanges = _exchanges(ask, chain)
    others = [stage.place.host.host_id for stage in stages[1:]]
    seconds = exchanges.seconds(ask.topology, others)
    layout: WeightLayout = "file" if stages[0].tiers.layout == "file" else "repacked"
    head = unit_seconds(chain.units[-1], places[0].device, layout)
    head_s = (0.0, 0.0) if ask.by_rows or isinstance(head, Missing) else head
    return Candidate(
        setting=ask.setting,
        stages=stages,
        hops_decode_s=seconds[0],
        hops_prefill_s=seconds[1],
        sent_bytes=exchanges.sent_bytes(len(others)),
        tokens_per_pass=ask.goal.tokens_per_pass,
        parallel=True,
        head_decode_s=head_s[0],
        head_prefill_s=head_s[1],
    )


def _places(ask: _Ask, chain: UnitChain) -> list[Place]:
    """Return the fastest usable device of each host, home first.

    Raises:
        PlanError: home or every other host has none.
    """
    found, reasons = [], []
    for host in sorted(ask.topology.hosts, key=lambda host: host.host_id != ask.topology.home):
        best: tuple[float, Place] | None = None
        for device in host.devices:
            place = Place(host, device)
            why = _useless(ask, place) or _no_rate(place, chain)
            if why is not None:
                reasons.append(f"{place.name}: {why}")
                continue
            seconds = _layers_s(chain, place)[0]
            if best is None or seconds < best[0]:
                best = (seconds, place)
        if best is not None:
            found.append(best[1])
    if len(found) < 2 or not ask.at_home(found[0]):
        raise PlanError("no two hosts, home among them, can share it: " + "; ".join(reasons))
    return found


def _useless(ask: _Ask, place: Place) -> str | None:
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


def _problem(ask: _Ask, chain: UnitChain, places: Sequence[Place]) -> ShareProblem:
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


def _host(ask: _Ask, chain: UnitChain, place: Place, head_bytes: int) -> ShareHost:
    overheads = overheads_of(ask.workload, ask.goal, ask.setting)
    fixed_bytes = _fixed_bytes(place, overheads)
    decode_s, prefill_s = _layers_s(chain, place)
    own = head_bytes + ask.workload.entrance.dense_bytes if ask.at_home(place) else 0
    latency_s = transfer_s = (0.0, 0.0)
    exchanges = _exchanges(ask, chain)
    if not ask.at_home(place):
        latency_s = exchanges.latency_s(ask.topology, place.host.host_id)
        transfer_s = exchanges.transfer_s(ask.topology, place.host.host_id)
    return ShareHost(
        name=place.name,
        decode_s=decode_s,
        prefill_s=prefill_s,
        capacity_bytes=max(0, _pool_bytes(place) - fixed_bytes),
        flash_bytes_per_s=_flash_rate(ask, place),
        window_bytes=overheads.window_bytes,
        n_sweeps=max(1, exchanges.n_sweeps),
        exchange_decode_s=latency_s[0],
        exchange_prefill_s=latency_s[1],
        transfer_decode_s=transfer_s[0],
        transfer_prefill_s=transfer_s[1],
        own_bytes=own,
    )


def _exchanges(ask: _Ask, chain: UnitChain) -> Exchanges:
    prefill = chain.units[0].prefill
    return Exchanges(
        n_layers=len(ask.workload.run_layers),
        token_bytes=ask.workload.activation_bytes,
        n_prompt=prefill.n_tokens,
        n_sweeps=prefill.n_sweeps,
        by_rows=ask.by_rows,
    )


def _stage(ask: _Ask, place: Place, share: TensorShare) -> StagePlan:
    """Cut the tensors of one host and decide which of them stay in memory."""
    home = ask.at_home(place)
    head: HeadPart = "rows" if ask.by_rows else "whole" if home else "none"
    thin = split_workload(ask.workload, Part(share, entrance=home, head=head))
    n_layers = len(thin.run_layers)
    units = ask.chain(thin).units
    weights = stage_weights(thin, 0, n_layers, head=True)
    overheads = overheads_of(thin, ask.goal, ask.setting)
    fixed_bytes = _fixed_bytes(place, overheads)
    kv_bytes = sum(unit.kept_bytes for unit in units)
    tiers = _tiers(ask, place, weights, _pool_bytes(place) - fixed_bytes - kv_bytes)
    return StagePlan(
        place=place,
        first_layer=0,
        end_layer=n_layers,
        head=head != "none",
        weights=weights,
        tiers=tiers,
        kv_bytes=kv_bytes,
        fixed_bytes=fixed_bytes,
        buffer_bytes=overheads.buffer_bytes,
        forecast=forecast_stage(place, units, weights, tiers),
        share=share,
    )


def _tiers(ask: _Ask, place: Place, weights: StageWeights, available_bytes: int) -> Tiers:
    if weights.every_bytes + staging_bytes(weights) <= available_bytes:
        return resident_tiers(weights)
    tiers, residency = choose_tiers(weights, available_bytes)
    if tiers.streamed and _flash_rate(ask, place) is None:
        raise CapacityError(
            f"{place.name}: its share takes {weights.whole_bytes:,} bytes, {available_bytes:,} are "
            "left for it, and it cannot stream",
            needed_bytes=weights.whole_bytes,
            available_bytes=residency.pinned_bytes,
        )
    return tiers


def _fixed_bytes(place: Place, overheads: Overheads) -> int:
    fixed_bytes = overheads.buffer_bytes + overheads.program_bytes
    return fixed_bytes + (int(place.host.process_bytes.value) if place.device.kind == "cpu" else 0)


def _pool_bytes(place: Place) -> int:
    return place.host.pool(place.device.pool_id).available_bytes


def _flash_rate(ask: _Ask, place: Place) -> float | None:
    flash = place.host.flash
    streams = place.device.can_stream and "streaming" in ask.goal.abilities
    return flash.streaming.value if flash is not None and streams else None


def _numbered(shares: Shares, n_groups: int) -> Iterator[tuple[int, TensorShare]]:
    """Number the groups of the hosts that were chosen, home's first."""
    ends = accumulate((share.n_groups for share in shares.hosts), initial=0)
    for share, (first, end) in zip(shares.hosts, pairwise(ends), strict=True):
        yield share.host, TensorShare(first_group=first, end_group=end, n_groups=n_groups)
