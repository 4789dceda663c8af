"""Corrections of rates by what a run showed."""

from __future__ import annotations

import math

import pytest

import builders_devices as build
from devices.calibration import Correction, corrected, solve_factor
from edgert.errors import ConfigError


def test_factors_change_one_kernel_only() -> None:
    two = (build.kernel("q4_0"), build.kernel("q8_0"))
    host = build.host().model_copy(update={"devices": (build.device(*two),)})
    found = corrected(host, Correction("cpu", "q4_0", "file", decode=0.5, prefill=2.0))
    first, second = found.devices[0].kernels
    assert first.matvec_bytes_per_s.value == 4e9
    assert first.matmat_flops.value == 320e9
    assert first.matvec_bytes_per_s.origin == "measured"
    assert first.matvec_bytes_per_s.source == "calibrated by a run of a plan"
    assert second == two[1]


def test_factor_that_is_not_given_leaves_the_rate() -> None:
    found = corrected(build.host(), Correction("cpu", "q4_0", "file", decode=0.9))
    assert found.devices[0].kernels[0].matmat_flops == build.kernel().matmat_flops


@pytest.mark.parametrize("factor", [0.0, -1.0, 0.1, 8.0, math.nan, math.inf])
def test_factor_that_is_no_correction_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="wanted"):
        corrected(build.host(), Correction("cpu", "q4_0", "file", decode=factor))


@pytest.mark.parametrize("where", [("gpu0", "q4_0"), ("cpu", "q6_K")])
def test_unknown_kernel_is_refused(where: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="has no rate"):
        corrected(build.host(), Correction(*where, "file", decode=1.1))


def test_corrected_figure_must_still_be_plausible() -> None:
    with pytest.raises(ConfigError, match="matvec_bytes_per_s"):
        corrected(build.host(), Correction("cpu", "q4_0", "file", decode=4.5))


def test_factor_is_the_one_at_which_the_prediction_is_what_was_measured() -> None:
    # Three of five seconds do not depend on the rate.
    factor = solve_factor(lambda factor: 3.0 + 2.0 / factor, 4.0)
    assert factor == pytest.approx(2.0)


def test_prediction_that_no_rate_changes_has_no_factor() -> None:
    assert solve_factor(lambda _: 3.0, 4.0) is None


@pytest.mark.parametrize("wanted_s", [3.0, 3.3, 14.0])
def test_factor_beyond_calibration_is_refused(wanted_s: float) -> None:
    with pytest.raises(ValueError, match=r"predict 3\.4\.\.13 s"):
        solve_factor(lambda factor: 3.0 + 2.0 / factor, wanted_s)
