"""What the planner writes for a model, the runtime executes: at the least memory and at plenty."""

from __future__ import annotations

from pathlib import Path

import pytest

import builders_devices as build
from edgert.deployment import placement_of
from edgert.errors import CapacityError, PlanError
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions, Placement
from partition.bind import bind
from partition.cached_tiers import cached_stage
from partition.goal import Goal
from partition.language_workload import LanguageWorkload, describe_language
from partition.manifest import Manifest, ModelFile, ModelIdentity
from partition.plan import make_plan
from partition.residency import MOST_ROWS_BYTES
from partition.stage_tiers import stage_weights
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

MOST_BYTES = 1 << 30
N_TOKENS = 32
LAYOUTS = ("plain", "scattered", "tied", "experts", "q8_0", "f16")


def planned(workload: LanguageWorkload, limit_bytes: int) -> Manifest | None:
    goal = Goal(n_prompt=16, n_ctx=256, ubatches=(32,))
    try:
        plan = make_plan(workload, build.of_any_type(limit_bytes, MOST_BYTES), goal)
    except PlanError:
        return None
    file = ModelFile(path="m.gguf", size_bytes=1, sha256="0" * 64)
    model = ModelIdentity(
        format="gguf", name="m", architecture=workload.spec.architecture,
        n_layer=len(workload.run_layers), weight_bytes=workload.weight_bytes, files=(file,),
    )  # fmt: skip
    return bind(plan, model, "test")


def least_bytes(workload: LanguageWorkload) -> int:
    """Find the least memory that the planner accepts, to 64 KB."""
    low, high = 0, MOST_BYTES
    while high - low > 1 << 16:
        middle = (low + high) // 2
        low, high = (low, middle) if planned(workload, middle) else (middle, high)
    return high


@pytest.mark.model
@pytest.mark.parametrize("layout", LAYOUTS)
def test_runtime_executes_every_plan_of_its_model(
    random_models: dict[str, Path], layout: str
) -> None:
    path = random_models[layout]
    file = open_tensor_file(path)
    workload = describe_language(file, read_model_spec(file))
    least = least_bytes(workload)
    seen = set()
    for limit_bytes in (least, least + (1 << 20), least + (4 << 20), MOST_BYTES):
        manifest = planned(workload, limit_bytes)
        assert manifest is not None
        (stage,) = manifest.stages
        seen.add((bool(stage.tiers.cached), stage.tiers.layout))
        backend = open_backend(
            LoadOptions(path, n_ctx=256, n_batch=32, n_threads=1, placement=placement_of(stage))
        )
        try:
            assert backend.decode([300, 301, 302], 0, 1).shape == (1, backend.vocab.n_tokens)
            backend.decode([303], 3, 1)
            gauges = backend.counters()
            moving_bytes = gauges.resident_weight_bytes - gauges.pinned_bytes
            assert gauges.streaming == (
                stage.tiers.layout != "repacked" or bool(stage.tiers.cached)
            )
            cache = stage.tiers.experts
            assert moving_bytes <= stage.tiers.window_bytes + (cache.cache_bytes if cache else 0)
        finally:
            backend.close()
    assert any(is_cached for is_cached, *_ in seen) == (layout == "experts")


@pytest.mark.model
def test_runtime_executes_every_cache_that_fits(random_models: dict[str, Path]) -> None:
    path = random_models["experts"]
    file = open_tensor_file(path)
    workload = describe_language(file, read_model_spec(file))
    weights = stage_weights(workload, 0, len(workload.run_layers), head=True)
    with pytest.raises(CapacityError) as caught:
        cached_stage(weights, 0, N_TOKENS, repacks=True)
    least = caught.value.needed_bytes or 0
    seen = set()
    for extra in (0, 1 << 10, 1 << 20, 3 << 20, 5 << 20, 8 << 20, 32 << 20):
        found = cached_stage(weights, least + extra, N_TOKENS, repacks=True)
        tiers = found.tiers
        seen.add((tiers.layout, bool(tiers.streamed), found.working_bytes > 0))
        placement = Placement(
            tiers.layout, frozenset(tiers.pinned), frozenset(tiers.streamed),
            frozenset(tiers.looked_up), tiers.window_bytes, frozenset(tiers.cached),
            tiers.experts.cache_bytes if tiers.experts else 0,
        )  # fmt: skip
        backend = open_backend(
            LoadOptions(path, n_ctx=256, n_batch=32, n_threads=1, placement=placement)
        )
        try:
            backend.decode([*range(300, 300 + N_TOKENS)], 0, 1)
            gauges = backend.counters()
        finally:
            backend.close()
        # Planned for tables of any offset, and for rows that are looked up.
        assert gauges.resident_weight_bytes + found.working_bytes <= least + extra + MOST_ROWS_BYTES
    assert {("file", True, True), ("file", False, False), ("repacked", False, True)} <= seen
