"""Corrects a profile by what was seen when a plan ran: predicted against measured."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from devices.plausible import check
from devices.profile import Figure, HostProfile, KernelRate, Rate, WeightLayout

_LEAST_FACTOR, _MOST_FACTOR = 0.2, 5.0
_BISECTIONS = 40
_INSENSITIVE = 1e-6


@dataclass(frozen=True, slots=True)
class Correction:
    """How much faster a kernel was than its profile says; below 1 is slower.

    Attributes:
        device_id: The device of the host.
        ggml_type: Type of the weights.
        layout: Their layout.
        decode: Factor for one token at a time; None leaves it.
        prefill: Factor for batches; None leaves it.
    """

    device_id: str
    ggml_type: str
    layout: WeightLayout
    decode: float | None = None
    prefill: float | None = None


def solve_factor(predict: Callable[[float], float], wanted_s: float) -> float | None:
    """Return the factor of a rate at which a prediction is what was measured.

    Args:
        predict: Seconds when the rate is scaled by a factor; falls as the factor grows.
        wanted_s: What was measured.

    Returns:
        None where the prediction does not depend on the rate.

    Raises:
        ValueError: no factor between 0.2 and 5 does it: so large an error is no matter of
            calibration.
    """
    most_s, least_s = predict(_LEAST_FACTOR), predict(_MOST_FACTOR)
    if most_s - least_s <= _INSENSITIVE * most_s:
        return None
    if not least_s <= wanted_s <= most_s:
        raise ValueError(
            f"{wanted_s:.4g} s were measured, and factors {_LEAST_FACTOR}..{_MOST_FACTOR} on the "
            f"rate that decides predict {least_s:.4g}..{most_s:.4g} s"
        )
    low, high = math.log(_LEAST_FACTOR), math.log(_MOST_FACTOR)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if predict(math.exp(middle)) > wanted_s:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def corrected(host: HostProfile, correction: Correction) -> HostProfile:
    """Return the profile with the rates of one kernel corrected; they count as measured.

    Raises:
        ValueError: the device or kernel is not in the profile, or a factor is not between 0.2 and
            5: so large an error is no matter of calibration.
        ConfigError: the corrected figure cannot be.
    """
    for factor in (correction.decode, correction.prefill):
        if factor is not None:
            _check_factor(factor)
    changed = rescaled(host, correction)
    check(changed)
    return changed


def rescaled(host: HostProfile, correction: Correction) -> HostProfile:
    """Return the profile as `corrected` does, for predictions with factors that may not stand.

    Raises:
        ValueError: the device or kernel is not in the profile.
    """
    devices, n_found = [], 0
    for device in host.devices:
        kernels = list(device.kernels)
        for index, kernel in enumerate(kernels):
            if device.device_id == correction.device_id and _is_meant(kernel, correction):
                kernels[index] = _corrected(kernel, correction)
                n_found += 1
        devices.append(device.model_copy(update={"kernels": tuple(kernels)}))
    if not n_found:
        wanted = f"{correction.ggml_type} {correction.layout} on {correction.device_id}"
        raise ValueError(f"host {host.host_id} has no rate of {wanted}")
    return host.model_copy(update={"devices": tuple(devices)})


def corrected_flash(host: HostProfile, factor: float) -> HostProfile:
    """Return the profile with the sustained rate of its flash scaled; it counts as measured.

    Raises:
        ValueError: the profile has no flash, or the factor is not between 0.2 and 5.
        ConfigError: the corrected figure cannot be.
    """
    _check_factor(factor)
    changed = rescaled_flash(host, factor)
    check(changed)
    return changed


def rescaled_flash(host: HostProfile, factor: float) -> HostProfile:
    """Return the profile as `corrected_flash` does, for predictions; ValueError without flash."""
    if host.flash is None:
        raise ValueError(f"host {host.host_id} has no flash")
    streaming = host.flash.streaming
    points = tuple(
        point.model_copy(update={"bytes_per_s": _scaled(point.bytes_per_s, factor)})
        if point.bytes_per_s is streaming
        else point
        for point in host.flash.points
    )
    flash = host.flash.model_copy(update={"points": points})
    return host.model_copy(update={"flash": flash})


def _check_factor(factor: float) -> None:
    if not (math.isfinite(factor) and _LEAST_FACTOR <= factor <= _MOST_FACTOR):
        raise ValueError(f"factor {factor:.3g}, wanted {_LEAST_FACTOR}..{_MOST_FACTOR}")


def _is_meant(kernel: KernelRate, correction: Correction) -> bool:
    return (kernel.ggml_type, kernel.layout) == (correction.ggml_type, correction.layout)


def _corrected(kernel: KernelRate, correction: Correction) -> KernelRate:
    return kernel.model_copy(
        update={
            "matvec_bytes_per_s": _scaled(kernel.matvec_bytes_per_s, correction.decode),
            "matmat_flops": _scaled(kernel.matmat_flops, correction.prefill),
        }
    )


def _scaled(figure: Figure, factor: float | None) -> Figure:
    if factor is None:
        return figure
    source = "calibrated by a run of a plan"
    return Rate(value=figure.value * factor, origin="measured", spread=figure.spread, source=source)
