"""Replaying llama.cpp's graph allocator: by hand on small graphs, against the real one by size."""

from __future__ import annotations

from dataclasses import replace

import pytest

from partition.graph_memory import GraphRun, GraphShape, graph_bytes

# One of scripts/make_model.py's shapes: 7b.
LARGE = GraphShape(
    n_layer=32, n_embd=4096, n_head=32, q_width=4096, k_width=4096, v_width=4096, out_width=4096,
    ff_width=11008, gated=True, n_expert=0, n_expert_used=0, expert_width=0, n_vocab=32000,
)  # fmt: skip
MIXTURE = replace(
    LARGE, n_embd=2048, q_width=4096, k_width=512, v_width=512, out_width=4096, ff_width=0,
    n_expert=128, n_expert_used=8, expert_width=768, n_vocab=151936, n_layer=48,
)  # fmt: skip


def test_dense_layer_by_hand() -> None:
    # Unused embeddings, residual, hole of the norm and the normed state, each of 4096; then gate,
    # up and their product, each of 11008. Inputs: ids, positions, two cell indices, the mask.
    tokens = 512
    inputs = tokens * (4 + 4 + 8 + 8) + 2 * 4096 * tokens + 32
    alive = 4 * tokens * (4 * 4096 + 3 * 11008)
    assert graph_bytes(LARGE, GraphRun(4096, tokens, 1)) == inputs + alive


@pytest.mark.parametrize(
    ("shape", "run", "logged_mib"),
    [
        # "CPU compute buffer size", llama.cpp of llama-cpp-python 0.3.36.
        (LARGE, GraphRun(512, 32, 1), 6.0633),
        (LARGE, GraphRun(4096, 512, 1), 100.5117),
        (replace(LARGE, k_rotation=128, v_rotation=64), GraphRun(4096, 512, 1), 92.5899),
        (MIXTURE, GraphRun(512, 512, 1), 88.5117),
        (replace(MIXTURE, k_rotation=128, v_rotation=64), GraphRun(4096, 32, 1), 5.8289),
    ],
)
def test_sizes_are_those_llama_logs(shape: GraphShape, run: GraphRun, logged_mib: float) -> None:
    assert graph_bytes(shape, run) == pytest.approx(logged_mib * 2**20, abs=60)


@pytest.mark.parametrize("shape", [LARGE, MIXTURE])
@pytest.mark.parametrize(
    "more",
    [GraphRun(8192, 256, 8), GraphRun(4096, 512, 8), GraphRun(4096, 256, 200)],
)
def test_more_of_anything_never_takes_less(shape: GraphShape, more: GraphRun) -> None:
    assert graph_bytes(shape, more) >= graph_bytes(shape, GraphRun(4096, 256, 8))


def test_scores_cost_without_flash_attention() -> None:
    run = GraphRun(4096, 512, 1)
    more = graph_bytes(LARGE, replace(run, flash_attention=False)) - graph_bytes(LARGE, run)
    assert more > 4 * 512 * 4096 * 32 - 4 * 512 * 3 * 11008
