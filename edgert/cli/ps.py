"""`edgert ps`: what workers run, and how fast."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from edgert.errors import ConfigError, LinkError
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.host_options import PsOptions

_DEADLINE_S = 5.0
_FOUND_NONE, _LINK_FAILED = 0, 6


def run(options: PsOptions, context: Context) -> int:
    """Ask every host, print what it says and return the exit code."""
    from edgert.host_deployment import known_addresses, service_address
    from edgert.hosts.identity import find_peer, hosts_folder, load_identity, trusted_peers
    from edgert.hosts.service import connect_service

    named = known_addresses(context.env, options.hosts)
    addresses = {name: service_address(address)[0] for name, address in named.items()}
    if not addresses:
        raise ConfigError("no host is named", hint="edgert ps --host NAME=ADDRESS:PORT")
    folder = hosts_folder(context.directories)
    identity, trusted = load_identity(folder), trusted_peers(folder)
    peers = {name: find_peer(trusted, name) for name in addresses}

    def ask(name: str) -> dict[str, object]:
        with connect_service(addresses[name], identity, peers[name]) as client:
            try:
                return client.status(_DEADLINE_S)
            except LinkError as error:
                return {"host": name, "state": "unreachable", "error": error.message}

    with ThreadPoolExecutor(len(addresses)) as pool:
        found = dict(zip(addresses, pool.map(ask, addresses), strict=True))
    if options.output.json:
        print(json.dumps(found))
    else:
        for name, facts in found.items():
            print("\n".join(_lines(name, addresses[name], facts)))
    failed = any(facts.get("state") == "unreachable" for facts in found.values())
    return _LINK_FAILED if failed else _FOUND_NONE


def _lines(name: str, address: str, facts: Mapping[str, object]) -> list[str]:
    """Return a host's line, and one for each part that it runs."""
    if facts.get("state") == "unreachable":
        return [f"{name} at {address}: {facts.get('error')}"]
    taken, memory = (_number(facts.get(key)) for key in ("taken_bytes", "memory_bytes"))
    lines = [
        f"{name} at {address}: {facts.get('state')}, {format_bytes(int(taken))} of "
        f"{format_bytes(int(memory))} taken"
    ]
    sessions = facts.get("sessions")
    for session in sessions if isinstance(sessions, list) else []:
        for part in session.get("parts", []):
            busy_s, n_tokens = _number(part.get("busy_s")), _number(part.get("n_tokens"))
            rate = f"{n_tokens / busy_s:.1f} tokens/s" if busy_s else "idle"
            state = "" if part.get("attached") else ", not attached"
            lines.append(
                f"  {part.get('part')} for {session.get('peer')}: {part.get('has')}; "
                f"{int(n_tokens)} tokens, {rate}, "
                f"{_number(part.get('exchange_s')):.1f} s in exchanges{state}"
            )
    return lines


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
