"""Bytes by layer and class, and the split for a budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partition.workload import Workload, describe_workload, split_for_budget, tensor_class
from quant.formats import GgmlType
from quant.tensor_file import TensorEntry


def entry(name: str, size_bytes: int) -> TensorEntry:
    return TensorEntry(name, GgmlType.F32, (size_bytes // 4,), 0, 0, size_bytes)


def model(*layer_sizes: int, outside: int = 100) -> Workload:
    tensors = [entry("token_embd.weight", outside)] if outside else []
    tensors += [entry(f"blk.{i}.ffn_up.weight", size) for i, size in enumerate(layer_sizes)]
    return describe_workload(tensors)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "embedding"),
        ("output.weight", "output"),
        ("output_norm.weight", "norm"),
        ("blk.3.attn_q.weight", "attention"),
        ("blk.3.attn_norm.weight", "norm"),
        ("blk.3.attn_k_norm.weight", "norm"),
        ("blk.3.ffn_down.weight", "feed_forward"),
        ("blk.3.ffn_gate_inp.weight", "feed_forward"),
        ("blk.3.ffn_down_shexp.weight", "feed_forward"),
        ("blk.3.ffn_gate_up_exps.weight", "experts"),
        ("blk.3.ssm_in.weight", "other"),
        ("rope_freqs.weight", "other"),
    ],
)
def test_tensor_class_follows_the_name(name: str, expected: str) -> None:
    assert tensor_class(name) == expected


def test_bytes_are_counted_by_layer_class_and_format() -> None:
    workload = describe_workload(
        [
            entry("blk.1.attn_q.weight", 40),
            entry("blk.0.attn_q.weight", 40),
            entry("blk.0.attn_k.weight", 20),
            entry("blk.0.ffn_norm.weight", 4),
            entry("output.weight", 12),
        ]
    )
    assert [layer.layer_index for layer in workload.layers] == [0, 1]
    assert workload.layers[0].by_class == {"attention": 60, "norm": 4}
    assert workload.outside == {"output": 12}
    assert workload.by_type == {"f32": 116}
    assert (workload.weight_bytes, workload.n_parameters) == (116, 29)


def test_everything_fits_when_there_is_room() -> None:
    split = split_for_budget(model(400, 400), 900)
    assert (split.fits, split.n_pinned_layers, split.streamed_bytes) == (True, 2, 0)


def test_layers_beside_a_window_of_two_are_pinned() -> None:
    # 100 outside + a window of 2 x 400 leave 1000 - 900 = 100: nothing; 400 more pins one.
    split = split_for_budget(model(400, 400, 400, 400), 1300)
    assert (split.fits, split.n_pinned_layers, split.window_bytes) == (False, 1, 800)
    assert (split.pinned_bytes, split.streamed_bytes, split.missing_bytes) == (500, 1200, 0)


def test_embedding_beside_an_output_is_read_by_rows() -> None:
    layers = [entry(f"blk.{i}.ffn_up.weight", 400) for i in range(4)]
    ends = [entry("token_embd.weight", 600), entry("output.weight", 100)]
    split = split_for_budget(describe_workload([*layers, *ends]), 1300)
    assert (split.pinned_bytes, split.streamed_bytes) == (500, 1200)


def test_too_little_room_says_how_much_is_missing() -> None:
    assert split_for_budget(model(400, 400, 400), 700).missing_bytes == 200
    assert split_for_budget(model(400, 400, 400), -50).missing_bytes == 950


@given(st.lists(st.integers(1, 50).map(lambda n: 4 * n), max_size=12), st.integers(-100, 3000))
def test_split_covers_every_byte_once_and_stays_in_the_room(
    sizes: list[int], room_bytes: int
) -> None:
    workload = model(*sizes)
    split = split_for_budget(workload, room_bytes)
    assert split.pinned_bytes + split.streamed_bytes == workload.weight_bytes
    if not split.missing_bytes:
        assert split.pinned_bytes + split.window_bytes <= room_bytes
    assert split.fits == (workload.weight_bytes <= room_bytes)
