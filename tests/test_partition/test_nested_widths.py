"""Shares of widths and the slots they get, by hand."""

from __future__ import annotations

import pytest

from edgert.errors import CapacityError
from partition.expert_slots import SlotUse, assembling_bytes, share_level_slots
from partition.nested_widths import WidthRule, assumed_shares, tilted, width_words

KB = 1024


def test_assumed_routing_weight_falls_with_rank() -> None:
    # 1, 1/2, 1/3, 1/4 of 25/12: before them stand 0, 0.48, 0.72 and 0.88.
    assert assumed_shares(WidthRule((4, 8), (0.25,)), 4) == (0.75, 0.25)
    assert assumed_shares(WidthRule((2, 4, 8), (0.5, 0.8)), 4) == (0.25, 0.25, 0.5)
    assert assumed_shares(WidthRule((5,)), 4) == (1.0,)


def test_shares_move_to_the_mean_that_was_measured() -> None:
    assert tilted((0.75, 0.25), (4.5, 8.5), 6.5) == pytest.approx((0.5, 0.5))
    assert tilted((0.0, 1.0), (4.5, 8.5), 5.5) == pytest.approx((0.75, 0.25))
    three = tilted((0.25, 0.25, 0.5), (2.5, 4.5, 8.5), 5.0)
    assert sum(three) == pytest.approx(1.0)
    assert sum(s * v for s, v in zip(three, (2.5, 4.5, 8.5), strict=True)) == pytest.approx(5.0)
    assert tilted((0.5, 0.5), (4.5, 8.5), 99.0)[1] == pytest.approx(1.0)


def test_rules_are_written_as_they_are_asked_for() -> None:
    assert width_words((4,), ()) == "4"
    assert width_words((3, 5, 8), (0.25, 0.6)) == "3,5,8@0.25,0.6"


def test_every_width_has_slots_of_its_own_length() -> None:
    # Two layers of one stack of four experts, one of which a token wants, in two widths.
    uses = [SlotUse(turn, 4, stride, level) for turn in (0, 1)
            for level, stride in enumerate((4 * KB, 8 * KB))]  # fmt: skip
    shares = (0.5, 0.5)
    assert share_level_slots(uses, shares, 1, None) == {4 * KB: 1, 8 * KB: 1}
    assert share_level_slots(uses, shares, 1, 12 * KB) == {4 * KB: 1, 8 * KB: 1}
    # 12 KB are needed; of the 36 KB left a third goes to the short slots.
    assert share_level_slots(uses, shares, 1, 48 * KB) == {4 * KB: 4, 8 * KB: 4}
    assert share_level_slots(uses, shares, 1, 1 << 20) == {4 * KB: 8, 8 * KB: 8}
    with pytest.raises(CapacityError):
        share_level_slots(uses, shares, 1, 12 * KB - 1)


def test_widths_of_equal_blocks_share_slots() -> None:
    uses = [SlotUse(0, 4, 4 * KB, level) for level in (0, 1)]
    # An expert that is widened takes two places until its planes have arrived.
    assert share_level_slots(uses, (0.5, 0.5), 2, None) == {4 * KB: 4}


def test_each_reader_has_an_area_for_every_plane() -> None:
    assert assembling_bytes([5000, 100]) == 3 * (8192 + 4096)
    assert assembling_bytes([]) == 0
