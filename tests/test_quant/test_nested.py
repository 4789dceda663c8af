"""Nested precision: every width a prefix, blocks equal to the reference, bytes as described."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf.quants import dequantize, quantize
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from quant.nested.assemble import planes_of, rewiden, to_ggml
from quant.nested.blocks import block_form, code_scales, scale_and_min_words
from quant.nested.code import cell_middles, decode, encode, join_planes, split_planes
from quant.nested.gains import (
    LEAST,
    MOST,
    UNIT,
    check_gains,
    gained_scales,
    has_gain,
    no_gains,
    on_grid,
)
from quant.nested.layout import NestedLayout

TOPS = (4, 5, 8)
WIDTHS = [(top, width) for top in TOPS for width in range(2, top + 1)]
GAINED = [(top, width) for top, width in WIDTHS if has_gain(width, top)]
GAINS = {2: 1101, 3: 963, 4: 1031, 5: 1025}
F16_ROUNDING = 2.0**-11


def normal(n_rows: int = 24, row_length: int = 96, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n_rows, row_length)).astype(np.float32)


def in_bytes(weights: NDArray[np.float32], top: int) -> tuple[NDArray[np.uint8], NestedLayout]:
    matrix = encode(weights, 2, top)
    return np.frombuffer(matrix.to_bytes(), np.uint8), matrix.layout


def snr_db(weights: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return float(10 * np.log10((weights**2).sum() / ((weights - other) ** 2).sum()))


def test_hand_worked_group() -> None:
    # The largest is -4: d = -4 / -8 = 0.5, codes are w / 0.5 + 8. Two bits keep u >> 2, whose cells
    # of four steps have their middles 1.5 steps on: (u >> 2) * 4 + 1.5 - 8.
    weights = np.zeros((1, 32), np.float32)
    weights[0, :4] = [-4, 3.5, 1, -0.5]
    matrix = encode(weights, 2, 4)
    assert matrix.scales.tolist() == [0.5]
    assert matrix.codes[0, :5].tolist() == [0, 15, 10, 7, 8]
    assert matrix.values(4)[0, :5].tolist() == [-4, 3.5, 1, -0.5, 0]
    assert matrix.values(2)[0, :5].tolist() == [-3.25, 2.75, 0.75, -1.25, 0.75]


def test_hand_worked_bytes() -> None:
    # One weight of the highest code: bit 8m + 4h + c of every plane, for weight 16h + 4c + m = 22.
    codes = np.zeros((1, 32), np.uint8)
    codes[0, 22] = 15
    assert split_planes(codes, 4)[:, 0].tolist() == [1 << 8 * 2 + 4 * 1 + 1] * 4
    layout = NestedLayout(1, 32, 2, 4)
    assert (layout.scales_bytes, layout.plane_bytes, layout.expert_bytes) == (2, 4, 18)
    assert (layout.prefix_bytes(3), layout.planes_span(2, 4)) == (14, (10, 8))


@given(st.sampled_from(TOPS), st.integers(0, 2**32 - 1))
def test_planes_hold_the_codes(top: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << top, (5, 32)).astype(np.uint8)
    planes = split_planes(codes, top)
    for width in range(1, top + 1):
        assert (join_planes(planes[:width]) == codes >> (top - width)).all()


@pytest.mark.parametrize(("top", "width"), WIDTHS)
@given(st.integers(0, 2**32 - 1), st.floats(-12, 4))
def test_kept_bits_stay_within_half_a_cell(top: int, width: int, seed: int, scale: float) -> None:
    weights = normal(2, 64, seed) * np.float32(10**scale)
    data, layout = in_bytes(weights, top)
    cell = np.abs(layout.split(data, top)[0].astype(np.float32)) * (1 << top - width)
    error = np.abs(decode(data, layout, width) - weights).reshape(-1, 32)
    # Half a cell and half a step of the code, more at its end: the highest code is one step short;
    # scales below the smallest normal f16 are coarse.
    worst = (0.5 + 1.5 * 2.0 ** (width - top) + 2.0**width * F16_ROUNDING) * cell
    assert (error <= worst[:, None] + 2.0**-25 * (1 << top)).all()


@pytest.mark.parametrize(("top", "width"), WIDTHS)
def test_blocks_mean_what_the_reference_says(top: int, width: int) -> None:
    weights = normal(200, 672)  # more groups than one piece holds
    data, layout = in_bytes(weights, top)
    scales, planes = layout.split(data, width)
    name, blocks = to_ggml(scales, planes, width, top)
    saw = dequantize(blocks, gguf.GGMLQuantizationType[name.upper()]).reshape(weights.shape)
    wanted = decode(data[: layout.prefix_bytes(width)], layout, width)
    if name in ("q4_1", "q5_1"):  # their minimum, about as large as the weights, is an f16
        least = np.repeat(np.abs(scales.astype(np.float32)) * (1 << top - 1), 32)
        assert (np.abs(saw - wanted).ravel() <= F16_ROUNDING * least).all()
    else:
        assert (saw == wanted).all()


@pytest.mark.parametrize("top", TOPS)
def test_blocks_are_rewidened_as_if_made_from_planes(top: int) -> None:
    data, layout = in_bytes(normal(200, 672), top)
    scales, planes = layout.split(data, top)
    made = {width: to_ggml(scales, planes, width, top) for width in range(2, top + 1)}
    for width, (_, blocks) in made.items():
        for wider in range(width, top + 1):
            missing = planes[width:wider] if wider > width else None
            name, saw = rewiden(blocks, missing, (width, wider), top)
            assert name == made[wider][0]
            assert (saw == made[wider][1]).all()
            name, saw = rewiden(made[wider][1], None, (wider, width), top)
            assert name == made[width][0]
            assert (saw == blocks).all()


def test_other_planes_than_those_between_widths_are_refused() -> None:
    data, layout = in_bytes(normal(), 8)
    scales, planes = layout.split(data, 8)
    blocks = to_ggml(scales, planes, 4, 8)[1]
    for wrong in (None, planes[4:5], planes):
        with pytest.raises(ValueError, match="planes to go from 4 to 6 bits"):
            rewiden(blocks, wrong, (4, 6), 8)
    with pytest.raises(ValueError, match="1 planes to go from 4 to 2 bits"):
        rewiden(blocks, planes[:1], (4, 2), 8)


def gained_bytes(top: int) -> tuple[NDArray[np.uint8], NestedLayout]:
    """Return an expert whose groups span every size of scale, down to the smallest subnormal."""
    weights = normal(200, 672)
    sizes = 2.0 ** np.random.default_rng(1).uniform(-26, 6, weights.size // 32)
    weights = (weights.reshape(-1, 32) * sizes[:, None]).astype(np.float32).reshape(200, 672)
    matrix = encode(weights, 2, top, has_gains=True)
    assert (np.abs(matrix.scales.astype(np.float32)) < 2.0**-14).any()
    return np.frombuffer(matrix.to_bytes(), np.uint8), matrix.layout


@pytest.mark.parametrize("top", TOPS)
def test_blocks_with_gains_do_not_depend_on_the_widths_they_once_had(top: int) -> None:
    data, layout = gained_bytes(top)
    scales, planes = layout.split(data, top)
    gains = {w: GAINS[w] if has_gain(w, top) else UNIT for w in range(2, top + 1)}
    made = {w: to_ggml(scales, planes, w, top, gain=gains[w])[1] for w in gains}
    plain = to_ggml(scales, planes, 2, top)[1]
    assert (made[2] != plain).any() or top == 2
    for width, blocks in made.items():
        for other, wanted in made.items():
            missing = planes[width:other] if other > width else None
            pair = gains[width], gains[other]
            assert (rewiden(blocks, missing, (width, other), top, None, pair)[1] == wanted).all()


@pytest.mark.parametrize(("top", "width"), GAINED)
def test_blocks_with_gains_mean_what_the_reference_says(top: int, width: int) -> None:
    data, layout = gained_bytes(top)
    scales, planes = layout.split(data, width)
    name, blocks = to_ggml(scales, planes, width, top, gain=GAINS[width])
    saw = dequantize(blocks, gguf.GGMLQuantizationType[name.upper()]).reshape(200, 672)
    wanted = decode(data, layout, width, GAINS[width])
    assert (wanted == decode(data, layout, width) * np.float32(GAINS[width] / UNIT)).mean() > 0.9
    # Scale and minimum are f16s: each is half a step off, the scale times as much as the code.
    largest = np.repeat(np.abs(scales.astype(np.float32)) * (1 << top), 32)
    off = np.abs(saw - wanted).ravel()
    assert (off <= 2 * F16_ROUNDING * largest + 2.0**-25 * (1 << width)).all()


@pytest.mark.parametrize(("top", "width"), [(8, 2), (8, 5), (5, 4), (4, 3)])
def test_every_scale_on_the_grid_outlives_every_gain(top: int, width: int) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    every = every[(every & 3 == 0) & (every & 0x7FFF < 0x7C00)]
    scales = gained_scales(every.view(np.float16), top)
    bits = np.unique(scales.view(np.uint16))
    assert len(bits) > 0.7 * len(every)
    for gain in {*range(LEAST, MOST, 41), *range(UNIT - 8, UNIT + 9), MOST}:
        words = scale_and_min_words(width, top, gain)[bits]
        scale = (words & 0xFFFF).astype(np.uint16)
        finite = scale & 0x7FFF < 0x7C00
        assert finite.all() or gain > UNIT
        assert (code_scales(width, top, gain)[scale[finite]] == bits[finite]).all()


def test_scales_are_rounded_to_the_nearest_on_the_grid() -> None:
    # 1.0 is 0x3C00, its step 2^-10: halves of four steps go up. The largest at 8 bits is 511.
    scales = np.array([1.0, 1 + 2**-10, 1 + 2**-9, 1 + 3 * 2**-10, -1 - 2**-9, 511.75], np.float16)
    wanted = [1.0, 1.0, 1 + 2**-8, 1 + 2**-8, -1 - 2**-8, 511]
    assert gained_scales(scales, 8).tolist() == wanted
    every = np.arange(0x7BFD, dtype=np.uint16)
    off = on_grid(every).view(np.float16).astype(np.float32) - every.view(np.float16)
    assert (np.abs(off) <= 2 * np.spacing(every.view(np.float16)).astype(np.float32)).all()


def test_largest_weights_stay_finite_on_the_grid() -> None:
    matrix = encode(normal() * np.float32(1e4), 2, 8, has_gains=True)
    matrix = encode(matrix.values(8) * np.float32(65504 / np.abs(matrix.values(8)).max()), 2, 8,
                    has_gains=True)  # fmt: skip
    for width in range(2, 9):
        assert np.isfinite(matrix.values(width).astype(np.float16)).all()


@pytest.mark.parametrize(("top", "width"), WIDTHS)
def test_widths_with_gains_are_those_whose_blocks_have_a_minimum(top: int, width: int) -> None:
    assert has_gain(width, top) is block_form(width, top).has_min


@pytest.mark.parametrize(
    "gains",
    [(1024,) * 6, (1024,) * 8, (0, *(1024,) * 6), (LEAST - 1, *(1024,) * 6),
     (1024, MOST + 1, *(1024,) * 5), (2**32 - 1, *(1024,) * 6), (*(1024,) * 4, 1025, 1024, 1024),
     (*(1024,) * 6, 1023)],
)  # fmt: skip
def test_gains_that_cannot_be_are_refused(gains: tuple[int, ...]) -> None:
    check_gains(no_gains(2, 8), 2, 8)
    with pytest.raises(ValueError, match="gain"):
        check_gains(gains, 2, 8)


@pytest.mark.parametrize(("top", "width"), WIDTHS)
def test_blocks_give_back_scales_and_planes(top: int, width: int) -> None:
    data, layout = in_bytes(normal() * np.float32(1e-4), top)
    scales, planes = layout.split(data, width)
    saw_scales, saw_planes = planes_of(to_ggml(scales, planes, width, top)[1], width, top)
    assert (saw_scales == scales).all()
    assert (saw_planes == planes).all()


@pytest.mark.parametrize(("top", "kind"), [(4, "Q4_0"), (5, "Q5_0"), (8, "Q8_0")])
def test_blocks_of_the_top_are_dedicated_ones(top: int, kind: str) -> None:
    ggml_type = gguf.GGMLQuantizationType[kind]
    source = quantize(normal(), ggml_type).ravel()
    scales, planes = planes_of(source, top, top)
    assert (to_ggml(scales, planes, top, top)[1] == source).all()


def test_assembles_into_a_buffer_of_the_caller() -> None:
    data, layout = in_bytes(normal(), 8)
    out = np.empty(1 << 14, np.uint8)
    blocks = to_ggml(*layout.split(data, 4), 4, 8, out)[1]
    assert np.shares_memory(blocks, out)
    assert blocks.size == layout.n_groups * 20
    with pytest.raises(ValueError, match="q8_0"):
        to_ggml(*layout.split(data, 8), 8, 8, out[:100])


# Midpoint nesting of a Gaussian, against 9.0, 15.0, 21.0, 27.0 and 45.1 dB of an exact scale.
@pytest.mark.parametrize(("width", "least_db"), [(2, 8.9), (3, 14.9), (4, 20.9), (5, 27), (8, 45)])
def test_signal_to_noise_of_gaussian_weights(width: int, least_db: float) -> None:
    weights = normal(256, 512)
    data, layout = in_bytes(weights, 8)
    assert snr_db(weights, decode(data, layout, width)) > least_db


def test_cells_of_seven_and_six_bits_are_q8_0_integers() -> None:
    for width in (6, 7):
        assert (cell_middles(width, 8) % 1 == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 7e4])
def test_weights_that_are_no_numbers_are_refused(value: float) -> None:
    weights = normal()
    weights[3, 40] = value
    with pytest.raises(ValueError, match="finite"):
        encode(weights, 2, 8)


@pytest.mark.parametrize(("base", "top"), [(1, 4), (5, 4), (2, 6), (2, 7), (2, 9), (0, 8)])
def test_widths_that_cannot_be_nested_are_refused(base: int, top: int) -> None:
    with pytest.raises(ValueError, match="widths"):
        NestedLayout(1, 32, base, top)


def test_rows_of_broken_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="whole groups"):
        encode(normal(2, 40), 2, 8)


def test_group_of_zeros_stays_zero_at_the_top_width() -> None:
    assert not encode(np.zeros((1, 32), np.float32), 2, 8).values(8).any()
    assert not encode(np.zeros((1, 32), np.float32), 2, 8).values(2).any()
