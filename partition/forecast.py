"""What a stage with its tiers takes: seconds by simulation, bytes by counting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devices.profile import WeightLayout
from partition.build_problem import Place
from partition.cost import Missing, unit_seconds
from partition.manifest import Tiers
from partition.simulate import Passes, PassItem, simulate_passes
from partition.stage_tiers import StageWeights, page_bytes
from partition.units import Unit

# Handing a streamed weight over splits llama.cpp's graph in two; measured with every weight of a
# small model streaming from a file in the page cache.
SPLIT_S = 0.00025
_MOST_SWEEPS = 3  # further sweeps take as long as the last of these
_PASSES = 3


@dataclass(frozen=True, slots=True)
class StageForecast:
    """Predictions for one stage.

    Attributes:
        decode: Simulated passes of one token.
        prefill_s: The whole prompt.
        read_bytes: Weight bytes that one decoded token reads from flash.
        load_bytes: Weight bytes read before the first token.
        held_bytes: Weight memory: pinned, and the window.
        flash_bytes_per_s: None when nothing streams.
    """

    decode: Passes
    prefill_s: float
    read_bytes: int
    load_bytes: int
    held_bytes: int
    flash_bytes_per_s: float | None


def forecast_stage(
    place: Place, units: Sequence[Unit], weights: StageWeights, tiers: Tiers
) -> StageForecast:
    """Simulate a prefill and decoding on one device.

    Raises:
        ValueError: a unit cannot be computed there, or something streams without flash.
    """
    layout: WeightLayout = "file" if tiers.layout == "file" else "repacked"
    seconds = [unit_seconds(unit, place.device, layout) for unit in units]
    found = [pair for pair in seconds if not isinstance(pair, Missing)]
    if len(found) < len(seconds):
        raise ValueError(f"{place.name} has no rate for a weight type of this model")
    streamed = frozenset(tiers.streamed)
    rate = place.host.flash.best.value if place.host.flash is not None and streamed else None
    n_sweeps = max(1, units[0].prefill.n_sweeps)
    decode_items = _items(weights, streamed, sum(pair[0] for pair in found))
    prefill_items = _items(weights, streamed, sum(pair[1] for pair in found) / n_sweeps)
    decode = simulate_passes(decode_items, rate, tiers.window_bytes, _PASSES, place.name)
    sweeps = simulate_passes(
        prefill_items, rate, tiers.window_bytes, min(n_sweeps, _MOST_SWEEPS), place.name
    )
    prefill_s = sweeps.ends_s[-1] + (n_sweeps - len(sweeps.ends_s)) * sweeps.steady_s
    sizes = {t.name: t.size_bytes for t in (*weights.looked_up, *weights.whole)}
    return StageForecast(
        decode=decode,
        prefill_s=prefill_s,
        read_bytes=sum(sizes[name] for name in tiers.streamed),
        load_bytes=sum(sizes[name] for name in tiers.pinned),
        held_bytes=sum(page_bytes(sizes[name]) for name in tiers.pinned) + tiers.window_bytes,
        flash_bytes_per_s=rate,
    )


def _items(weights: StageWeights, streamed: frozenset[str], total_s: float) -> list[PassItem]:
    """Spread the computation over the weights by their bytes; attention goes with its layer."""
    total_bytes = sum(tensor.active_bytes for tensor in weights.whole) or 1
    return [
        PassItem(
            tensor.name, page_bytes(tensor.size_bytes), tensor.name in streamed,
            total_s * tensor.active_bytes / total_bytes
            + (SPLIT_S if tensor.name in streamed else 0.0),
        )
        for tensor in weights.whole
    ]  # fmt: skip
