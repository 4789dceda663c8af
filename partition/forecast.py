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


@dataclass(frozen=True, slots=True)
class Misses:
    """Shares of a cached expert stack that are read, on average.

    Attributes:
        decode: By one token.
        prefill: By one sweep, which wants nearly every expert.
    """

    decode: float = 0.0
    prefill: float = 0.0


def misses(reads: Sequence[float], units: Sequence[Unit], tiers: Tiers) -> Misses:
    """Return what a cache of the hottest experts leaves to be read.

    Args:
        reads: How often one token reads a byte of each weight class, dense first.
        units: Of the stage.
        tiers: With or without a cache.
    """
    if tiers.experts is None:
        return Misses()
    classes = [sum(unit.weight_bytes[c] for unit in units) for c in range(1, len(reads))]
    total = sum(classes)
    left, decode = float(tiers.experts.cache_bytes), 0.0
    for share, size in zip(reads[1:], classes, strict=True):
        held = min(left, size)
        left -= held
        decode += share * (size - held)
    prefill = max(0.0, total - tiers.experts.cache_bytes)
    return Misses(decode / total, prefill / total) if total else Misses()


def forecast_stage(
    place: Place,
    units: Sequence[Unit],
    weights: StageWeights,
    tiers: Tiers,
    missed: Misses = Misses(),
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
    moving = bool(tiers.streamed or tiers.cached)
    rate = place.host.flash.streaming.value if place.host.flash is not None and moving else None
    n_sweeps = max(1, units[0].prefill.n_sweeps)
    decode_items = _items(weights, tiers, missed.decode, sum(pair[0] for pair in found))
    prefill_s = sum(pair[1] for pair in found) / n_sweeps
    prefill_items = _items(weights, tiers, missed.prefill, prefill_s)
    window = max(tiers.window_bytes, _cache_window(prefill_items) if tiers.cached else 0)
    decode = simulate_passes(decode_items, rate, window, _PASSES, place.name)
    sweeps = simulate_passes(prefill_items, rate, window, min(n_sweeps, _MOST_SWEEPS), place.name)
    prefill_s = sweeps.ends_s[-1] + (n_sweeps - len(sweeps.ends_s)) * sweeps.steady_s
    sizes = {t.name: t.size_bytes for t in (*weights.looked_up, *weights.whole)}
    return StageForecast(
        decode=decode,
        prefill_s=prefill_s,
        read_bytes=sum(sizes[name] for name in tiers.streamed)
        + int(missed.decode * sum(sizes[name] for name in tiers.cached)),
        load_bytes=sum(sizes[name] for name in tiers.pinned),
        held_bytes=sum(page_bytes(sizes[name]) for name in tiers.pinned)
        + tiers.window_bytes
        + (tiers.experts.cache_bytes if tiers.experts is not None else 0),
        flash_bytes_per_s=rate,
    )


def _items(weights: StageWeights, tiers: Tiers, missed: float, total_s: float) -> list[PassItem]:
    """Spread the computation over the weights by their bytes; attention goes with its layer."""
    streamed, cached = frozenset(tiers.streamed), frozenset(tiers.cached)
    total_bytes = sum(tensor.active_bytes for tensor in weights.whole) or 1
    items = []
    for tensor in weights.whole:
        moves = tensor.name in streamed or tensor.name in cached
        share = missed if tensor.name in cached else 1.0
        compute_s = total_s * tensor.active_bytes / total_bytes + (SPLIT_S if moves else 0.0)
        size = page_bytes(int(share * tensor.size_bytes))
        items.append(PassItem(tensor.name, size, moves, compute_s))
    return items


def _cache_window(items: Sequence[PassItem]) -> int:
    """Return the room that reads into a cache have: two of the largest."""
    return 2 * max((item.size_bytes for item in items if item.streamed), default=0)
