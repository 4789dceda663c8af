"""`edgert keys`: keys that sign manifests, this host's identity, and the hosts it trusts."""

from __future__ import annotations

import json
import re
import socket
from typing import TYPE_CHECKING

from edgert.cli.opening import user_path
from edgert.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

    from edgert.cli.command import Context
    from edgert.cli.options import KeysOptions
    from edgert.hosts.identity import HostIdentity, TrustedPeer

_LARGEST_BYTES = 1 << 16
_LONGEST_NAME = 64


def run(options: KeysOptions, context: Context) -> int:
    """Do what the action names, print what came of it and return the exit code."""
    from edgert.hosts.identity import hosts_folder

    folder = hosts_folder(context.directories)
    match options.action:
        case "new":
            facts, lines = _new(options)
        case "host":
            facts, lines = _host(options, context, folder)
        case "trust":
            facts, lines = _trust(options, folder)
        case "forget":
            facts, lines = _forget(options, folder)
        case "list":
            facts, lines = _list(options, context, folder)
        case action:
            saw = "nothing" if action is None else repr(action)
            raise ConfigError(
                f"edgert keys: {saw}, wanted new, host, trust, forget or list",
                hint="edgert keys host makes this host's identity, or shows it",
            )
    for line in [json.dumps(facts)] if options.output.json else lines:
        print(line)
    return 0


def _new(options: KeysOptions) -> tuple[dict[str, object], list[str]]:
    """Make a key that signs manifests."""
    from edgert.signing import new_key

    path = user_path(_wanted(options, "new and a file", "edgert keys new signing-key.pem"))
    public_key = new_key(path)
    return {"public_key": public_key, "private_key_file": str(path)}, [public_key]


def _host(
    options: KeysOptions, context: Context, folder: Path
) -> tuple[dict[str, object], list[str]]:
    """Make this host's identity, unless there is one."""
    from edgert.hosts.identity import CERTIFICATE, create_identity, load_identity

    _refuse_more(options)
    if (folder / CERTIFICATE).is_file():
        identity = load_identity(folder)
        if options.subject not in (None, identity.name):
            raise ConfigError(
                f"this host is {identity.name} already, not {options.subject}",
                hint=f"to make another identity, move {folder} away first",
            )
    else:
        identity = create_identity(folder, options.subject or _own_name())
    path = folder / CERTIFICATE
    context.say(f"other hosts trust this one by: edgert keys trust {identity.name} {path.name}")
    facts: dict[str, object] = {**_facts(identity), "certificate": str(path)}
    return facts, [_line(identity), str(path)]


def _trust(options: KeysOptions, folder: Path) -> tuple[dict[str, object], list[str]]:
    from edgert.hosts.identity import trust

    usage = "edgert keys trust NAME CERTIFICATE.pem"
    name = _wanted(options, "trust, a name and a certificate", usage)
    if options.certificate is None:
        raise ConfigError(f"edgert keys trust {name}: no certificate named", hint=usage)
    path = user_path(options.certificate)
    try:
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the certificate: {error.strerror or error}",
            hint="edgert keys host, on the other host, prints the path of its certificate",
        ) from error
    peer = trust(folder, name, content)
    return _facts(peer), [_line(peer)]


def _forget(options: KeysOptions, folder: Path) -> tuple[dict[str, object], list[str]]:
    from edgert.hosts.identity import forget

    _refuse_more(options)
    name = _wanted(options, "forget and a name", "edgert keys list shows who is trusted")
    forget(folder, name)
    return {"forgotten": name}, [name]


def _list(
    options: KeysOptions, context: Context, folder: Path
) -> tuple[dict[str, object], list[str]]:
    from edgert.hosts.certificates import check_time
    from edgert.hosts.identity import CERTIFICATE, load_identity, trusted_peers

    if options.subject is not None:
        raise ConfigError(f"edgert keys list takes nothing more, not {options.subject!r}")
    own = load_identity(folder) if (folder / CERTIFICATE).is_file() else None
    peers = trusted_peers(folder)
    for peer in peers:
        try:
            check_time(peer.certificate_pem, peer.name)
        except ConfigError as error:
            context.say(f"note: {error.message}")
    facts: dict[str, object] = {
        "host": None if own is None else _facts(own),
        "trusted": [_facts(peer) for peer in peers],
    }
    lines = [] if own is None else [f"{_line(own)}  (this host)"]
    return facts, [*lines, *map(_line, peers)]


def _wanted(options: KeysOptions, what: str, hint: str) -> str:
    if options.subject is None:
        raise ConfigError(f"edgert keys: {options.action!r}, wanted {what}", hint=hint)
    return options.subject


def _refuse_more(options: KeysOptions) -> None:
    if options.certificate is not None:
        raise ConfigError(
            f"edgert keys {options.action} takes one name, not {options.certificate!r} too",
            hint="edgert keys --help",
        )


def _own_name() -> str:
    """Return what the system calls this host, as far as that may be a name."""
    bare = socket.gethostname().partition(".")[0].lower()
    return re.sub(r"[^a-z0-9._-]", "-", bare).lstrip("._-")[:_LONGEST_NAME] or "host"


def _facts(host: HostIdentity | TrustedPeer) -> dict[str, object]:
    return {"name": host.name, "fingerprint": host.fingerprint}


def _line(host: HostIdentity | TrustedPeer) -> str:
    return f"{host.name}  {host.fingerprint}"
