"""`edgert bench --calibrate`: corrects this host's rates by how a plan really ran."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from devices.calibration import (
    Correction,
    corrected,
    corrected_flash,
    rescaled,
    rescaled_flash,
    solve_factor,
)
from devices.discover import fingerprint
from devices.flash_behind import storage_behind
from devices.profile import HostProfile, WeightLayout
from devices.store import ProfileStore
from edgert.cli.planning import inputs_again
from edgert.errors import ConfigError
from edgert.llama.build import kernel_build
from partition.build_problem import Place
from partition.cost import kernels_of
from partition.forecast import StageForecast, forecast_stage
from partition.manifest import Stage
from partition.settings import prepare
from partition.stage_tiers import StageWeights, stage_weights
from partition.units import Unit, Work

if TYPE_CHECKING:
    from edgert.cli.bench_manifest import Measured
    from edgert.cli.command import Context
    from edgert.deployment import Deployment

# A pass that waits for flash this much says nothing about kernels, and the other way round.
_FLASH_BOUND_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class _Forecaster:
    """Forecasts a manifest's stage with any rates.

    Attributes:
        host: This host.
        stage: Of the manifest.
        units: The model, as the manifest runs it.
        weights: Of the stage.
    """

    host: HostProfile
    stage: Stage
    units: Sequence[Unit]
    weights: StageWeights

    def forecast(self, profile: HostProfile) -> StageForecast:
        """Forecast with the rates of a profile; ValueError where it lacks one."""
        rates = {"devices": profile.devices, "flash": profile.flash or self.host.flash}
        host = self.host.model_copy(update=rates)
        place = Place(host, host.device(self.stage.device_id))
        return forecast_stage(place, self.units, self.weights, self.stage.tiers)

    def kernel(self, profile: HostProfile, works: Iterable[Work], *, by: str) -> Correction:
        """Name the kernel that most of the work goes through, with no factor yet.

        Args:
            profile: With the device's rates.
            works: One phase of every unit.
            by: `read_bytes` or `flops`.
        """
        amounts: dict[str, float] = {}
        for work in works:
            for name in work.flops:  # rows that are only looked up are multiplied by nothing
                amounts[name] = amounts.get(name, 0.0) + getattr(work, by).get(name, 0.0)
        most = max(amounts, key=lambda name: amounts[name])
        layout: WeightLayout = "file" if self.stage.tiers.layout == "file" else "repacked"
        kernel = kernels_of(profile.device(self.stage.device_id), layout).get(most)
        if kernel is None:
            raise ValueError(f"no rate of {most} is known")
        return Correction(self.stage.device_id, kernel.ggml_type, kernel.layout)


def calibrate(deployment: Deployment, measured: Measured, context: Context) -> None:
    """Scale the rate that decides the plan's decode speed until it predicts what was measured.

    The plan is forecast again with the rates of now, so that doing it twice corrects once.

    Raises:
        ConfigError: no profile of this host is known, or the error is too large to be calibration.
        DeviceError: another process is measuring this host.
    """
    if deployment.manifest.run.draft != "none":
        raise ConfigError(
            "not calibrated: the plan speculates, and the bench decodes single tokens",
            hint="calibrate with a plan without --tokens-per-pass",
        )
    device = deployment.manifest.device_of(deployment.manifest.stages[0])
    store = ProfileStore(
        context.directories.cache / "devices", fingerprint(kernel_build(), device.n_threads)
    )
    storage = storage_behind(deployment.model).name
    if store.load(storage) is None:
        raise ConfigError("nothing is known of this host", hint="edgert devices --measure")
    forecaster = _forecaster(deployment, context)  # may measure what is missing, under the lock
    with store.locked():
        stored = store.load(storage)
        if stored is None:
            raise ConfigError("nothing is known of this host", hint="edgert devices --measure")
        try:
            changed, what = calibrated(forecaster, stored.profile, measured)
        except ValueError as error:
            raise ConfigError(
                f"not calibrated: {error}", hint="edgert devices --measure, then plan again"
            ) from error
        store.save(changed, storage)
    context.say(f"calibrated {what}; plan again to use it")


def calibrated(
    forecaster: _Forecaster, profile: HostProfile, measured: Measured
) -> tuple[HostProfile, str]:
    """Return the profile that predicts what was measured, and what was changed for people.

    Raises:
        ValueError: a rate is missing, or would have to change too much.
        ConfigError: the corrected figure cannot be.
    """
    now = forecaster.forecast(profile)
    if now.decode.steady_stall_s > _FLASH_BOUND_SHARE * now.decode.steady_s:
        return _by_flash(forecaster, profile, measured)
    return _by_kernels(forecaster, profile, measured)


def _by_flash(
    forecaster: _Forecaster, profile: HostProfile, measured: Measured
) -> tuple[HostProfile, str]:
    def decode_s(factor: float) -> float:
        return forecaster.forecast(rescaled_flash(profile, factor)).decode.steady_s

    factor = solve_factor(decode_s, 1e-3 * measured.tpot_ms)
    if factor is None:
        raise ValueError("the flash does not decide how fast this plan decodes")
    return corrected_flash(profile, factor), f"flash {factor:.3f}x"


def _by_kernels(
    forecaster: _Forecaster, profile: HostProfile, measured: Measured
) -> tuple[HostProfile, str]:
    """Correct the kernel of most bytes by decoding, then that of most operations by the prompt."""
    works = [unit.decode for unit in forecaster.units]
    decoding = forecaster.kernel(profile, works, by="read_bytes")

    def decode_s(factor: float) -> float:
        scaled = rescaled(profile, replace(decoding, decode=factor))
        return forecaster.forecast(scaled).decode.steady_s

    decode = solve_factor(decode_s, 1e-3 * measured.tpot_ms)
    if decode is None:
        raise ValueError(f"{decoding.ggml_type} does not decide how fast this plan decodes")
    changed = corrected(profile, replace(decoding, decode=decode))
    works = [unit.prefill for unit in forecaster.units]
    prompt = forecaster.kernel(changed, works, by="flops")

    def prefill_s(factor: float) -> float:
        return forecaster.forecast(rescaled(changed, replace(prompt, prefill=factor))).prefill_s

    prefill = solve_factor(prefill_s, 1e-3 * measured.ttft_ms)
    what = f"{decoding.ggml_type} {decoding.layout}: decode {decode:.3f}x"
    if prefill is None:
        return changed, f"{what}; operations do not decide the prompt"
    what += f", {prompt.ggml_type} {prompt.layout}: prefill {prefill:.3f}x"
    return corrected(changed, replace(prompt, prefill=prefill)), what


def _forecaster(deployment: Deployment, context: Context) -> _Forecaster:
    manifest = deployment.manifest
    stage = manifest.stages[0]
    inputs = inputs_again(deployment.model, manifest, context, measure=False)
    (prepared, *_) = prepare(inputs.workload, inputs.topology, inputs.goal, inputs.popularity)
    weights = stage_weights(inputs.workload, stage.first_layer, stage.end_layer, stage.head)
    home = inputs.topology.host(inputs.topology.home)
    return _Forecaster(home, stage, prepared.chain.units, weights)
