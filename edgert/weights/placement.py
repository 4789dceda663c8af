"""A placement somebody else decided: checked against what the graph really reads, then obeyed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NoReturn

from edgert.errors import PlanError
from edgert.llama.options import Placement
from edgert.weights.uses import WeightUse
from partition.residency import Item, Residency, least_window


def obey(placement: Placement, items: Sequence[Item], uses: Mapping[str, WeightUse]) -> Residency:
    """Return the residency that the placement asks for.

    Args:
        placement: What was decided.
        items: What the graph reads whole, in order of use, with the memory each takes.
        uses: Every weight that the graph reads.

    Raises:
        PlanError: it leaves out a weight, streams one that must stay or that nothing reads, wants
            rows of one that is read whole or all of one that is looked up, caches one that nothing
            routes, streams something routed beside a cache, or its window is too small.
    """
    _check_cached(placement, uses)
    items = [item for item in items if item.name not in placement.cached]
    for item in items:
        if item.name in placement.streamed and item.must_pin:
            _refuse(f"{item.name} is to stream, but llama.cpp's graph needs it to stay")
        if item.name not in placement.pinned and item.name not in placement.streamed:
            others = " nor cached" if placement.cached else ""
            _refuse(
                f"{item.name} is neither pinned nor streamed{others}, but the graph reads it whole"
            )
    for use in uses.values():
        if use.rows_only and use.name in placement.pinned | placement.streamed:
            _refuse(f"{use.name} is pinned or streamed, but the graph only looks up rows of it")
        placed = placement.pinned | placement.streamed | placement.looked_up | placement.cached
        if use.name not in placed:
            _refuse(f"{use.name} is read by the graph and has no place")
    unread = sorted(placement.streamed - uses.keys())
    if unread:
        _refuse(f"{unread[0]} is to stream, but the graph does not read it")
    streamed = tuple(item.name for item in items if item.name in placement.streamed)
    least = least_window([item.size_bytes for item in items if item.name in placement.streamed])
    if placement.window_bytes < least:
        _refuse(f"a window of {placement.window_bytes:,} bytes, the graph needs {least:,}")
    pinned = frozenset(item.name for item in items if item.name in placement.pinned)
    pinned_bytes = sum(item.size_bytes for item in items if item.name in placement.pinned)
    return Residency(pinned, streamed, placement.window_bytes if streamed else 0, pinned_bytes)


def check_resident(placement: Placement, uses: Mapping[str, WeightUse]) -> None:
    """Refuse a repacked placement without a cache that does not pin everything the graph reads.

    Raises:
        PlanError: a weight is missing from the pinned ones.
    """
    missing = sorted(set(uses) - placement.pinned)
    if missing:
        _refuse(f"{missing[0]} is not pinned; repacked weights are wholly in memory")


def check_cache(placement: Placement, least_bytes: int) -> None:
    """Refuse a cache that does not hold one token's experts of every stack of a layer.

    Raises:
        PlanError: names both sizes.
    """
    if placement.cache_bytes < least_bytes:
        _refuse(
            f"an expert cache of {placement.cache_bytes:,} bytes, "
            f"one token's experts need {least_bytes:,}"
        )


def check_nested(placement: Placement, uses: Mapping[str, WeightUse]) -> None:
    """Refuse to hold nested experts elsewhere than in a cache, or to read a packed copy of them.

    Raises:
        PlanError: names the expert stack, or the layout.
    """
    for name in sorted(use.name for use in uses.values() if use.routed_by):
        if name not in placement.cached:
            _refuse(f"{name} is nested and not cached; blocks are made of its planes in a cache")
    if placement.layout == "packed":
        _refuse("the layout is packed, a nested model has none")


def check_context(wanted: int | None, made: int) -> None:
    """Refuse a context of another size than was decided: llama.cpp rounds up.

    Raises:
        PlanError: names both sizes.
    """
    if made != wanted:
        _refuse(f"a context of {wanted} positions, llama.cpp makes one of {made}")


def _check_cached(placement: Placement, uses: Mapping[str, WeightUse]) -> None:
    """Refuse to cache what the graph does not pick from, and to stream what is picked from."""
    routed = {use.name for use in uses.values() if use.routed_by}
    for name in sorted(placement.cached):
        if name not in routed:
            _refuse(f"{name} is to be cached, but the graph does not route to parts of it")
    if not placement.cached:
        return
    for name in sorted(routed & placement.streamed):
        _refuse(f"{name} is routed to and streams, beside an expert cache it is cached or pinned")
    if placement.layout == "repacked" and placement.streamed:
        _refuse(f"{min(placement.streamed)} is to stream; repacked weights do not")


def _refuse(reason: str) -> NoReturn:
    raise PlanError(
        f"the manifest cannot be executed as written: {reason}",
        hint="make a new one: --replan, or edgert plan",
    )
