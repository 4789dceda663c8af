"""What a caller asks of a backend: which model, in how much memory, with which context."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from edgert.errors import ConfigError

CacheType = Literal["f16", "q8_0", "q4_0"]
PackedMode = Literal["off", "auto", "only"]

DEFAULT_CONTEXT = 4096
CACHE_TYPE_IDS: dict[str, int] = {"f16": 1, "q8_0": 8, "q4_0": 2}
_LARGEST_CONTEXT = 1 << 24
_LARGEST_BATCH = 1 << 16
_LARGEST_THREADS = 512
_MOST_SEQUENCES = 64  # LLAMA_MAX_SEQ is 256; each takes room in every batch


@dataclass(frozen=True, slots=True)
class Placement:
    """Where each weight is to live, by name, as a manifest says.

    Attributes:
        layout: As in the file, as in the packed file, or repacked while loading.
        pinned: Stay in memory.
        streamed: Read on every pass.
        looked_up: Only rows are read.
        cached: Stacks of experts that come and go one by one.
        window_bytes: What streamed weights pass through.
        cache_bytes: What cached experts have at most.
        buffer_bytes: What the plan counts for buffers that are touched while computing.
    """

    layout: Literal["file", "packed", "repacked"]
    pinned: frozenset[str]
    streamed: frozenset[str] = frozenset()
    looked_up: frozenset[str] = frozenset()
    window_bytes: int = 0
    cached: frozenset[str] = frozenset()
    cache_bytes: int = 0
    buffer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """Options of `open_backend`; `None` means "choose, and show what was chosen".

    Attributes:
        model: A GGUF file, or the first of a split one.
        memory_bytes: Bound on the whole process; None is no bound, for callers who know that the
            model fits (`edgert.load` and the command line choose one when a person names none).
        weight_memory_bytes: Bound on the weights in memory alone, in place of `memory_bytes`; for
            experiments and for hosts that account for the rest themselves.
        n_ctx: Positions in the KV cache; None is the trained context, at most `DEFAULT_CONTEXT`.
        n_batch: Most tokens of one `decode` call.
        n_ubatch: Tokens computed at once; None is `n_batch`.
        n_logits_max: Most tokens of one call that want logits, `n_batch` at most; the buffers grow
            with it.
        n_threads: Threads for single tokens; None is every usable core.
        n_threads_batch: Threads for batches; None is `n_threads`.
        n_sequences: Texts whose tokens can be decoded together; they share the KV cache.
        n_cells: Positions in the KV cache for all sequences together; None is `n_ctx`.
        type_k: Type of cached keys.
        type_v: Type of cached values.
        packed: "off" reads the file as it is, "auto" writes the packed layout once and uses it,
            "only" refuses when it is not there.
        packed_folder: Where packed files are kept; None is `~/.cache/edgert/packed`.
        policy_folder: Where the best policies of expert caches are kept; None is the default policy
            for every model.
        expert_bits: Widths of a nested model's experts, ascending; several are told apart by
            routing weight. Empty is the widest there is.
        expert_cuts: Shares of routing weight where the widths change, ascending; one fewer than
            widths.
        quality: Choose widths and cuts that were calibrated to this share of the full quality.
        exact_bits: Compute with exactly the bits that were asked for, also where more are in
            memory; for measuring what fewer bits cost.
        load_anyway: Try although the estimate says it cannot fit.
        placement: Where each weight is to live, from a manifest; obeyed exactly or refused. None
            lets `memory_bytes` decide.
    """

    model: Path
    memory_bytes: int | None = None
    weight_memory_bytes: int | None = None
    n_ctx: int | None = None
    n_batch: int = 512
    n_ubatch: int | None = None
    n_logits_max: int = 33
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_sequences: int = 1
    n_cells: int | None = None
    type_k: str = "f16"
    type_v: str = "f16"
    packed: str = "off"
    packed_folder: Path | None = None
    policy_folder: Path | None = None
    expert_bits: tuple[int, ...] = ()
    expert_cuts: tuple[float, ...] = ()
    quality: float | None = None
    exact_bits: bool = False
    load_anyway: bool = False
    placement: Placement | None = None

    def checked(self) -> LoadOptions:
        """Return self after checking every range.

        Raises:
            ConfigError: a value is out of range or not one of the choices.
        """
        for name, value, largest in (
            ("context", self.n_ctx, _LARGEST_CONTEXT),
            ("cells", self.n_cells, _LARGEST_CONTEXT),
            ("batch", self.n_batch, _LARGEST_BATCH),
            ("logits", self.n_logits_max, _LARGEST_BATCH),
            ("ubatch", self.n_ubatch, _LARGEST_BATCH),
            ("sequences", self.n_sequences, _MOST_SEQUENCES),
            ("threads", self.n_threads, _LARGEST_THREADS),
            ("threads-batch", self.n_threads_batch, _LARGEST_THREADS),
        ):
            if value is not None and not 1 <= value <= largest:
                raise ConfigError(f"{name} is {value}, wanted 1 to {largest}")
        for name, choice, choices in (
            ("cache-type-k", self.type_k, tuple(CACHE_TYPE_IDS)),
            ("cache-type-v", self.type_v, tuple(CACHE_TYPE_IDS)),
            ("packed", self.packed, ("off", "auto", "only")),
        ):
            if choice not in choices:
                raise ConfigError(f"{name} is {choice!r}, wanted one of {', '.join(choices)}")
        return self

    def threads(self) -> tuple[int, int]:
        """Return the threads for single tokens and for batches."""
        single = self.n_threads or len(os.sched_getaffinity(0))
        return single, self.n_threads_batch or single
