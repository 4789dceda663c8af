"""Hosts and the directed links between them: what a plan may use."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from devices.profile import Figure, FileModel, HostProfile, Id, Rate

LinkKind = Literal[
    "loopback", "ethernet_100m", "ethernet_1g", "ethernet_2g5", "ethernet_10g", "wifi", "usb",
    "cellular", "internet", "thunderbolt",
]  # fmt: skip


class LinkProfile(FileModel):
    """One direction between two hosts.

    Attributes:
        source: Host that sends.
        target: Host that receives.
        kind: Bounds what is plausible.
        round_trip_s: A small message there and back, encryption included.
        bytes_per_s: Payload bytes a second.
    """

    source: Id
    target: Id
    kind: LinkKind
    round_trip_s: Figure
    bytes_per_s: Rate


class Topology(FileModel):
    """Everything a plan may use.

    Attributes:
        home: The host of the person: prompts start and replies end here.
        hosts: All machines, `home` among them.
        links: Both directions are separate; a missing link means the hosts cannot talk.
    """

    format_version: Literal[1] = 1
    home: Id
    hosts: Annotated[tuple[HostProfile, ...], Field(min_length=1, max_length=64)]
    links: tuple[LinkProfile, ...] = ()

    def host(self, host_id: str) -> HostProfile:
        """Return a host by its name; KeyError if there is none."""
        return {host.host_id: host for host in self.hosts}[host_id]

    def link(self, source: str, target: str) -> LinkProfile | None:
        """Return the link from one host to another, None where there is none."""
        found = (link for link in self.links if (link.source, link.target) == (source, target))
        return next(found, None)
