"""Units of language models: every byte in one class, phases consistent with the workload."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from builders import llama
from edgert.errors import ConfigError
from partition.popularity import Popularity
from partition.units import LanguageGoal, language_units
from workload_builders import describe, mixture
from workload_totals import active_bytes_per_token, decode_flops, prefill_flops

GOAL = LanguageGoal(n_prompt=600, n_ctx=1000, n_ubatch=256)
POPULARITIES = [Popularity(zipf_exponent=exponent) for exponent in (0.0, 0.5, 1.2)]


def test_layers_come_first_and_the_head_last(tmp_path: Path) -> None:
    chain = language_units(describe(llama(), tmp_path), GOAL, Popularity())
    assert [unit.name for unit in chain.units] == ["layer 0", "layer 1", "output"]
    assert [unit.layer for unit in chain.units] == [0, 1, None]
    assert chain.reads == (1.0,)
    assert chain.activation_bytes == (256, 256, 0)
    assert [unit.lookup_bytes for unit in chain.units] == [4 * 64 * 286, 0, 0]
    assert [unit.n_products for unit in chain.units] == [7, 7, 1]


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_classes_hold_every_byte_and_every_read(tmp_path: Path, popularity: Popularity) -> None:
    workload = describe(mixture(), tmp_path)
    chain = language_units(workload, GOAL, popularity)
    assert list(chain.reads) == sorted(chain.reads, reverse=True)
    assert len(chain.reads) <= 13
    stored = sum(unit.total_weight_bytes + unit.lookup_bytes for unit in chain.units)
    assert stored == pytest.approx(workload.weight_bytes)
    read = sum(
        share * size
        for unit in chain.units
        for share, size in zip(chain.reads, unit.weight_bytes, strict=True)
    )
    assert read == pytest.approx(active_bytes_per_token(workload))


@pytest.mark.parametrize("popularity", POPULARITIES)
def test_phases_add_up_to_those_of_the_model(tmp_path: Path, popularity: Popularity) -> None:
    workload = describe(mixture(), tmp_path)
    units = language_units(workload, GOAL, popularity).units
    decode = sum(unit.decode.total_flops for unit in units)
    assert decode == decode_flops(workload, GOAL.n_ctx)
    assert sum(unit.prefill.total_flops for unit in units) == prefill_flops(workload, 600)
    read = sum(sum(unit.decode.read_bytes.values()) for unit in units)
    assert read == pytest.approx(active_bytes_per_token(workload))
    assert sum(unit.kept_bytes for unit in units) == workload.kept_bytes(GOAL.n_ctx)


def test_prompt_goes_over_the_weights_once_a_micro_batch(tmp_path: Path) -> None:
    chain = language_units(describe(llama(), tmp_path), GOAL, Popularity())
    first, head = chain.units[0].prefill, chain.units[-1].prefill
    assert (first.n_tokens, first.n_sweeps) == (600, 3)
    assert first.read_bytes["f32"] == 3 * chain.units[0].weight_bytes[0]
    assert (head.n_tokens, head.n_sweeps) == (1, 1)
    assert first.handed_bytes == 600 * 256
    # 64 bytes of keys and 64 of values a position: seen up to 256, 512 and 600, written 600 times.
    assert first.attention_bytes == 128 * (256 + 512 + 600 + 600)


def test_large_micro_batch_reads_nearly_all_experts_a_single_token_two(tmp_path: Path) -> None:
    unit = language_units(describe(mixture(), tmp_path), GOAL, Popularity()).units[0]
    stack = sum(unit.weight_bytes[1:])
    assert unit.decode.read_bytes["q8_0"] == pytest.approx(stack * 2 / 8)
    assert unit.prefill.read_bytes["q8_0"] == pytest.approx(3 * stack)


def test_drafted_tokens_want_more_experts_together(tmp_path: Path) -> None:
    workload = describe(mixture(), tmp_path)
    one = language_units(workload, GOAL, Popularity(zipf_exponent=0.0))
    many = language_units(workload, replace(GOAL, n_decoded=5), Popularity(zipf_exponent=0.0))
    # Two of eight experts a token; five tokens together want 8 x (1 - (3/4)^5) of them.
    assert one.reads == pytest.approx((1.0, 1 / 4))
    assert many.reads == pytest.approx((1.0, 1 - (3 / 4) ** 5))
    read = many.units[0].decode.read_bytes["q8_0"]
    assert read == pytest.approx(many.reads[1] * sum(many.units[0].weight_bytes[1:]))


def test_unused_context_is_kept_but_not_read(tmp_path: Path) -> None:
    workload = describe(llama(), tmp_path)
    full = language_units(workload, GOAL, Popularity()).units[0]
    part = language_units(workload, replace(GOAL, n_seen=10), Popularity()).units[0]
    assert part.kept_bytes == full.kept_bytes
    assert (part.decode.attention_bytes, full.decode.attention_bytes) == (128 * 11, 128 * 1001)


def test_trace_of_another_model_is_refused(tmp_path: Path) -> None:
    trace = Popularity("trace", 0.0, ((0.5,) * 4, (0.5,) * 4))
    with pytest.raises(ConfigError, match="4 experts in layer 0, the model has 8"):
        language_units(describe(mixture(), tmp_path), GOAL, trace)


def test_dense_model_needs_no_popularity(tmp_path: Path) -> None:
    chain = language_units(describe(llama(), tmp_path), GOAL, Popularity("trace", 0.0, ()))
    assert chain.reads == (1.0,)
