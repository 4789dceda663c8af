"""What a stage with its tiers takes: seconds by simulation, bytes by counting."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from devices.profile import WeightLayout
from partition.build_problem import Place
from partition.cached_tiers import expert_bytes, expert_stacks, slot_uses
from partition.cost import Missing, unit_seconds
from partition.expert_misses import Misses
from partition.manifest import Tiers
from partition.simulate import Passes, PassItem, simulate_passes
from partition.stage_tiers import StageWeights, page_bytes
from partition.units import Unit

# Handing a streamed weight over splits llama.cpp's graph in two; measured with every weight of a
# small model streaming from a file in the page cache.
SPLIT_S = 0.00025
_MOST_SWEEPS = 3  # further sweeps take as long as the last of these
_PASSES = 3
_NO_MISSES = Misses()
REPACK_BYTES_PER_S = 0.95e9  # one thread of ggml's repacking; measured with 3.8 GB


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
        found: Share of the experts that decoding wants that their cache has.
        wanted_bytes: Experts that one decoded token wants, in the cache or not.
    """

    decode: Passes
    prefill_s: float
    read_bytes: int
    load_bytes: int
    held_bytes: int
    flash_bytes_per_s: float | None
    found: float = 1.0
    wanted_bytes: int = 0


def forecast_stage(
    place: Place,
    units: Sequence[Unit],
    weights: StageWeights,
    tiers: Tiers,
    missed: Misses = _NO_MISSES,
    assembled: float | None = None,
) -> StageForecast:
    """Simulate a prefill and decoding on one device.

    Args:
        place: The device.
        units: Of the stage, in order.
        weights: Of the stage, with the bytes that are read.
        tiers: Where they live.
        missed: What a cache of experts leaves to be read.
        assembled: Bytes a second that a thread makes blocks of, where experts are nested.

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
    window = tiers.window_bytes
    items = _items(weights, tiers, missed.decode, sum(pair[0] for pair in found), assembled)
    decode = simulate_passes(items, rate, window, _PASSES, place.name)
    sweep_s = sum(pair[1] for pair in found) / n_sweeps
    items = _items(weights, tiers, missed.first_sweep, sweep_s, assembled)
    n_simulated = min(n_sweeps, _MOST_SWEEPS)
    sweeps = simulate_passes(items, rate, window, n_simulated, place.name)
    prefill_s = sweeps.ends_s[0]
    if missed != _NO_MISSES:  # the first sweep finds the cache empty
        items = _items(weights, tiers, missed.next_sweep, sweep_s, assembled)
        sweeps = simulate_passes(items, rate, window, n_simulated, place.name)
    prefill_s += sweeps.ends_s[-1] - sweeps.ends_s[0]
    prefill_s += (n_sweeps - n_simulated) * sweeps.steady_s
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
        found=missed.found,
        wanted_bytes=int(missed.empty * sum(sizes[name] for name in tiers.cached)),
    )


def _items(
    weights: StageWeights, tiers: Tiers, missed: float, total_s: float, assembled: float | None
) -> list[PassItem]:
    """Spread the computation over the weights by their bytes; attention goes with its layer.

    Args:
        weights: Of the stage.
        tiers: Where they live.
        missed: Share of cached stacks that is read.
        total_s: Seconds of computing.
        assembled: As in `forecast_stage`.
    """
    repacks = REPACK_BYTES_PER_S if tiers.layout == "repacked" else None
    ready_rate = assembled or repacks
    streamed, cached = frozenset(tiers.streamed), frozenset(tiers.cached)
    total_bytes = sum(tensor.active_bytes for tensor in weights.whole) or 1
    stacks = expert_stacks(weights)
    turns = {
        tensor.name: use.turn
        for tensor, use in zip(stacks, slot_uses(stacks, repacked=False), strict=True)
    }
    items = []
    for tensor in weights.whole:
        compute_s = total_s * tensor.active_bytes / total_bytes
        if tensor.name in cached:
            n_missed = missed * tensor.shape[-1]
            ready_s = min(1.0, n_missed) * expert_bytes(tensor) / ready_rate if ready_rate else 0.0
            items.append(
                PassItem(
                    tensor.name, int(missed * tensor.size_bytes), True, compute_s + SPLIT_S,
                    turns[tensor.name], ready_s,
                )
            )  # fmt: skip
            continue
        moves = tensor.name in streamed
        compute_s += SPLIT_S if moves else 0.0
        items.append(PassItem(tensor.name, page_bytes(tensor.size_bytes), moves, compute_s))
    return items
