"""Bytes by layer and class, and the split for a budget."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partition.residency import choose_residency
from partition.workload import (
    Workload,
    describe_workload,
    page_bytes,
    split_for_budget,
    tensor_class,
)
from quant.formats import GgmlType
from quant.tensor_file import TensorEntry

MB = 10**6


def entry(name: str, size_mb: int) -> TensorEntry:
    return TensorEntry(name, GgmlType.F32, (1000, size_mb * 250), 0, 0, size_mb * MB)


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
    assert workload.layers[0].by_class == {"attention": 60 * MB, "norm": 4 * MB}
    assert workload.outside == {"output": 12 * MB}
    assert workload.by_type == {"f32": 116 * MB}
    assert (workload.weight_bytes, workload.n_parameters) == (116 * MB, 29 * MB)


def test_everything_fits_when_there_is_room() -> None:
    split = split_for_budget(model(400, 400), 900 * MB)
    assert (split.fits, split.n_pinned_layers, split.streamed_bytes) == (True, 2, 0)


def test_layers_beside_a_window_of_two_are_pinned() -> None:
    # 2 MB outside, a window of 2 x 4 MB and an eighth of all to read ahead: 5 MB are left.
    split = split_for_budget(model(4, 4, 4, 4, outside=2), 17 * MB)
    assert (split.fits, split.n_pinned_layers, split.missing_bytes) == (False, 1, 0)
    assert split.window_bytes >= 2 * page_bytes(4 * MB)
    assert split.pinned_bytes == page_bytes(2 * MB) + page_bytes(4 * MB)
    assert split.streamed_bytes == 3 * page_bytes(4 * MB)


def test_split_is_what_the_runtime_would_choose() -> None:
    workload = model(9, 4, 7, 4, 6, 4, outside=3)
    residency = choose_residency(workload.items, 25 * MB)
    split = split_for_budget(workload, 25 * MB)
    assert (split.pinned_bytes, split.window_bytes) == (
        residency.pinned_bytes,
        residency.ring_bytes,
    )


def test_embedding_beside_an_output_is_read_by_rows() -> None:
    layers = [entry(f"blk.{i}.ffn_up.weight", 4) for i in range(4)]
    ends = [entry("token_embd.weight", 600), entry("output.weight", 2)]
    split = split_for_budget(describe_workload([*layers, *ends]), 17 * MB)
    assert split.pinned_bytes == page_bytes(2 * MB) + page_bytes(4 * MB)


def test_vectors_stay() -> None:
    vector = TensorEntry("blk.0.attn_norm.weight", GgmlType.F32, (MB,), 0, 0, 4 * MB)
    workload = describe_workload([vector, *(entry(f"blk.{i}.ffn_up.weight", 4) for i in range(4))])
    assert split_for_budget(workload, 13 * MB).pinned_bytes == page_bytes(4 * MB)


def test_too_little_room_says_how_much_is_missing() -> None:
    least = 2 * page_bytes(4 * MB)
    assert split_for_budget(model(4, 4, 4, outside=0), 7 * MB).missing_bytes == least - 7 * MB
    assert split_for_budget(model(4, 4, 4, outside=0), -50).missing_bytes == least + 50


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(-100, 3000))
def test_split_covers_every_byte_once_and_stays_in_the_room(sizes: list[int], room_mb: int) -> None:
    workload = model(*sizes)
    split = split_for_budget(workload, room_mb * MB)
    covered = split.pinned_bytes + split.streamed_bytes
    assert covered in (workload.weight_bytes, sum(item.size_bytes for item in workload.items))
    if not split.missing_bytes:
        assert split.pinned_bytes + split.window_bytes <= room_mb * MB
    assert split.fits == (not split.streamed_bytes and not split.missing_bytes)
