"""The search problem in plain numbers: units in a chain, devices, memories, links, and one score.

A *unit* is what is placed as a whole: a layer, or a run of ONNX nodes between two legal cuts.
Everything that a search needs is here, so that every search and the brute-force oracle of the tests
agree on what a placement costs. No clock, no files, no randomness.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal

Metric = Literal["tpot_s", "ttft_s", "memory_bytes", "energy_j", "sent_bytes"]
METRICS: tuple[Metric, ...] = ("tpot_s", "ttft_s", "memory_bytes", "energy_j", "sent_bytes")
BY_TOKEN: frozenset[Metric] = frozenset({"tpot_s", "energy_j", "sent_bytes"})
# What manifests and flags call them.
SHORT_METRICS: Mapping[Metric, str] = {
    "tpot_s": "tpot", "ttft_s": "ttft", "memory_bytes": "memory", "energy_j": "energy",
    "sent_bytes": "bytes_sent",
}  # fmt: skip
# Scores closer than this part of one another are the same: sums in another order.
TIE_SHARE = 1e-9


@dataclass(frozen=True, slots=True)
class UnitCost:
    """What one unit costs on one device.

    Attributes:
        weight_bytes: Weights by class, see `Problem.reads`; each byte is pinned or streamed.
        kept_bytes: Memory that must be there whenever the unit is: KV cache, what cannot stream.
        decode_s: Computing one token.
        prefill_s: Computing the whole prompt of the goal.
    """

    weight_bytes: tuple[float, ...]
    kept_bytes: float
    decode_s: float
    prefill_s: float


@dataclass(frozen=True, slots=True)
class DeviceOption:
    """A device as a search sees it.

    Attributes:
        name: `host/device`.
        pool: Index of the memory it takes from.
        units: Cost of each unit; None where a constraint forbids the unit here.
        fixed_bytes: Memory of the stage itself: compute buffers, and the process on its host.
        window_bytes: Memory of the window, needed as soon as anything streams.
        flash_bytes_per_s: Rate at which weights stream in; None when they cannot.
        n_sweeps: How often a prefill of the goal's prompt goes over the weights.
        power_w: While computing; 0 when unknown.
    """

    name: str
    pool: int
    units: tuple[UnitCost | None, ...]
    fixed_bytes: float
    window_bytes: float = 0.0
    flash_bytes_per_s: float | None = None
    n_sweeps: int = 1
    power_w: float = 0.0


@dataclass(frozen=True, slots=True)
class Hop:
    """Handing activations from one device to another.

    Attributes:
        decode_s: For one token.
        prefill_s: For the whole prompt.
        sent_bytes: Bytes that cross a link between hosts for one token; 0 inside a host.
    """

    decode_s: float
    prefill_s: float
    sent_bytes: float = 0.0


@dataclass(frozen=True, slots=True)
class Problem:
    """Where to put a chain of units.

    A placement is a sequence of stages: disjoint devices, consecutive units, all units covered.
    Its decode time is the sum over stages of max(compute, bytes streamed / flash rate), plus hops
    along the chain: from home to the first device, between neighbours, from the last one home.
    For one token a stage streams the sum over classes of `reads` times what is not pinned, for a
    prefill every unpinned byte once a sweep. What is read most often is pinned first.

    Attributes:
        n_units: Units in the chain.
        reads: How often one token reads a byte of each weight class, descending, in [0, 1]: 1 for
            dense weights, the share of tokens that want them for experts by popularity.
        devices: What may be used; using fewer is always allowed.
        pool_bytes: Capacity of each memory.
        hops: By (source device, target device); a pair that is missing cannot talk.
        first_hops: From home to each device; None where it cannot be reached.
        last_hops: From each device back home; None where it cannot be reached.
        objective: What to minimise.
        ceilings: Most of other metrics, those `BY_TOKEN` counted for a whole pass.
        tokens_per_pass: Tokens that a pass makes, for messages about tokens.
    """

    n_units: int
    reads: tuple[float, ...]
    devices: tuple[DeviceOption, ...]
    pool_bytes: tuple[float, ...]
    hops: Mapping[tuple[int, int], Hop]
    first_hops: tuple[Hop | None, ...]
    last_hops: tuple[Hop | None, ...]
    objective: Metric = "tpot_s"
    ceilings: Mapping[Metric, float] = field(default_factory=dict)
    tokens_per_pass: float = 1.0


@dataclass(frozen=True, slots=True)
class StageChoice:
    """Units [first, end) on a device, `pinned_bytes` of their weights in memory."""

    device: int
    first: int
    end: int
    pinned_bytes: float


@dataclass(frozen=True, slots=True)
class Score:
    """What a placement is predicted to cost."""

    tpot_s: float
    ttft_s: float
    memory_bytes: float
    energy_j: float
    sent_bytes: float

    def of(self, metric: Metric) -> float:
        """Return one metric."""
        value: float = getattr(self, metric)
        return value


@dataclass(frozen=True, slots=True)
class Placement:
    """A solution.

    Attributes:
        stages: In order of the chain.
        score: What it costs.
        gap: By which share the objective could be lower at most; 0 where it is proven best.
    """

    stages: tuple[StageChoice, ...]
    score: Score
    gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Rejection:
    """Why an option is none.

    Attributes:
        option: What was tried.
        reason: The limit that forbids it, with numbers.
        excess: Needed divided by available; infinite where more of something would not help.
    """

    option: str
    reason: str
    excess: float = inf


Assignment = Sequence[tuple[int, int, int]]  # (device, first, end) in order of the chain
