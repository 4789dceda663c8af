"""The Python API for host applications: everything public in one place."""

from __future__ import annotations

from edgert.aio import AsyncEngine
from edgert.engine import Engine
from edgert.loading import EMBEDDED_DRAFT, EMBEDDED_MODEL, EngineOptions, load, open_engine
from edgert.replies import Chunk, Reply
from edgert.sampling import SamplingParams, TokenLogprob
from edgert.stats import GenerationStats, Stats
from edgert.turns import ChunkStream

__all__ = [
    "EMBEDDED_DRAFT",
    "EMBEDDED_MODEL",
    "AsyncEngine",
    "Chunk",
    "ChunkStream",
    "Engine",
    "EngineOptions",
    "GenerationStats",
    "Reply",
    "SamplingParams",
    "Stats",
    "TokenLogprob",
    "load",
    "open_engine",
]
