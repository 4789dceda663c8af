#!/usr/bin/env python3
"""A topology of hosts from their profiles, each the output of `edgert devices --json` on it.

A host is named as its file: board.json is the host `board`, as `edgert keys host board` made it.
The first is home. Links of both directions have what such links usually have, or what is named.

usage: topology.py HOME.json HOST.json... [--kind KIND] [--round-trip S] [--rate BYTES_PER_S]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from itertools import permutations
from pathlib import Path
from typing import get_args

from devices.catalog import usual_link
from devices.profile import HostProfile
from devices.profile_file import parse_host, parse_topology, read_bounded
from devices.topology import LinkKind, LinkProfile, Topology
from edgert.errors import ConfigError, EdgertError


def join(
    hosts: Sequence[HostProfile], kind: LinkKind, round_trip_s: float | None, rate: float | None
) -> Topology:
    """Return a topology in which every host has a link to every other one.

    Raises:
        ConfigError: there is one host only, or two have the same name.
        FormatError: a figure is not plausible for such links.
    """
    names = [host.host_id for host in hosts]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ConfigError(f"hosts {', '.join(names)}: wanted two or more, each of its own name")
    links = []
    for source, target in permutations(names, 2):
        link = usual_link(kind, source, target)
        changes = {"round_trip_s": round_trip_s, "bytes_per_s": rate}
        named = {key: _declared(value) for key, value in changes.items() if value is not None}
        links.append(LinkProfile.model_validate({**dict(link), **named}))
    made = Topology(home=names[0], hosts=tuple(hosts), links=tuple(links))
    return parse_topology(made.model_dump_json(), "the topology")


def _declared(value: float) -> dict[str, object]:
    return {"value": value, "origin": "declared", "source": "the command line"}


def read_host(path: Path) -> HostProfile:
    """Read a profile under the name of its file."""
    try:
        content = read_bounded(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    return parse_host(content, str(path)).model_copy(update={"host_id": path.stem})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("hosts", nargs="+", type=Path, metavar="HOST.json")
    parser.add_argument("--kind", choices=get_args(LinkKind), default="ethernet_1g")
    parser.add_argument("--round-trip", type=float, metavar="S", help="seconds there and back")
    parser.add_argument("--rate", type=float, metavar="BYTES_PER_S")
    options = parser.parse_args(arguments)
    try:
        hosts = [read_host(path) for path in options.hosts]
        made = join(hosts, options.kind, options.round_trip, options.rate)
    except EdgertError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_code
    print(made.model_dump_json(indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
