"""Calibration: afterwards the forecast is what was measured, and nobody's figures are lost."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

import builders_devices as build
import builders_manifest
from devices.discover import fingerprint
from devices.flash_behind import storage_behind
from devices.profile import HostProfile
from devices.store import ProfileStore
from edgert.cli import calibrating
from edgert.cli.bench_manifest import Measured
from edgert.cli.calibrating import _Forecaster, calibrate, calibrated
from edgert.cli.command import Context
from edgert.config import Directories
from edgert.deployment import Deployment
from edgert.errors import ConfigError, DeviceError
from edgert.llama.build import kernel_build
from partition.language_workload import TensorWork
from partition.manifest import Manifest, Tiers
from partition.stage_tiers import StageWeights
from partition.units import Unit, Work

Q4_BYTES, Q8_BYTES, LOOKED_UP_BYTES = 300e6, 200e6, 900e6
TOKENS = 512


def work(n_tokens: int) -> Work:
    """Two types that are multiplied by, and rows of a third that are only looked up."""
    return Work(
        n_tokens=n_tokens,
        n_sweeps=1,
        flops={"q4_0": n_tokens * 1e9, "q8_0": n_tokens * 3e8},
        read_bytes={"q4_0": Q4_BYTES, "q8_0": Q8_BYTES, "f16": LOOKED_UP_BYTES},
    )


def tensor(name: str, type_name: str, size: float) -> TensorWork:
    return TensorWork(name, type_name, (64, 64), int(size), "ffn", "every_token", Fraction(1))


@pytest.fixture
def manifest() -> Manifest:
    text = json.dumps(builders_manifest.document()).replace('"cpu0"', '"cpu"')
    found = Manifest.model_validate_json(text)
    tiers = Tiers(layout="file", pinned=("a", "b"))
    stage = found.stages[0].model_copy(update={"tiers": tiers})
    plain = found.run.model_copy(update={"draft": "none"})
    return found.model_copy(update={"stages": (stage,), "run": plain})


@pytest.fixture
def forecaster(manifest: Manifest) -> _Forecaster:
    unit = Unit(0, "layer 0", 0, (Q4_BYTES + Q8_BYTES,), 0, 0, work(1), work(TOKENS), 2)
    weights = StageWeights(
        (tensor("a", "q4_0", Q4_BYTES), tensor("b", "q8_0", Q8_BYTES)),
        (tensor("token_embd.weight", "f16", LOOKED_UP_BYTES),),
    )
    return _Forecaster(build.host(), manifest.stages[0], (unit,), weights)


def host(mark: str = build.FINGERPRINT) -> HostProfile:
    device = build.device(build.kernel("q4_0", 8e9), build.kernel("q8_0", 12e9))
    return build.host(fingerprint=mark).model_copy(update={"devices": (device,)})


def measured(tpot_s: float, ttft_s: float) -> Measured:
    return Measured(0.0, 1e3 * ttft_s, 1e3 * tpot_s, 1 / tpot_s, 0.0, 0.0)


@pytest.mark.parametrize(("decode", "prefill"), [(1.2, 1.4), (0.9, 0.8), (1.0, 1.0)])
def test_forecast_afterwards_is_what_was_measured_though_types_are_mixed(
    forecaster: _Forecaster, decode: float, prefill: float
) -> None:
    before = forecaster.forecast(host())
    tpot_s, ttft_s = before.decode.steady_s * decode, before.prefill_s * prefill
    changed, what = calibrated(forecaster, host(), measured(tpot_s, ttft_s))
    after = forecaster.forecast(changed)
    assert after.decode.steady_s == pytest.approx(tpot_s)
    assert after.prefill_s == pytest.approx(ttft_s)
    # q8_0 and what is only looked up stay as they were; q4_0 is most of what is multiplied.
    assert changed.devices[0].kernels[1] == host().devices[0].kernels[1]
    assert what.startswith("q4_0 file: decode ")
    again, _ = calibrated(forecaster, changed, measured(tpot_s, ttft_s))
    rates = [profile.devices[0].kernels[0].matvec_bytes_per_s.value for profile in (changed, again)]
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.parametrize(("decode", "prefill"), [(9.0, 1.0), (0.3, 1.0), (1.0, 20.0)])
def test_error_that_is_too_large_for_one_rate_is_refused(
    forecaster: _Forecaster, decode: float, prefill: float
) -> None:
    now = forecaster.forecast(host())
    seconds = now.decode.steady_s * decode, now.prefill_s * prefill
    with pytest.raises(ValueError, match=r"factors 0\.2\.\.5"):
        calibrated(forecaster, host(), measured(*seconds))


def test_rate_of_the_other_layout_is_corrected_where_it_is_what_was_used(
    forecaster: _Forecaster,
) -> None:
    tiers = forecaster.stage.tiers.model_copy(update={"layout": "repacked"})
    repacked = replace(forecaster, stage=forecaster.stage.model_copy(update={"tiers": tiers}))
    now = repacked.forecast(host())
    changed, what = calibrated(repacked, host(), measured(1.1 * now.decode.steady_s, now.prefill_s))
    assert "q4_0 file" in what
    assert repacked.forecast(changed).decode.steady_s == pytest.approx(1.1 * now.decode.steady_s)


def test_flash_that_decides_is_corrected(forecaster: _Forecaster) -> None:
    tiers = Tiers(layout="file", pinned=("a",), streamed=("b",), window_bytes=1 << 28)
    flashed = replace(forecaster, stage=forecaster.stage.model_copy(update={"tiers": tiers}))
    slow = build.flash().model_copy(
        update={
            "points": tuple(
                point.model_copy(update={"bytes_per_s": build.rate(point.bytes_per_s.value / 8)})
                for point in build.flash().points
            )
        }
    )
    profile = host().model_copy(update={"flash": slow})
    tpot_s = 1.2 * flashed.forecast(profile).decode.steady_s
    changed, what = calibrated(flashed, profile, measured(tpot_s, 1.0))
    assert what.startswith("flash ")
    assert flashed.forecast(changed).decode.steady_s == pytest.approx(tpot_s)
    assert changed.devices == profile.devices


@pytest.fixture
def run(
    tmp_path: Path, manifest: Manifest, forecaster: _Forecaster, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Callable[[ProfileStore], object]], ProfileStore]:
    """Calibrate with something that happens while the plan is forecast."""
    mark = fingerprint(kernel_build(), manifest.device_of(manifest.stages[0]).n_threads)
    store = ProfileStore(tmp_path / "cache/devices", mark)
    directories = Directories(tmp_path / "config.toml", tmp_path / "cache", tmp_path)
    stream = io.StringIO()
    context = Context(stream, stream, stream, {}, directories, {})
    plan = SimpleNamespace(manifest=manifest, model=tmp_path / "model.gguf")

    def call(happens: Callable[[ProfileStore], object]) -> ProfileStore:
        def forecasting(*_: object) -> _Forecaster:
            happens(store)
            return forecaster

        monkeypatch.setattr(calibrating, "_forecaster", forecasting)
        now = forecaster.forecast(host())
        seconds = measured(1.1 * now.decode.steady_s, now.prefill_s)
        calibrate(cast("Deployment", plan), seconds, context)
        return store

    return call


Run = Callable[[Callable[[ProfileStore], object]], ProfileStore]


def save(store: ProfileStore, *, q8_0: float) -> None:
    kernels = (build.kernel("q4_0", 8e9), build.kernel("q8_0", q8_0))
    device = build.device(*kernels)
    profile = build.host(fingerprint=store.fingerprint).model_copy(update={"devices": (device,)})
    store.save(profile, storage_behind(store.folder).name)


def test_host_without_a_profile_is_not_calibrated(run: Run) -> None:
    with pytest.raises(ConfigError, match="nothing is known"):
        run(lambda _: None)


def test_measurement_that_ends_meanwhile_is_not_overwritten(
    tmp_path: Path, run: Run, manifest: Manifest
) -> None:
    mark = fingerprint(kernel_build(), manifest.device_of(manifest.stages[0]).n_threads)
    save(ProfileStore(tmp_path / "cache/devices", mark), q8_0=12e9)
    store = run(lambda store: save(store, q8_0=13e9))
    found = store.load()
    assert found is not None
    rates = {k.ggml_type: k.matvec_bytes_per_s for k in found.profile.devices[0].kernels}
    assert rates["q8_0"].value == 13e9
    assert rates["q4_0"].source == "calibrated by a run of a plan"


def test_host_is_not_calibrated_while_it_is_measured(
    tmp_path: Path, run: Run, manifest: Manifest
) -> None:
    mark = fingerprint(kernel_build(), manifest.device_of(manifest.stages[0]).n_threads)
    store = ProfileStore(tmp_path / "cache/devices", mark)
    save(store, q8_0=12e9)
    with store.locked(), pytest.raises(DeviceError, match="another process"):
        run(lambda _: None)
