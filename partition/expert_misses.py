"""How much of the experts a cache leaves to be read: by an assumed law, or replaying a trace."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from partition.cached_tiers import expert_stacks, held_share
from partition.manifest import Tiers
from partition.popularity import Choices
from partition.stage_tiers import StageWeights
from partition.units import Unit, UnitChain

# The runtime drops the expert with the longest expected wait (edgert/experts/scores.py, `Mixed`).
HALF_LIFE_TOKENS = 10.0
_FLOOR = 1e-4
_LEAST_SHARE = 1e-30  # as in the runtime: experts nobody wants are still told apart
_GRAINS = 64  # capacities that are told apart when a trace is replayed
_WARM_SHARE = 0.25  # of a trace fills the cache before misses count
_MOST_REPLAYED = 512
_BISECTIONS = 60

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Misses:
    """Shares of the bytes of cached stacks that are read, on average.

    Attributes:
        decode: By one pass of decoding.
        first_sweep: By the first micro-batch, which finds the cache empty.
        next_sweep: By each further one.
        found: Share of what decoding wants that the cache has.
        empty: By a pass of decoding that finds the cache empty.
    """

    decode: float = 0.0
    first_sweep: float = 0.0
    next_sweep: float = 0.0
    found: float = 1.0
    empty: float = 0.0


def misses(chain: UnitChain, units: Sequence[Unit], weights: StageWeights, tiers: Tiers) -> Misses:
    """Return what the cache of a stage leaves to be read.

    Args:
        chain: The model.
        units: Of the stage.
        weights: Of the stage.
        tiers: With or without a cache.
    """
    if tiers.experts is None:
        return Misses()
    stacks = expert_stacks(weights)
    held = held_share(stacks, tiers)
    demand = Demand(chain, units, max((t.shape[-1] for t in stacks), default=0))
    decode, every = demand.missed(held), demand.missed(0.0)
    next_sweep = max(0.0, demand.last_sweep - held)
    found = 1 - decode / every if every else 1.0
    return Misses(decode, demand.first_sweep, next_sweep, found, every)


class Demand:
    """What passes want of the experts of a stage: assumed, or as a trace has it.

    Args:
        chain: The model.
        units: Of the stage.
        n_expert: Experts of a layer.

    Attributes:
        first_sweep: Share of all experts that the first micro-batch of a prompt wants.
        last_sweep: The same of the last one.
    """

    def __init__(self, chain: UnitChain, units: Sequence[Unit], n_expert: int) -> None:
        sizes = [sum(unit.weight_bytes[c] for unit in units) for c in range(1, len(chain.reads))]
        self._wanted = np.array(chain.reads[1:])
        self._shares = np.array(sizes) / (sum(sizes) or 1.0)
        self._n_decoded = max(1, units[0].decode.n_tokens)
        self._n_expert = n_expert
        sweeps = units[0].prefill.sweeps or (1,)
        choices = tuple(chain.choices[u.index] for u in units if u.index < len(chain.choices))
        self._choices = choices if any(choices) else ()
        self.first_sweep, self.last_sweep = (
            wanted_together(choices, n_expert, n)
            if self._choices
            else _wanted_by(self._wanted, self._shares, n / self._n_decoded)
            for n in (sweeps[0], sweeps[-1])
        )

    def missed(self, held: float, share: float = 1.0) -> float:
        """Return the share of all experts that a pass of decoding reads.

        Args:
            held: Part of all experts that the cache holds.
            share: Part of the choices that this cache is for.
        """
        if not self._choices:
            return assumed(self._wanted * share, self._shares, held)
        grain = int(held * _GRAINS) / _GRAINS
        return share * replayed(self._choices, self._n_expert, grain, self._n_decoded)


def assumed(wanted: Floats, shares: Floats, held: float) -> float:
    """Return the share of bytes read where each choice is independent of those before.

    Halfway between keeping the hottest and keeping the latest: what the runtime keeps lies between
    the two. Against its policy simulated with exponents of 0 to 1 and 15 to 75 % of 64 experts held
    that is right to 6 %.

    Args:
        wanted: How often one pass wants an expert, by class, descending.
        shares: Part of all bytes, by class.
        held: Part of all bytes that the cache holds.

    Source: keeping the latest as Che, Tung and Wang, Hierarchical Web caching systems, 2002.
    """
    if held >= 1.0:
        return 0.0
    before = np.cumsum(shares) - shares
    hottest = wanted @ (shares - np.clip(held - before, 0.0, shares))
    unwanted = 1.0 - np.minimum(wanted, 1.0 - _FLOOR)
    low, high = 0.0, 1.0
    while shares @ (1.0 - unwanted**high) < held and high < 1 / _FLOOR:
        high *= 2
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if shares @ (1.0 - unwanted**middle) < held:
            low = middle
        else:
            high = middle
    latest = (wanted * shares) @ unwanted**high
    return float(hottest + latest) / 2


@lru_cache(maxsize=256)
def replayed(choices: Choices, n_expert: int, held: float, n_together: int = 1) -> float:
    """Return the share of bytes read in a pass when a trace goes through a cache.

    Args:
        choices: By layer and token, which experts were chosen; layers without experts are empty.
        n_expert: Experts of a layer.
        held: Part of all experts that the cache holds.
        n_together: Tokens of one pass.
    """
    # The last layer computes only what wants logits, so a prompt is hardly in it.
    longest = max(map(len, choices))
    layers = [layer for layer in choices if 2 * len(layer) > longest]
    n_tokens = min(_MOST_REPLAYED, *map(len, layers)) if layers else 0
    layers = [layer[len(layer) - n_tokens :] for layer in layers]
    n_layers, n_passes = len(layers), n_tokens // n_together
    capacity = int(held * n_layers * n_expert)
    if capacity >= n_layers * n_expert or not n_passes:
        return 0.0
    cache = _Replay(n_layers, n_expert, capacity)
    n_warm, missed = int(n_passes * _WARM_SHARE), 0
    for step in range(n_passes):
        for index, layer in enumerate(layers):
            tokens = layer[step * n_together : (step + 1) * n_together]
            n_missed = cache.want(
                index, [expert for token in tokens for expert in token], len(tokens)
            )
            missed += n_missed if step >= n_warm else 0
    return missed / ((n_passes - n_warm) * n_layers * n_expert)


@lru_cache(maxsize=64)
def wanted_together(choices: Choices, n_expert: int, n_tokens: int) -> float:
    """Return the share of all experts that so many tokens in a row want, on average.

    Args:
        choices: By layer and token, which experts were chosen; layers without experts are empty.
        n_expert: Experts of a layer.
        n_tokens: Of one micro-batch; a trace that is shorter is taken as it is.
    """
    longest = max(map(len, choices))
    shares = []
    for layer in choices:
        n_runs = len(layer) // n_tokens
        if 2 * len(layer) > longest:
            runs = [layer[i * n_tokens : (i + 1) * n_tokens] for i in range(n_runs)] or [layer]
            shares += [len({e for token in run for e in token}) / n_expert for run in runs]
    return sum(shares) / len(shares)


class _Replay:
    """Which experts are held; an expert's stacks come and go together."""

    def __init__(self, n_layers: int, n_expert: int, capacity: int) -> None:
        self._capacity = capacity
        self._held = np.zeros((n_layers, n_expert), np.bool_)
        self._share = np.zeros((n_layers, n_expert))
        self._ahead: Floats = (np.arange(n_layers) / n_layers).reshape(-1, 1)

    def want(self, layer: int, experts: Sequence[int], n_tokens: int) -> int:
        """Have the experts of a layer in the cache; return how many were not."""
        counts = np.bincount(experts, minlength=self._share.shape[1])
        keep = 0.5 ** (n_tokens / HALF_LIFE_TOKENS)
        self._share[layer] = keep * self._share[layer] + (1 - keep) / n_tokens * counts
        wanted = np.flatnonzero(counts)
        missing = wanted[~self._held[layer, wanted]]
        excess = int(self._held.sum()) + len(missing) - self._capacity
        if excess > 0:
            self._drop(layer, wanted, excess)
        self._held[layer, missing] = True
        return len(missing)

    def _drop(self, layer: int, wanted: NDArray[np.int64], excess: int) -> None:
        """Drop those with the longest expected wait until they are wanted again."""
        waits = 1.0 / np.maximum(self._share, _LEAST_SHARE) + np.roll(
            self._ahead, layer + 1, axis=0
        )
        waits[~self._held] = -1.0
        waits[layer, wanted] = -1.0
        excess = min(excess, int(np.count_nonzero(waits >= 0)))
        if excess:
            self._held.ravel()[np.argpartition(waits.ravel(), -excess)[-excess:]] = False


def _wanted_by(wanted: Floats, shares: Floats, n_passes: float) -> float:
    """Return the share of bytes that so many passes want together; `wanted` is of one."""
    return float(shares @ (1.0 - (1.0 - np.minimum(wanted, 1.0)) ** n_passes))
