"""Calibrated codes: what errors do to the output falls at narrow widths and stays small at wide."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from quant.nested.code import NestedMatrix, decode, encode
from quant.nested.compensate import Balance, calibrate
from quant.nested.gains import UNIT, has_gain, on_grid
from quant.nested.losses import Losses
from quant.nested.moments import MOST_FULL_LENGTH, Moments

Floats = NDArray[np.float32]
N_ROWS, ROW_LENGTH = 48, 128


def correlated(n_rows: int, row_length: int, seed: int) -> Floats:
    """Rows whose columns have much in common, as activations do."""
    random = np.random.default_rng(seed)
    mix = random.standard_normal((row_length // 4, row_length))
    rows = random.standard_normal((n_rows, row_length // 4)) @ mix
    return (rows + 0.3 * random.standard_normal(rows.shape)).astype(np.float32)


@pytest.fixture(scope="module")
def weights() -> Floats:
    return np.random.default_rng(1).standard_normal((N_ROWS, ROW_LENGTH)).astype(np.float32)


@pytest.fixture(scope="module")
def moments() -> Floats:
    known = Moments.empty(1, ROW_LENGTH)
    known.add(correlated(2000, ROW_LENGTH, 2), np.zeros(2000, np.int32))
    full = known.of(0)
    assert full is not None
    return full


def output_error(weights: Floats, matrix: NestedMatrix, width: int) -> float:
    inputs = correlated(500, ROW_LENGTH, 2)
    return float(((inputs @ (matrix.values(width) - weights).T) ** 2).mean())


def test_calibration_lowers_the_error_of_the_output(weights: Floats, moments: Floats) -> None:
    plain, own = encode(weights, 2, 8), calibrate(weights, moments, (2, 8))
    for width, share in ((2, 0.9), (3, 0.8), (4, 0.8), (5, 0.9)):
        assert output_error(weights, own, width) < share * output_error(weights, plain, width)
    # At eight bits codes give way to narrower widths, but stay below the noise of six.
    assert output_error(weights, own, 8) < output_error(weights, plain, 6)


def test_calibrated_widths_are_prefixes(weights: Floats, moments: Floats) -> None:
    own = calibrate(weights, moments, (2, 8))
    data = np.frombuffer(own.to_bytes(), np.uint8)
    for width in range(2, 9):
        prefix = data[: own.layout.prefix_bytes(width)]
        assert (decode(prefix, own.layout, width) == own.values(width)).all()


def test_balance_moves_the_error_between_widths(weights: Floats, moments: Floats) -> None:
    narrow = calibrate(weights, moments, (2, 8), Balance(codes=0.25))
    wide = calibrate(weights, moments, (2, 8), Balance(codes=1.0))
    assert output_error(weights, narrow, 2) < output_error(weights, wide, 2)
    assert output_error(weights, wide, 8) < output_error(weights, narrow, 8)


@pytest.mark.parametrize("top", [4, 5])
def test_other_tops_are_calibrated_too(weights: Floats, moments: Floats, top: int) -> None:
    own, plain = calibrate(weights, moments, (2, top)), encode(weights, 2, top)
    assert output_error(weights, own, 2) < output_error(weights, plain, 2)


def test_calibration_is_deterministic(weights: Floats, moments: Floats) -> None:
    first, second = (calibrate(weights, moments, (2, 8)).to_bytes() for _ in range(2))
    assert first == second


def test_diagonal_moments_choose_scales_only(weights: Floats, moments: Floats) -> None:
    own = calibrate(weights, np.diagonal(moments).copy(), (2, 4), Balance(scales=0.0))
    plain = encode(weights, 2, 4, has_gains=True)
    assert (np.abs(own.scales) <= np.abs(plain.scales)).all()
    assert (own.scales != plain.scales).any()


def test_codes_chosen_again_never_weigh_more(weights: Floats, moments: Floats) -> None:
    totals = []
    for sweeps in range(4):
        own = calibrate(weights, moments, (2, 8), Balance(0.5, 0.4, sweeps=sweeps))
        errors = [own.values(width) - weights for width in range(2, 9)]
        by_row = [np.einsum("ij,ij->i", error @ moments, error) for error in errors]
        totals.append(sum(4 ** (0.4 * i) * rows for i, rows in enumerate(by_row)))
    for before, after in pairwise(totals):
        assert (after <= before * (1 + 1e-4)).all()
    assert totals[2].sum() < 0.95 * totals[0].sum()


@pytest.mark.parametrize("is_full", [True, False])
def test_gains_leave_no_error_along_the_weights(
    weights: Floats, moments: Floats, is_full: bool
) -> None:
    own_moments = moments if is_full else np.diagonal(moments).copy()
    losses, own = Losses((2, 8)), calibrate(weights, own_moments, (2, 8))
    losses.add(("stack", "gate"), weights, own, own_moments)
    before = losses.relative()["gate"]
    gains = losses.settle("stack", 2 * UNIT)
    seen = weights @ moments if is_full else weights * own_moments
    whole = float((seen * weights).sum())
    for width, gain in zip(range(2, 9), gains, strict=True):
        along = float((seen * own.values(width, gain)).sum())
        if has_gain(width, 8):
            assert abs(along / whole - 1) < 1e-3
        else:
            assert gain == UNIT
        error = own.values(width, gain) - weights
        noise = float(((error @ moments if is_full else error * own_moments) * error).sum())
        assert losses.relative()["gate"][width] == pytest.approx(noise / whole, rel=1e-3)
    assert gains[0] > 1.02 * UNIT
    assert before[2] != losses.relative()["gate"][2]
    assert before[8] == losses.relative()["gate"][8]
    assert losses.settle("stack", UNIT + 1)[0] == UNIT + 1


def test_scales_of_calibrated_groups_are_on_the_grid(weights: Floats, moments: Floats) -> None:
    for scale in (1.0, 1e-4, 3e-6):
        bits = calibrate(weights * np.float32(scale), moments, (2, 8)).scales.view(np.uint16)
        assert (on_grid(bits) == bits).all()
        assert np.count_nonzero(bits) > len(bits) // 2


def test_zero_rows_stay_zero(moments: Floats) -> None:
    own = calibrate(np.zeros((4, ROW_LENGTH), np.float32), moments, (2, 8))
    assert not own.values(8).any()


def test_moments_are_those_of_the_rows_of_each_expert() -> None:
    rows = correlated(300, 64, 3)
    experts = np.random.default_rng(4).integers(0, 3, 300).astype(np.int32)
    known = Moments.empty(4, 64)
    known.add(rows[:100], experts[:100])
    known.add(rows[100:], experts[100:])
    for expert in range(3):
        own = rows[experts == expert]
        assert np.allclose(known.sums[expert], own.T @ own, rtol=1e-4, atol=1e-2)
        assert known.counts[expert] == len(own)
    assert known.of(3) is None
    full = known.of(0)
    assert full is not None
    assert np.linalg.eigvalsh(full.astype(np.float64)).min() > 0


def test_long_rows_keep_the_diagonal_only() -> None:
    known = Moments.empty(2, MOST_FULL_LENGTH + 32)
    assert not known.is_full
    rows = np.ones((3, MOST_FULL_LENGTH + 32), np.float32)
    known.add(rows, np.zeros(3, np.int32))
    assert known.sums[0].tolist() == [3.0] * (MOST_FULL_LENGTH + 32)


def test_a_noisy_down_projection_is_kept_wider(weights: Floats) -> None:
    losses = Losses((2, 8))
    good, bad = encode(weights, 2, 8), encode(weights * np.float32(1.5), 2, 8)
    for kind, matrix in (("gate", good), ("up", good), ("down", bad)):
        losses.add((kind, kind), weights, matrix, None)
    assert losses.down_extra_bits() == 1
    assert losses.relative()["down"][8] > losses.relative()["gate"][8]
