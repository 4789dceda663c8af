"""Settings to try, and the model counted once for each of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from devices.profile import DeviceProfile, HostProfile
from devices.topology import Topology
from partition.build_problem import Overheads
from partition.goal import Goal
from partition.language_workload import LanguageWorkload, TensorWork
from partition.manifest import CacheType
from partition.popularity import Popularity
from partition.residency import MOST_ROWS_BYTES
from partition.runtime_memory import (
    ContextShape,
    buffer_bytes,
    context_bytes,
    scratch_bytes,
    vocabulary_bytes,
)
from partition.stage_tiers import page_bytes, stage_weights, staging_bytes
from partition.units import LanguageGoal, UnitChain, Work, language_units

_FEW_DEVICES = 3
_THREADS = 16  # where nothing is known; each has a few hundred KB of attention scratch
BATCH_TOKENS = 512  # of a prompt handed over at once, unless more are computed at once
_PAGE_TABLE_SHARE = 1024  # eight bytes for a page of 4096, and most weights lie in huge ones


@dataclass(frozen=True, slots=True)
class Setting:
    """What holds for all stages of a candidate."""

    n_ubatch: int
    cache_type: CacheType


@dataclass(frozen=True, slots=True)
class Prepared:
    """A model counted for one setting.

    Attributes:
        setting: Micro-batch and KV types.
        chain: Its units, as the goal lets them be placed.
        overheads: Memory besides weights and cache for a stage that holds all of it.
    """

    setting: Setting
    chain: UnitChain
    overheads: Overheads

    @property
    def cached(self) -> bool:
        """Whether experts have a cache instead of streaming in stacks."""
        return len(self.chain.reads) > 1


def prepare(
    workload: LanguageWorkload, topology: Topology, goal: Goal, popularity: Popularity
) -> tuple[Prepared, ...]:
    """Count the model for every setting that the goal allows."""
    found = []
    n_devices = sum(len(host.devices) for host in topology.hosts)
    n_threads = most_threads(topology)
    for setting in settings(goal, few=n_devices > _FEW_DEVICES):
        chain = language_units(workload, language_goal_of(goal, setting), popularity)
        if len(topology.hosts) > 1 and "logits" not in goal.may_leave:
            chain = with_head_first(chain)
        overheads = overheads_of(workload, goal, setting, n_threads)
        found.append(Prepared(setting, without_cache(chain), overheads))
        if "expert_cache" in goal.abilities and len(chain.reads) > 1:
            found.append(Prepared(setting, chain, overheads))
    return tuple(found)


def most_threads(topology: Topology) -> int:
    """Return the most threads that compute on any processor."""
    found = [
        most_threads_of(host, device)
        for host in topology.hosts
        for device in host.devices
        if device.kind == "cpu"
    ]
    return max(found, default=1)


def most_threads_of(host: HostProfile, device: DeviceProfile) -> int:
    """Return the threads that a plan lets a processor compute with."""
    counts = [kernel.n_threads for kernel in device.kernels]
    counts += [rate.n_threads for rate in device.attention]
    known = [count for count in counts if count is not None]
    return max(known) if known else host.n_threads or host.n_cores or _THREADS


def without_cache(chain: UnitChain) -> UnitChain:
    """Return the chain for a runtime that streams stacks of experts whole."""
    units = tuple(replace(unit, weight_bytes=(unit.total_weight_bytes,)) for unit in chain.units)
    return UnitChain((1.0,), units, chain.activation_bytes)


def with_head_first(chain: UnitChain) -> UnitChain:
    """Return the chain with the output head in its first unit, which stays at home.

    Then logits never leave: the last stage sends its hidden states back to the first one.
    """
    first, head = chain.units[0], chain.units[-1]
    both = replace(
        first,
        name=f"{first.name} and {head.name}",
        weight_bytes=tuple(
            one + other for one, other in zip(first.weight_bytes, head.weight_bytes, strict=True)
        ),
        kept_bytes=first.kept_bytes + head.kept_bytes,
        lookup_bytes=first.lookup_bytes + head.lookup_bytes,
        decode=_together(first.decode, head.decode),
        prefill=_together(first.prefill, head.prefill),
        n_products=first.n_products + head.n_products,
        memory=first.memory + head.memory,
    )
    units = (both, *chain.units[1:-1])
    return replace(chain, units=units, activation_bytes=chain.activation_bytes[:-1])


def _together(one: Work, other: Work) -> Work:
    """Return the work of two units that are placed as one."""
    types = sorted({*one.flops, *other.flops, *one.read_bytes, *other.read_bytes})
    return replace(
        one,
        flops={t: one.flops.get(t, 0.0) + other.flops.get(t, 0.0) for t in types},
        read_bytes={t: one.read_bytes.get(t, 0.0) + other.read_bytes.get(t, 0.0) for t in types},
        other_flops=one.other_flops + other.other_flops,
    )


def settings(goal: Goal, *, few: bool = False) -> Iterator[Setting]:
    """List micro-batches and cache types to try; of many devices only the extremes.

    Between them little changes: a micro-batch costs memory for its buffers and saves sweeps.
    """
    sizes = [size for size in goal.ubatches if size <= goal.n_prompt] or [min(goal.ubatches)]
    sizes = list(dict.fromkeys((sizes[0], sizes[-1]))) if few else sizes
    for cache_type in goal.cache_types:
        for n_ubatch in sizes:
            yield Setting(min(n_ubatch, goal.n_ctx), cache_type)


def overheads_of(
    workload: LanguageWorkload, goal: Goal, setting: Setting, n_threads: int
) -> Overheads:
    """Count memory besides weights and cache for a stage that holds the whole model."""
    every = stage_weights(workload, 0, len(workload.run_layers), head=True)
    sizes = [tensor.size_bytes for tensor in every.whole]
    kind = setting.cache_type
    n_batch = min(max(BATCH_TOKENS, setting.n_ubatch), goal.n_ctx)
    context = ContextShape(
        goal.n_ctx, setting.n_ubatch, goal.n_logits_max, kind, kind, n_batch=n_batch
    )
    buffers = buffer_bytes(workload, context) + scratch_bytes(workload, context, n_threads)
    rows = sum(_rows_bytes(tensor, context) for tensor in every.looked_up)
    tables = sum(sizes) // _PAGE_TABLE_SHARE
    program = context_bytes(workload, context) + vocabulary_bytes(workload) + rows + tables
    return Overheads(
        buffer_bytes=buffers,
        program_bytes=program,
        staging_bytes=staging_bytes(every),
        n_tokens=min(setting.n_ubatch, goal.n_ctx),
    )


def language_goal_of(goal: Goal, setting: Setting) -> LanguageGoal:
    """Return what the model's units are counted for."""
    return LanguageGoal(
        goal.n_prompt, goal.n_ctx, setting.n_ubatch, setting.cache_type, setting.cache_type,
        n_seen=goal.n_prompt, n_decoded=1 + goal.n_drafted,
    )  # fmt: skip


def _rows_bytes(tensor: TensorWork, context: ContextShape) -> int:
    """Return the most memory that looked-up rows of a table take (edgert/weights/rows.py).

    All of a micro-batch are there at once, however many those are.
    """
    row_bytes = page_bytes(tensor.size_bytes // max(1, tensor.shape[-1]))
    at_once = min(context.n_ubatch, context.n_ctx) * row_bytes
    return min(context.n_ctx * row_bytes, max(MOST_ROWS_BYTES, at_once))
