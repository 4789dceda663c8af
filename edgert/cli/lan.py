"""`edgert devices --lan`: workers that announce themselves, and which of them are trusted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.hosts.identity import TrustedPeer
    from edgert.hosts.lan import FoundWorker

WAIT_S = 3.0
_SHOWN_DIGITS = 16


def show_workers(context: Context, *, as_json: bool) -> int:
    """Listen to the local network, print who is there and return the exit code."""
    from edgert.hosts.identity import hosts_folder, trusted_peers
    from edgert.hosts.lan import find_workers

    trusted = trusted_peers(hosts_folder(context.directories))
    found = find_workers(WAIT_S)
    if as_json:
        print(
            json.dumps([{**asdict(worker), "trust": trust_in(worker, trusted)} for worker in found])
        )
        return 0
    for line in lines(found, trusted):
        print(line)
    if not found:
        context.say("no worker announces itself; there: edgert worker --announce")
    else:
        context.say("a key is proven only when its host connects; edgert keys trust lets one in")
    return 0


def lines(found: Sequence[FoundWorker], trusted: Sequence[TrustedPeer]) -> list[str]:
    """Return a table, a line for each worker."""
    rows = [
        (worker.name, worker.address, worker.fingerprint[:_SHOWN_DIGITS], trust_in(worker, trusted))
        for worker in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def trust_in(worker: FoundWorker, trusted: Sequence[TrustedPeer]) -> str:
    """Say whether the key that a worker says it has is trusted, and under which name."""
    for peer in trusted:
        if peer.fingerprint == worker.fingerprint:
            return "trusted" if peer.name == worker.name else f"trusted as {peer.name}"
    if any(peer.name == worker.name for peer in trusted):
        return f"not trusted: another key than {worker.name}'s"
    return "not trusted"
