"""The rates that a plan depends on: how far its times may be off, and which were never measured."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from devices.profile import Figure, Rate
from devices.topology import LinkProfile, Topology
from partition.candidates import Candidate
from partition.stage_plan import StagePlan

# Half width of a range where repetitions of the probe were closer than that.
_LEAST_RANGE = 0.10
_UNMEASURED_RANGE = 0.3
_WIDEST_RANGE = 0.5
_MOST_LISTED = 8


def stage_rates(stage: StagePlan) -> list[Rate]:
    """Return the rates that a stage's seconds are made of."""
    rates = [kernel.matvec_bytes_per_s for kernel in stage.place.device.kernels]
    flash = stage.place.host.flash
    reads = bool(stage.tiers.streamed or stage.tiers.cached)
    return [*rates, flash.streaming] if flash is not None and reads else rates


def time_range(chosen: Candidate, topology: Topology) -> float:
    """Return the half width of the range of times: the spread of the rates that decide them."""
    hosts = [stage.place.host.host_id for stage in chosen.stages]
    figures: list[Figure] = [rate for stage in chosen.stages for rate in stage_rates(stage)]
    for link in links_used(hosts, topology, parallel=chosen.parallel):
        figures += [link.round_trip_s, link.bytes_per_s]
    return half_width(figures)


def half_width(figures: Iterable[Figure]) -> float:
    """Return the half width of what is made of figures, at most one half."""
    width = _LEAST_RANGE
    for figure in figures:
        if figure.spread is not None:
            width = max(width, 2 * figure.spread)
        elif figure.origin != "measured":
            width = max(width, _UNMEASURED_RANGE)
    return min(width, _WIDEST_RANGE)


def links_used(
    host_ids: Sequence[str], topology: Topology, *, parallel: bool = False
) -> tuple[LinkProfile, ...]:
    """Return the links that a plan's hops go over, each once.

    Args:
        host_ids: Of the stages, in order.
        topology: Ids and inputs start at its home, replies end there.
        parallel: Whether all others exchange with home instead of handing on to the next.
    """
    home = topology.home
    if parallel:
        pairs = [pair for host in host_ids for pair in ((home, host), (host, home))]
    else:
        pairs = list(pairwise([home, *host_ids, home]))
    links = (topology.link(*pair) for pair in dict.fromkeys(pairs) if pair[0] != pair[1])
    return tuple(link for link in links if link is not None)


def link_warnings(links: Sequence[LinkProfile]) -> tuple[str, ...]:
    """Return the warning that links were not measured, if any was not."""
    doubtful = {
        f"{link.source} to {link.target}": sorted(
            {link.round_trip_s.origin, link.bytes_per_s.origin} - {"measured"}
        )
        for link in links
    }
    names = [name for name, origins in doubtful.items() if origins]
    if not names:
        return ()
    origins = sorted({origin for found in doubtful.values() for origin in found})
    shown = ", ".join(names[:_MOST_LISTED])
    more = f" and {len(names) - _MOST_LISTED} more" if len(names) > _MOST_LISTED else ""
    return (
        f"links {shown}{more} are {' and '.join(origins)}, not measured: edgert devices --link "
        "between those hosts makes the prediction trustworthy",
    )
