"""A placement from a manifest: obeyed to the tensor, or refused with the reason."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest

from edgert.errors import CapacityError, PlanError
from edgert.experts.loads import N_EARLY, N_URGENT
from edgert.llama import open as opening
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions, Placement
from edgert.weights.budget import Footprint
from partition.expert_slots import N_LOADERS
from quant.tensor_file import open_tensor_file

pytestmark = pytest.mark.model
TOKENS = list(range(300, 316))
WINDOW_BYTES = 2 << 20


def names(path: Path) -> frozenset[str]:
    return frozenset(entry.name for entry in open_tensor_file(path).tensors)


def stream_layer(path: Path, layer: int) -> Placement:
    """Return a placement that streams the matrices of one layer and pins the rest."""
    every = names(path)
    streamed = frozenset(n for n in every if n.startswith(f"blk.{layer}.") and "norm" not in n)
    looked_up = frozenset({"token_embd.weight"})
    return Placement("file", every - streamed - looked_up, streamed, looked_up, WINDOW_BYTES)


def options(path: Path, placement: Placement | None) -> LoadOptions:
    return LoadOptions(path, n_ctx=256, n_batch=32, n_threads=1, placement=placement)


def logits(path: Path, placement: Placement | None) -> bytes:
    backend = open_backend(options(path, placement))
    try:
        found = backend.decode(TOKENS, 0, 1)
        return np.asarray(found).tobytes()
    finally:
        backend.close()


def test_exactly_the_named_weights_stream(random_models: dict[str, Path]) -> None:
    path = random_models["plain"]
    placement = stream_layer(path, 2)
    backend = open_backend(options(path, placement))
    try:
        backend.decode(TOKENS, 0, 1)
        first = backend.counters().bytes_read
        backend.decode([400], len(TOKENS), 1)
        read = backend.counters().bytes_read - first
        gauges = backend.counters()
    finally:
        backend.close()
    sizes = {entry.name: entry.size_bytes for entry in open_tensor_file(path).tensors}
    rows = 2 * 4096  # one looked-up row
    assert sum(sizes[name] for name in placement.streamed) <= read
    assert read <= sum(sizes[name] for name in placement.streamed) + rows
    assert gauges.streaming
    assert gauges.resident_weight_bytes - gauges.pinned_bytes == WINDOW_BYTES


def test_placed_logits_equal_those_of_a_budget(random_models: dict[str, Path]) -> None:
    path = random_models["plain"]
    streaming = open_backend(
        LoadOptions(path, n_ctx=256, n_batch=32, n_threads=1, weight_memory_bytes=12 << 20)
    )
    expected = np.asarray(streaming.decode(TOKENS, 0, 1)).tobytes()
    streaming.close()
    assert logits(path, stream_layer(path, 1)) == expected
    assert logits(path, stream_layer(path, 3)) == expected


def test_repacked_placement_equals_a_resident_model(random_models: dict[str, Path]) -> None:
    path = random_models["plain"]
    assert logits(path, Placement("repacked", names(path))) == logits(path, None)


def test_weight_without_a_place_is_refused_by_name(random_models: dict[str, Path]) -> None:
    path = random_models["plain"]
    placement = stream_layer(path, 2)
    missing = replace(placement, pinned=placement.pinned - {"blk.0.attn_q.weight"})
    with pytest.raises(PlanError, match=r"blk\.0\.attn_q\.weight is neither pinned nor streamed"):
        open_backend(options(path, missing))


def test_repacked_placement_must_pin_everything(random_models: dict[str, Path]) -> None:
    path = random_models["plain"]
    placement = Placement("repacked", names(path) - {"blk.3.ffn_up.weight"})
    with pytest.raises(PlanError, match=r"blk\.3\.ffn_up\.weight is not pinned"):
        open_backend(options(path, placement))


def test_looked_up_weight_that_is_read_whole_is_refused(random_models: dict[str, Path]) -> None:
    path = random_models["tied"]
    with pytest.raises(PlanError, match=r"token_embd\.weight is neither pinned nor streamed"):
        open_backend(options(path, stream_layer(path, 2)))


def test_window_too_small_for_the_graph_is_refused(random_models: dict[str, Path]) -> None:
    path = random_models["plain"]
    placement = replace(stream_layer(path, 2), window_bytes=4096)
    with pytest.raises(PlanError, match="a window of 4,096 bytes, the graph needs"):
        open_backend(options(path, placement))


def test_buffers_that_a_manifest_understates_count_as_llama_cpp_has_them(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_models["plain"]
    needed: list[int | None] = []
    for buffer_bytes in (0, 1 << 16, 64 << 20):
        placement = replace(stream_layer(path, 2), buffer_bytes=buffer_bytes)
        asked = replace(options(path, placement), memory_bytes=2 << 30)
        monkeypatch.setattr(opening, "footprint", lambda: Footprint(2 << 30, 0))
        with pytest.raises(CapacityError) as caught:
            open_backend(asked)
        needed.append(caught.value.needed_bytes)
    nothing, little, much = needed
    assert nothing == little
    assert nothing is not None
    assert much is not None
    assert much > nothing > 2 << 30


def test_placement_beyond_the_bound_of_the_process_is_refused(
    random_models: dict[str, Path],
) -> None:
    path = random_models["plain"]
    bounded = replace(options(path, stream_layer(path, 2)), memory_bytes=10 << 20)
    with pytest.raises(CapacityError) as caught:
        open_backend(bounded)
    assert caught.value.needed_bytes is not None


@pytest.mark.parametrize("tier", ["pinned", "streamed"])
def test_weight_of_which_rows_are_looked_up_has_no_other_place(
    random_models: dict[str, Path], tier: str
) -> None:
    path = random_models["plain"]
    placement = replace(stream_layer(path, 2), looked_up=frozenset())
    table = frozenset({"token_embd.weight"})
    placed = replace(placement, **{tier: getattr(placement, tier) | table})
    with pytest.raises(PlanError, match=r"token_embd\.weight is pinned or streamed"):
        open_backend(options(path, placed))


def test_stream_of_a_weight_that_nothing_reads_is_refused(random_models: dict[str, Path]) -> None:
    path = random_models["plain"]
    placement = stream_layer(path, 2)
    more = replace(placement, streamed=placement.streamed | {"blk.9.unknown"})
    with pytest.raises(PlanError, match=r"blk\.9\.unknown is to stream, but"):
        open_backend(options(path, more))


def test_context_of_another_size_than_was_decided_is_refused(
    random_models: dict[str, Path],
) -> None:
    path = random_models["plain"]
    asked = replace(options(path, stream_layer(path, 2)), n_ctx=100)
    with pytest.raises(PlanError, match=r"a context of 100 positions, llama\.cpp makes one of 256"):
        open_backend(asked)


def stacks(path: Path) -> frozenset[str]:
    return frozenset(name for name in names(path) if "_exps" in name)


def matrix_bytes(path: Path) -> int:
    """One expert of a stack; all stacks of the model are of one length."""
    (size,) = {
        e.size_bytes // e.shape[-1] for e in open_tensor_file(path).tensors if "_exps" in e.name
    }
    return size


def cached(path: Path, layout: Literal["file", "repacked"], n_slots: int) -> Placement:
    """Return a placement that caches all experts in so many slots and pins the rest."""
    looked_up = frozenset({"token_embd.weight"})
    return Placement(
        layout, names(path) - stacks(path) - looked_up, looked_up=looked_up, cached=stacks(path),
        cache_bytes=n_slots * (matrix_bytes(path) + (4096 if layout == "file" else 0)),
    )  # fmt: skip


LEAST_SLOTS = 6  # two experts of each of three stacks


def in_memory(path: Path, layout: Literal["file", "repacked"]) -> bytes:
    if layout == "repacked":
        return logits(path, Placement("repacked", names(path)))
    looked_up = frozenset({"token_embd.weight"})
    return logits(path, Placement("file", names(path) - looked_up, looked_up=looked_up))


@pytest.mark.parametrize("layout", ["file", "repacked"])
@pytest.mark.parametrize("n_slots", [LEAST_SLOTS, 24, 96])
def test_cached_experts_compute_what_they_do_in_memory(
    random_models: dict[str, Path], layout: Literal["file", "repacked"], n_slots: int
) -> None:
    path = random_models["experts"]
    assert matrix_bytes(path) % 4096 == 0
    assert logits(path, cached(path, layout, n_slots)) == in_memory(path, layout)


@pytest.mark.parametrize("layout", ["file", "repacked"])
def test_cache_takes_what_the_placement_gives_and_no_more(
    random_models: dict[str, Path], layout: Literal["file", "repacked"]
) -> None:
    path = random_models["experts"]
    placement = replace(
        cached(path, layout, 11), cache_bytes=cached(path, layout, 11).cache_bytes + 9
    )
    backend = open_backend(options(path, placement))
    try:
        backend.decode(TOKENS, 0, 1)
        gauges = backend.counters()
    finally:
        backend.close()
    assert gauges.layout == layout
    assert gauges.resident_weight_bytes - gauges.pinned_bytes == placement.cache_bytes - 9


@pytest.mark.parametrize("layout", ["file", "repacked"])
def test_stacks_that_are_pinned_stay_beside_cached_ones(
    random_models: dict[str, Path], layout: Literal["file", "repacked"]
) -> None:
    path = random_models["experts"]
    some = frozenset({"blk.1.ffn_up_exps.weight", *(n for n in stacks(path) if "blk.3." in n)})
    placement = cached(path, layout, LEAST_SLOTS)
    mixed = replace(placement, pinned=placement.pinned | some, cached=placement.cached - some)
    sizes = {entry.name: entry.size_bytes for entry in open_tensor_file(path).tensors}
    held = []
    for one in (placement, mixed):
        backend = open_backend(options(path, one))
        held.append(backend.counters().pinned_bytes)
        backend.close()
    assert held[1] - held[0] >= sum(sizes[name] for name in some)
    assert logits(path, mixed) == in_memory(path, layout)


def test_weights_stream_beside_cached_experts(random_models: dict[str, Path]) -> None:
    path = random_models["experts"]
    placement = cached(path, "file", LEAST_SLOTS)
    streamed = frozenset(
        n for n in placement.pinned if n.startswith("blk.") and n.endswith(("q.weight", "k.weight"))
    )
    beside = replace(
        placement, pinned=placement.pinned - streamed, streamed=streamed, window_bytes=WINDOW_BYTES
    )
    assert logits(path, beside) == in_memory(path, "file")


def without(placement: Placement, name: str) -> Placement:
    return replace(placement, pinned=placement.pinned - {name}, cached=placement.cached - {name})


STACK, QUERY = "blk.1.ffn_up_exps.weight", "blk.1.attn_q.weight"
REFUSED: dict[str, tuple[Callable[[Placement], Placement], str]] = {
    "a cached weight that is not routed": (
        lambda p: replace(without(p, QUERY), cached=p.cached | {QUERY}),
        rf"{QUERY} is to be cached, but the graph does not route",
    ),
    "a cached weight that is none": (
        lambda p: replace(p, cached=p.cached | {"blk.9.none"}), r"blk\.9\.none is to be cached",
    ),
    "a routed weight without a place": (
        lambda p: without(p, STACK), rf"{STACK} is neither pinned nor streamed nor cached",
    ),
    "a dense weight without a place": (
        lambda p: without(p, QUERY), rf"{QUERY} is neither pinned nor streamed nor cached",
    ),
    "a routed weight that streams": (
        lambda p: replace(without(p, STACK), streamed=frozenset({STACK}), window_bytes=8 << 20),
        rf"{STACK} is routed to and streams",
    ),
    "a cache too small for one token": (
        lambda p: replace(p, cache_bytes=p.cache_bytes - 1), "one token's experts need",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", ["file", "repacked"])
@pytest.mark.parametrize("what", REFUSED)
def test_cache_that_the_graph_does_not_allow_is_refused(
    random_models: dict[str, Path], layout: Literal["file", "repacked"], what: str
) -> None:
    path = random_models["experts"]
    change, reason = REFUSED[what]
    placement = cached(path, layout, LEAST_SLOTS)
    with pytest.raises(PlanError, match=reason):
        open_backend(options(path, change(placement)))
    if "too small" in what:
        with pytest.raises(PlanError, match=f"need {placement.cache_bytes:,}"):
            open_backend(options(path, change(placement)))


def test_repacked_weights_do_not_stream_beside_a_cache(random_models: dict[str, Path]) -> None:
    path = random_models["experts"]
    placement = without(cached(path, "repacked", LEAST_SLOTS), QUERY)
    streaming = replace(placement, streamed=frozenset({QUERY}), window_bytes=WINDOW_BYTES)
    with pytest.raises(PlanError, match=f"{QUERY} is to stream; repacked weights do not"):
        open_backend(options(path, streaming))


def test_cache_beyond_the_bound_of_the_process_is_refused(
    random_models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = random_models["experts"]
    huge = replace(cached(path, "repacked", 96), cache_bytes=1 << 40)
    open_backend(options(path, huge)).close()  # no more than there are experts
    monkeypatch.setattr(opening, "footprint", lambda: Footprint(2 << 30, 0))
    with pytest.raises(CapacityError, match="the manifest's weights take") as caught:
        open_backend(replace(options(path, huge), memory_bytes=2 << 30))
    cache_bytes = cached(path, "repacked", 96).cache_bytes
    assert (caught.value.needed_bytes or 0) - (2 << 30) > cache_bytes


def test_planner_and_runtime_bring_experts_with_as_many_threads() -> None:
    assert N_URGENT + N_EARLY == N_LOADERS
