"""`edgert bench --calibrate`: corrects this host's rates by how a plan really ran."""

from __future__ import annotations

from typing import TYPE_CHECKING

from devices.calibration import Correction, corrected
from devices.discover import fingerprint
from devices.flash_behind import storage_behind
from devices.store import ProfileStore
from edgert.errors import ConfigError
from edgert.llama.build import kernel_build

if TYPE_CHECKING:
    from edgert.cli.bench_manifest import Measured
    from edgert.cli.command import Context
    from partition.manifest import Manifest


def calibrate(manifest: Manifest, measured: Measured, context: Context) -> None:
    """Scale the kernel rates of the plan's main weight type; a plan bound by flash tells nothing.

    Raises:
        ConfigError: no profile of this host is known, or the error is too large to be calibration.
    """
    stage = manifest.stages[0]
    host = manifest.hosts[0]
    if stage.tiers.streamed:
        context.say(
            "note: not calibrated: weights stream, so flash decides; edgert devices --measure"
        )
        return
    device = next(item for item in host.devices if item.device_id == stage.device_id)
    store = ProfileStore(
        context.directories.cache / "devices", fingerprint(kernel_build(), device.n_threads)
    )
    storage = storage_behind(context.directories.cache).name
    stored = store.load(storage)
    if stored is None:
        raise ConfigError("nothing is known of this host", hint="edgert devices --measure")
    predicted = manifest.predicted
    correction = Correction(
        device_id=stage.device_id,
        ggml_type=next(iter(stage.precision)),
        layout="file" if stage.tiers.layout == "file" else "repacked",
        decode=predicted.tpot_ms.value / measured.tpot_ms,
        prefill=predicted.ttft_ms.value / measured.ttft_ms,
    )
    try:
        changed = corrected(stored.profile, correction)
    except ValueError as error:
        raise ConfigError(
            f"not calibrated: {error}", hint="edgert devices --measure, then plan again"
        ) from error
    with store.locked():
        store.save(changed, storage)
    context.say(
        f"calibrated {correction.ggml_type} {correction.layout} on {stage.device_id}: "
        f"decode {correction.decode or 1:.3f}x, prefill {correction.prefill or 1:.3f}x; "
        "plan again to use it"
    )
