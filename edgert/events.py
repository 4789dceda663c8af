"""Typed events that loading and running emit; the command line, benchmarks and hosts listen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """Weights read into memory so far."""

    done_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class PrefillProgress:
    """Prompt tokens processed so far."""

    done_tokens: int
    total_tokens: int


@dataclass(frozen=True, slots=True)
class WorkProgress:
    """Steps of some other work done so far; `label` names it in a word."""

    label: str
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person should know once: what was applied, or what could not be."""

    text: str


Event = LoadProgress | PrefillProgress | WorkProgress | Notice
Listener = Callable[[Event], None]


def ignore(event: Event) -> None:
    """Drop an event; the listener of callers who do not listen."""
    del event
