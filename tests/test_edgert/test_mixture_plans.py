"""Plans of every kind of mixture can be executed, and change no bit of any logit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from edgert.errors import CapacityError
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions, Placement
from moe_models import deepseek2, gpt_oss, grovemoe, mixtral, qwen2moe, write_mixture
from native import run, stock_logits
from partition.cached_tiers import cached_stage
from partition.language_workload import LanguageWorkload, describe_language
from partition.manifest import Tiers
from partition.stage_tiers import stage_weights
from quant.model_spec import read_model_spec
from quant.tensor_file import open_tensor_file

pytestmark = pytest.mark.model
N_TOKENS = 32
MIXTURES = {
    "mixtral": mixtral(),
    "qwen2moe": qwen2moe(),
    "gpt-oss": gpt_oss(),
    "deepseek2": deepseek2(),
    "deepseek2 fused": replace(deepseek2(), fused=True),
}


def described(path: Path) -> LanguageWorkload:
    file = open_tensor_file(path)
    return describe_language(file, read_model_spec(file))


def executed(path: Path, tiers: Tiers) -> list[bytes]:
    placement = Placement(
        tiers.layout, frozenset(tiers.pinned), frozenset(tiers.streamed),
        frozenset(tiers.looked_up), tiers.window_bytes, frozenset(tiers.cached),
        tiers.experts.cache_bytes if tiers.experts else 0,
    )  # fmt: skip
    options = LoadOptions(path, n_ctx=256, n_batch=N_TOKENS, n_threads=1, placement=placement)
    backend = open_backend(options)
    try:
        return run(lambda tokens, position: backend.decode(tokens, position, 1)[0])
    finally:
        backend.close()


@pytest.mark.parametrize("name", MIXTURES)
def test_caches_of_a_plan_change_no_bit(name: str, tmp_path: Path) -> None:
    path = write_mixture(MIXTURES[name], tmp_path / "model.gguf")
    workload = described(path)
    weights = stage_weights(workload, 0, len(workload.run_layers), head=True)
    with pytest.raises(CapacityError) as caught:
        cached_stage(weights, 0, N_TOKENS, repacks=True)
    least = caught.value.needed_bytes or 0
    wanted = stock_logits(path)
    layouts = set()
    for extra in (0, 2 << 20):
        tiers = cached_stage(weights, least + extra, N_TOKENS, repacks=True).tiers
        layouts.add(tiers.layout)
        assert all(".weight" in stack and "_exps" in stack for stack in tiers.cached)
        assert executed(path, tiers) == wanted
    assert layouts == {"file", "repacked"}


def test_experts_that_cannot_be_told_apart_are_planned_whole(tmp_path: Path) -> None:
    workload = described(write_mixture(grovemoe(), tmp_path / "model.gguf"))
    tensors = [tensor for layer in workload.run_layers for tensor in layer.tensors]
    assert {tensor.role for tensor in tensors} == {"every_token"}
    (down,) = (t for t in tensors if t.name == "blk.0.ffn_down_exps.weight")
    assert down.active_bytes == down.size_bytes // 4
