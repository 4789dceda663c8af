"""`edgert bench --calibrate`: corrects this host's rates by how a plan really ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.calibration import Correction, corrected, corrected_flash
from devices.discover import fingerprint
from devices.flash_behind import storage_behind
from devices.profile import HostProfile
from devices.store import ProfileStore
from edgert.cli.planning import inputs_again
from edgert.errors import ConfigError
from edgert.llama.build import kernel_build
from partition.build_problem import Place
from partition.forecast import StageForecast, forecast_stage
from partition.settings import prepare
from partition.stage_tiers import stage_weights

if TYPE_CHECKING:
    from edgert.cli.bench_manifest import Measured
    from edgert.cli.command import Context
    from edgert.deployment import Deployment

# A pass that waits for flash this much says nothing about kernels, and the other way round.
_FLASH_BOUND_SHARE = 0.2


def calibrate(deployment: Deployment, measured: Measured, context: Context) -> None:
    """Scale the rate that decides the plan's decode speed until it predicts what was measured.

    The plan is forecast again with the rates of now, so that doing it twice corrects once.

    Raises:
        ConfigError: no profile of this host is known, or the error is too large to be calibration.
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
    stored = store.load(storage)
    if stored is None:
        raise ConfigError("nothing is known of this host", hint="edgert devices --measure")
    now = _forecast(deployment, context)
    decode = 1e3 * now.decode.steady_s / measured.tpot_ms
    stall_s = now.decode.stall_s / len(now.decode.ends_s)
    try:
        if stall_s > _FLASH_BOUND_SHARE * now.decode.steady_s:
            changed, what = corrected_flash(stored.profile, decode), f"flash {decode:.3f}x"
        else:
            prefill = 1e3 * now.prefill_s / measured.ttft_ms
            changed, what = _kernels(stored.profile, deployment, decode, prefill)
    except ValueError as error:
        raise ConfigError(
            f"not calibrated: {error}", hint="edgert devices --measure, then plan again"
        ) from error
    with store.locked():
        store.save(changed, storage)
    context.say(f"calibrated {what}; plan again to use it")


def _kernels(
    profile: HostProfile, deployment: Deployment, decode: float, prefill: float
) -> tuple[HostProfile, str]:
    stage = deployment.manifest.stages[0]
    correction = Correction(
        device_id=stage.device_id,
        ggml_type=max(stage.precision, key=lambda name: stage.precision[name]),
        layout="file" if stage.tiers.layout == "file" else "repacked",
        decode=decode,
        prefill=prefill,
    )
    what = f"{correction.ggml_type} {correction.layout}: decode {decode:.3f}x, "
    return corrected(profile, correction), f"{what}prefill {prefill:.3f}x"


def _forecast(deployment: Deployment, context: Context) -> StageForecast:
    """Forecast the manifest's stage with the rates that are known now."""
    manifest = deployment.manifest
    stage = manifest.stages[0]
    inputs = inputs_again(deployment.model, manifest, context)
    host = inputs.topology.host(inputs.topology.home)
    (prepared, *_) = prepare(inputs.workload, inputs.topology, inputs.goal, inputs.popularity)
    weights = stage_weights(inputs.workload, stage.first_layer, stage.end_layer, stage.head)
    place = Place(host, host.device(stage.device_id))
    return forecast_stage(place, prepared.chain.units, weights, stage.tiers)
