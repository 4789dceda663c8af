"""Refuses profiles and topologies whose figures cannot be, or contradict one another."""

from __future__ import annotations

from devices.figure_rules import violations
from devices.profile import HostProfile
from devices.topology import Topology
from edgert.errors import ConfigError

_HINT = "figures are bytes, bytes a second and seconds; edgert devices --measure finds them"


def check(thing: Topology | HostProfile, place: str = "") -> None:
    """Check every rule.

    Args:
        thing: What was read or measured.
        place: Where it is from, for errors.

    Raises:
        ConfigError: names `$.path`, value and rule of the first that is broken, and how many more.
    """
    found = violations(thing)
    if found:
        more = f" (and {len(found) - 1:,} more)" if len(found) > 1 else ""
        prefix = f"{place}: " if place else ""
        raise ConfigError(f"{prefix}{found[0]}{more}", hint=_HINT)
