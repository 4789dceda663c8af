"""Run language models that do not fit in memory. Public names load on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgert.api import AsyncEngine, Chunk, Engine, GenerationStats, Reply, load
    from edgert.errors import (
        BackendError,
        Cancelled,
        CapacityError,
        ConfigError,
        DeviceError,
        EdgertError,
        FormatError,
        LinkError,
        LinkTimeout,
        MeasurementError,
        PlanError,
    )
    from edgert.sampling import SamplingParams

__version__ = "0.1.0"

__all__ = [
    "AsyncEngine",
    "BackendError",
    "Cancelled",
    "CapacityError",
    "Chunk",
    "ConfigError",
    "DeviceError",
    "EdgertError",
    "Engine",
    "FormatError",
    "GenerationStats",
    "LinkError",
    "LinkTimeout",
    "MeasurementError",
    "PlanError",
    "Reply",
    "SamplingParams",
    "__version__",
    "load",
]

_HOMES = {
    **dict.fromkeys(
        ("AsyncEngine", "Chunk", "Engine", "GenerationStats", "Reply", "load"), "edgert.api"
    ),
    "SamplingParams": "edgert.sampling",
}


def __getattr__(name: str) -> object:
    """Import the module that owns a public name when it is first asked for (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module 'edgert' has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES.get(name, "edgert.errors")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
