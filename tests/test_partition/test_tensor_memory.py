"""What shares of every layer take of memory: what is found to fit can be cut, to the byte."""

from __future__ import annotations

from dataclasses import replace

import pytest

from builders_plan import BOARD, MB, PI, limited, workload
from builders_tensor import GOAL, boards, refused, shared, star
from devices.catalog import known_host
from devices.profile import HostProfile
from devices.topology import Topology
from partition.build_problem import Overheads, Place
from partition.goal import Goal
from partition.manifest import TensorShare
from partition.popularity import Popularity
from partition.settings import settings
from partition.stage_tiers import can_stream, page_bytes
from partition.tensor_memory import of_each_kind, share_bytes
from partition.tensor_problem import (
    Ask,
    overheads_at,
    pool_bytes,
    share_places,
    share_problem,
)
from partition.tensor_split import HeadPart, Part, share_groups, split_workload

GPU_HOST = "desktop-rtx-3060-12gb"


def ask_for(shape: str, topology: Topology, *, by_rows: bool = False, goal: Goal = GOAL) -> Ask:
    (setting,) = settings(goal)
    return Ask(workload(shape), topology, goal, setting, Popularity(), by_rows)


def limits_of(ask: Ask, counts: tuple[int, int], *, streaming: bool = True) -> list[int]:
    """Return the least memory in which two hosts hold so many groups, by the search."""
    chain = ask.chain(ask.workload)
    places = share_places(ask, chain)
    problem = share_problem(ask, chain, places)
    found = []
    for place, host, n in zip(places, problem.hosts, counts, strict=True):
        size = host.sizes[n - 1]
        least = size.floor_bytes + size.window_bytes
        weights = min(size.weight_bytes, least) if streaming else size.weight_bytes
        other = pool_bytes(place) - host.capacity_bytes + n * problem.group_kv_bytes
        found.append(int(other + weights))
    return found


@pytest.mark.parametrize("by_rows", [False, True])
@pytest.mark.parametrize("n_home", [1, 7, 16, 31])
def test_search_of_shares_finds_to_fit_exactly_what_can_be_cut(n_home: int, by_rows: bool) -> None:
    goal = replace(GOAL, may_leave=("hidden_states", "logits")) if by_rows else GOAL
    counts = (n_home, 32 - n_home)
    limits = limits_of(ask_for("7b", boards(2), by_rows=by_rows, goal=goal), counts)

    def of(*sizes: int) -> Topology:
        return star([limited(BOARD, size, f"board{i}") for i, size in enumerate(sizes)])

    found = shared("7b", of(*limits), goal)
    shares = [stage.share for stage in found.stages if stage.share is not None]
    assert tuple(share.end_group - share.first_group for share in shares) == counts
    assert [stage.head for stage in found.stages] == [True, by_rows]
    for stage, limit in zip(found.stages, limits, strict=True):
        assert stage.tiers.streamed
        assert stage.peak_bytes <= limit
    for less in ((limits[0] - 1, limits[1]), (limits[0], limits[1] - 1)):
        assert "no hosts hold all KV-head groups" in refused(workload("7b"), of(*less), goal)


@pytest.mark.parametrize("head", ["none", "whole", "rows"])
@pytest.mark.parametrize("shape", ["1b", "7b"])
def test_sizes_are_those_of_the_largest_share_of_so_many_groups(shape: str, head: HeadPart) -> None:
    model = workload(shape)
    n_groups = share_groups(model)
    sizes = share_bytes(model, entrance=head != "none", head=head)
    assert len(sizes) == n_groups
    for n_own in {1, 3, n_groups}:
        least, whole = 0, 0
        for first in range(0, n_groups - n_own + 1, 5):
            share = TensorShare(first_group=first, end_group=first + n_own, n_groups=n_groups)
            part = split_workload(model, Part(share, entrance=head != "none", head=head))
            tensors = [t for layer in (*part.run_layers, part.head) for t in layer.tensors]
            stays = sum(page_bytes(t.size_bytes) for t in tensors if not can_stream(t))
            passing = sorted(page_bytes(t.size_bytes) for t in tensors if can_stream(t))
            whole = max(whole, stays + sum(passing))
            least = max(least, stays + sum(passing[-2:]))
        size = sizes[n_own - 1]
        assert size.weight_bytes >= whole
        assert size.weight_bytes == pytest.approx(whole, rel=1e-3)
        assert size.floor_bytes + size.window_bytes >= least
        assert size.floor_bytes + size.window_bytes == pytest.approx(least, rel=1e-3)


def threaded(name: str, host_id: str, n_threads: int) -> HostProfile:
    host = known_host(name, host_id)
    device = next(device for device in host.devices if device.kind == "cpu")
    kernels = tuple(k.model_copy(update={"n_threads": n_threads}) for k in device.kernels)
    only = device.model_copy(update={"kernels": kernels, "attention": ()})
    others = tuple(device for device in host.devices if device.kind != "cpu")
    return host.model_copy(update={"devices": (only, *others)})


def overheads(host: HostProfile, kind: str = "cpu") -> Overheads:
    other = threaded(PI, "other", 128)
    device = next(device for device in host.devices if device.kind == kind)
    ask = ask_for("7b", star([host, other]))
    return overheads_at(ask, Place(host, device), ask.workload)


def test_scratch_of_a_share_is_that_of_its_own_hosts_threads() -> None:
    one, few, many = (overheads(threaded(PI, "home", n)).buffer_bytes for n in (1, 2, 64))
    # Tiles of 64 rows and 64 cells for keys and values of 128, and their scores.
    tiles = 4 * (128 * (128 + 128) + 2 * 64 * 64)
    assert one == few  # a product's activations take more, whatever other hosts have
    assert many - one > 50 * tiles
    graphics = [overheads(threaded(GPU_HOST, "home", n), "gpu").buffer_bytes for n in (1, 64)]
    assert graphics == [one, many]


def with_pools(host_id: str, **available_bytes: int) -> HostProfile:
    host = known_host(GPU_HOST, host_id)
    pools = tuple(
        pool.model_copy(update={"available_bytes": available_bytes[pool.pool_id]})
        if pool.pool_id in available_bytes
        else pool
        for pool in host.pools
    )
    return host.model_copy(update={"pools": pools})


def test_a_shared_graphics_stage_takes_its_program_from_the_host() -> None:
    ask = ask_for("7b", star([with_pools("a"), with_pools("b")]))
    # Nothing streams there: all weights of 16 groups.
    limits = limits_of(ask, (16, 16), streaming=False)
    hosts = [
        with_pools(name, ram=1000 * MB, vram0=limit)
        for name, limit in zip("ab", limits, strict=True)
    ]
    for stage in shared("7b", star(hosts)).stages:
        assert stage.place.device.kind == "gpu"
        assert stage.host_bytes > stage.place.host.process_bytes.value
        assert stage.fixed_bytes == stage.host_bytes + stage.buffer_bytes
        own_bytes = stage.place.host.pool("vram0").available_bytes
        assert stage.peak_bytes - stage.host_bytes <= own_bytes < stage.peak_bytes
    poor = ask_for("7b", star([with_pools("a"), with_pools("b", ram=50 * MB)]))
    places = share_places(poor, poor.chain(poor.workload))
    assert [place.name for place in places] == ["a/gpu0", "b/cpu"]


def test_few_layers_have_the_buffers_of_all() -> None:
    ask = ask_for("7b", boards(2))
    (place, _) = share_places(ask, ask.chain(ask.workload))
    few = of_each_kind(ask.workload)
    assert len(few.layers) < len(ask.workload.layers)
    for n_own in (1, 5, 31):
        part = Part(TensorShare(first_group=0, end_group=n_own, n_groups=32), True, "whole")
        one, other = (
            overheads_at(ask, place, split_workload(model, part)).buffer_bytes
            for model in (few, ask.workload)
        )
        assert one == other
