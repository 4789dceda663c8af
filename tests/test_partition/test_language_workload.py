"""Work of language models: bytes, operations, caches, from headers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from builders import N_EMBD, array, llama, scalar, u32
from edgert.errors import FormatError
from partition.layer_state import AttentionShape, recurrent_bytes
from quant.metadata import ValueType
from quant.model_spec import kv_bytes
from workload_builders import describe, mixture, renamed, tensor
from workload_totals import active_bytes_per_token, decode_flops, prefill_flops


def test_dense_layer_counts_two_operations_a_weight(tmp_path: Path) -> None:
    workload = describe(llama(), tmp_path)
    # q and output 64 x 64, k and v 64 x 32, three of 64 x 128, two norms of 64.
    n_weights = 2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64
    assert workload.layers[0].flops_by_type == {"f32": 2 * n_weights}
    assert workload.layers[0].active_by_type == {"f32": 4 * n_weights}
    head = 64 * 286 + 64
    assert active_bytes_per_token(workload) == 4 * (2 * n_weights + head)
    # Attention: 4 heads, keys and values of 16, two operations each: 256 a position and layer.
    assert decode_flops(workload, 100) == 2 * (2 * n_weights + head) + 2 * 256 * 100
    prompt = 3 * 4 * n_weights + 2 * head + 2 * 256 * (1 + 2 + 3)
    assert prefill_flops(workload, 3) == prompt
    assert prefill_flops(workload, 3, n_logits=3) == prompt + 2 * 2 * head


def test_one_token_of_a_prompt_costs_what_decoding_it_costs(tmp_path: Path) -> None:
    workload = describe(mixture(), tmp_path)
    assert prefill_flops(workload, 1, n_cached=41) == decode_flops(workload, 42)


def test_every_byte_of_the_file_is_in_one_place(tmp_path: Path) -> None:
    workload = describe(mixture(), tmp_path)
    parts = [workload.entrance, *workload.layers, workload.head]
    assert sum(part.weight_bytes for part in parts) == workload.weight_bytes
    for part in parts:
        assert sum(part.by_class.values()) == sum(part.by_type.values()) == part.weight_bytes


@pytest.mark.parametrize("fused", [False, True])
def test_token_pays_for_the_experts_it_uses_and_for_shared_ones(
    tmp_path: Path, fused: bool
) -> None:
    layer = describe(mixture(fused=fused), tmp_path).layers[0]
    assert layer.experts is not None
    assert (layer.experts.n_expert, layer.experts.n_used) == (8, 2)
    # Three matrices of 64 x 128 in blocks of 32 weights and 34 bytes.
    assert layer.experts.expert_bytes == 3 * 64 * 128 * 34 / 32
    assert layer.active_by_type["q8_0"] == 2 * 3 * 64 * 128 * 34 // 32
    assert layer.flops_by_type["q8_0"] == 2 * 2 * 3 * 64 * 128
    dense = 2 * 64 * 64 + 2 * 64 * 32 + 2 * 64 + 64 * 8 + 64 * 64
    assert layer.flops_by_type["f32"] == 2 * dense
    assert layer.dense_bytes == 4 * dense


def test_tied_embedding_is_multiplied_but_stored_once(tmp_path: Path) -> None:
    model = llama()
    tied = replace(model, tensors=[t for t in model.tensors if t.name != "output.weight"])
    workload = describe(tied, tmp_path)
    assert workload.head.flops_by_type == {"f32": 2 * (64 * 286 + 64)}
    assert workload.entrance.flops_by_type == {}
    assert workload.weight_bytes == sum(len(t.data) for t in tied.tensors)


def test_rows_of_lookups_cost_nothing(tmp_path: Path) -> None:
    workload = describe(llama(), tmp_path)
    assert workload.entrance.lookup_bytes == 4 * 64 * 286
    assert workload.entrance.active_by_type == {}
    assert workload.activation_bytes == 4 * N_EMBD


@pytest.mark.parametrize(("type_k", "type_v"), [("f16", "f16"), ("q8_0", "q4_0")])
def test_cache_by_layer_adds_up_to_the_cache_of_the_model(
    tmp_path: Path, type_k: str, type_v: str
) -> None:
    workload = describe(llama(), tmp_path)
    for n_ctx in (1, 256, 257, 4000):
        by_layer = sum(layer.kept_bytes(n_ctx, type_k, type_v) for layer in workload.layers)
        assert by_layer == workload.kept_bytes(n_ctx, type_k, type_v)
        assert by_layer == kv_bytes(workload.spec, n_ctx, type_k, type_v)


def test_prediction_layer_is_not_run(tmp_path: Path) -> None:
    plain = describe(llama(2), tmp_path)
    predicting = renamed(llama(3), "glm4").with_pair(u32("glm4.nextn_predict_layers", 1))
    workload = describe(predicting, tmp_path)
    assert [layer.predicts for layer in workload.layers] == [False, False, True]
    assert decode_flops(workload, 10) == decode_flops(plain, 10)


def test_window_bounds_what_is_seen_in_the_layers_that_have_one(tmp_path: Path) -> None:
    model = renamed(llama(), "gemma3").with_pair(u32("gemma3.attention.sliding_window", 8))
    flags = array("gemma3.attention.sliding_window_pattern", ValueType.BOOL, [True, False])
    workload = describe(model.with_pair(flags), tmp_path)
    windows = [layer.attention.window for layer in workload.layers if layer.attention]
    assert windows == [8, None]
    without = describe(model, tmp_path)
    assert [x.attention.window for x in without.layers if x.attention] == [None, None]
    by_number = describe(
        model.with_pair(u32("gemma3.attention.sliding_window_pattern", 2)), tmp_path
    )
    assert [x.attention.window for x in by_number.layers if x.attention] == [8, None]


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize(
    ("n_tokens", "n_cached"), [(1, 0), (5, 0), (5, 7), (8, 3), (4, 20), (0, 4)]
)
def test_attention_of_a_prompt_is_the_sum_over_its_tokens(
    window: int | None, n_tokens: int, n_cached: int
) -> None:
    shape = AttentionShape(4, 2, 16, 8, window)
    each = [shape.flops(n_cached + i + 1) for i in range(n_tokens)]
    assert shape.prompt_flops(n_tokens, n_cached) == sum(each)


def test_recurrent_layer_keeps_a_state_and_no_cache(tmp_path: Path) -> None:
    model = renamed(llama(), "qwen3next")
    for key, value in (("inner_size", 128), ("state_size", 16), ("conv_kernel", 4)):
        model = model.with_pair(u32(f"qwen3next.ssm.{key}", value))
    model = model.with_pair(u32("qwen3next.ssm.group_count", 2))
    tensors = [t for t in model.tensors if not t.name.startswith(("blk.0.attn_k", "blk.0.attn_v"))]
    tensors.append(tensor("blk.0.ssm_conv1d.weight", 4, 192))
    workload = describe(replace(model, tensors=tensors), tmp_path)
    first, second = workload.layers
    assert (first.kind, first.attention, second.kind) == ("recurrent", None, "attention")
    # Three taps of 128 + 2 x 2 x 16 channels, and 128 x 16 of state, four bytes each.
    assert first.kept_bytes(4096) == 4 * (3 * 192 + 128 * 16)
    assert recurrent_bytes({}, workload.spec) == 0


def test_model_without_layers_is_refused(tmp_path: Path) -> None:
    model = renamed(llama(), "t5")
    tensors = [replace(t, name=t.name.replace("blk.", "dec.blk.")) for t in model.tensors]
    with pytest.raises(FormatError, match=r"no tensor of a layer"):
        describe(replace(model, tensors=tensors), tmp_path)


def test_single_flag_as_window_is_ignored(tmp_path: Path) -> None:
    flag = scalar("llama.attention.sliding_window", ValueType.BOOL, True)
    layer = describe(llama().with_pair(flag), tmp_path).layers[0]
    assert layer.attention is not None
    assert layer.attention.window is None
