"""Known hardware, for plans without it at hand: published figures, each with its source."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from importlib.resources.abc import Traversable

from devices.catalog_entry import (
    Declared,
    HostEntry,
    as_json,
    expand,
    figure_of,
    parse_entry,
    rate_of,
)
from devices.plausible import check
from devices.profile import FileModel, HostProfile
from devices.profile_file import parse
from devices.topology import LinkKind, LinkProfile, Topology
from edgert.errors import ConfigError

_FOLDER = "catalog"
_LINKS = "links.yaml"


class LinkEntry(FileModel):
    """A usual link of one kind."""

    kind: LinkKind
    round_trip_s: Declared
    bytes_per_s: Declared


class LinksFile(FileModel):
    """The file of usual links."""

    links: tuple[LinkEntry, ...]


def names() -> tuple[str, ...]:
    """Return the names of the known hosts, sorted."""
    files = resources.files("devices").joinpath(_FOLDER).iterdir()
    found = (file.name for file in files if file.name.endswith(".yaml"))
    return tuple(sorted(name.removesuffix(".yaml") for name in found if name != _LINKS))


def known_host(name: str, host_id: str | None = None) -> HostProfile:
    """Return a known host.

    Args:
        name: One of `names()`.
        host_id: Its name in a topology; the catalog's by default.

    Raises:
        ConfigError: there is no such entry; lists those there are.
    """
    if name not in names():
        raise ConfigError(f"{name!r} is not in the catalog", hint=f"one of {', '.join(names())}")
    profile = _host(name)
    return profile if host_id is None else profile.model_copy(update={"host_id": host_id})


def usual_link(kind: LinkKind, source: str, target: str) -> LinkProfile:
    """Return a link with the usual figures of its kind."""
    entry = _links()[kind]
    return LinkProfile(
        source=source,
        target=target,
        kind=kind,
        round_trip_s=figure_of(entry.round_trip_s),
        bytes_per_s=rate_of(entry.bytes_per_s),
    )


def catalog_topology(chosen: Sequence[str], link_kind: LinkKind | None = None) -> Topology:
    """Return known hosts, every one linked to every other; the first is where the person is.

    Args:
        chosen: Names of the catalog, every one once.
        link_kind: Of all links; by default the slower of how each pair is usually reached.

    Raises:
        ConfigError: no name, an unknown one, or one that comes twice.
    """
    if not chosen:
        raise ConfigError("no device is named", hint=f"one of {', '.join(names())}")
    hosts = tuple(known_host(name) for name in chosen)
    twice = next((name for index, name in enumerate(chosen) if name in chosen[:index]), None)
    if twice is not None:
        raise ConfigError(
            f"{twice!r} is named twice", hint="a topology file may have several hosts of a kind"
        )
    links = tuple(
        usual_link(link_kind or _slower(source, target), source, target)
        for source in chosen
        for target in chosen
        if source != target
    )
    topology = Topology(home=hosts[0].host_id, hosts=hosts, links=links)
    check(topology)
    return topology


def _slower(source: str, target: str) -> LinkKind:
    """Return the slower of how two hosts are reached."""
    kinds = (_entry(source).link, _entry(target).link)
    return min(kinds, key=lambda kind: _links()[kind].bytes_per_s.value)


@cache
def _host(name: str) -> HostProfile:
    place = f"catalog/{name}.yaml"
    profile = expand(name, _entry(name))
    check(profile, place)
    return profile


@cache
def _links() -> dict[LinkKind, LinkEntry]:
    content = as_json(_text(_LINKS), f"catalog/{_LINKS}")
    return {entry.kind: entry for entry in parse(LinksFile, content, f"catalog/{_LINKS}").links}


@cache
def _entry(name: str) -> HostEntry:
    return parse_entry(_text(f"{name}.yaml"), f"catalog/{name}.yaml")


def _text(name: str) -> str:
    file: Traversable = resources.files("devices").joinpath(_FOLDER).joinpath(name)
    return file.read_text(encoding="utf-8")
