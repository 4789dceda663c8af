"""`edgert ps`: what workers run, and how fast."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from edgert.errors import ConfigError, LinkError
from edgert.units import format_bytes

if TYPE_CHECKING:
    from edgert.cli.command import Context
    from edgert.cli.host_options import PsOptions

_DEADLINE_S = 5.0
_WIDTH = 80
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
        print("\n".join(table(found, addresses)))
    failed = any(facts.get("state") == "unreachable" for facts in found.values())
    return _LINK_FAILED if failed else _FOUND_NONE


def table(found: Mapping[str, Mapping[str, object]], addresses: Mapping[str, str]) -> list[str]:
    """Return what hosts say as lines of at most 80 characters: a line a host, and one a part."""
    lines = []
    for name, facts in found.items():
        lines += _host_lines(name, addresses[name], facts)
    return lines


def _host_lines(name: str, address: str, facts: Mapping[str, object]) -> list[str]:
    head = f"{name} at {address}: {_text(facts.get('state'))}"
    if facts.get("state") == "unreachable":
        words = _text(facts.get("error")).removeprefix(f"{name} ({address}): ")
        return [*_wrapped(head, ""), *_wrapped(words, "  ")]
    taken, memory = (int(_number(facts.get(key))) for key in ("taken_bytes", "memory_bytes"))
    sessions = _list(facts.get("sessions"))
    count = f"{len(sessions)} session{'' if len(sessions) == 1 else 's'}"
    head += f", {format_bytes(taken)} of {format_bytes(memory)} taken, {count}"
    lines = _wrapped(f"{head}, up {_duration(_number(facts.get('up_s')))}", "")
    for session in sessions:
        for part in _list(session.get("parts")):
            lines += _part_lines(_text(session.get("peer")), part)
    return lines


def _part_lines(peer: str, part: Mapping[str, object]) -> list[str]:
    busy_s, n_tokens = _number(part.get("busy_s")), int(_number(part.get("n_tokens")))
    rate = f"{n_tokens / busy_s:.1f} tokens/s" if busy_s else "idle"
    exchange_s = _number(part.get("exchange_s"))
    facts = [f"{n_tokens:,} tokens", rate]
    facts += [f"{100 * exchange_s / busy_s:.0f} % in exchanges"] if busy_s and exchange_s else []
    facts += [] if part.get("attached") else ["not attached"]
    has = f"{_text(part.get('part'))} for {peer}: {_text(part.get('has'))}"
    return [*_wrapped(has, "  "), *_wrapped(", ".join(facts), "    ")]


def _wrapped(text: str, indent: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _duration(seconds: float) -> str:
    for size_s, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size_s:
            return f"{seconds / size_s:.0f} {name}"
    return f"{seconds:.0f} s"


def _text(value: object) -> str:
    """Return what a host said as text, without what a terminal might obey."""
    return "".join(c if c.isprintable() else " " for c in str(value))


def _list(value: object) -> list[Mapping[str, object]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) else 0.0
