"""What two hosts say to each other before anything else, and what must not differ."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import edgert
from edgert.errors import FormatError, LinkError
from edgert.hosts.frames import VERSION
from edgert.strict_json import read_json

if TYPE_CHECKING:
    from typing_extensions import Buffer

_LONGEST = 128


@dataclass(frozen=True, slots=True)
class Terms:
    """What this host is on a link, and wants of the other end.

    Attributes:
        role: What this host does, such as hub or worker.
        peer_role: What the other end must do; None leaves it open.
        manifest: Hash of the manifest that both ends must execute; None leaves it open.
    """

    role: str
    peer_role: str | None = None
    manifest: str | None = None


@dataclass(frozen=True, slots=True)
class Hello:
    """What a host says about itself."""

    edgert: str
    protocol: int
    host: str
    role: str
    manifest: str | None = None


def own_hello(terms: Terms, host: str) -> Hello:
    """Return what this host says."""
    return Hello(edgert.__version__, VERSION, host, terms.role, terms.manifest)


def encode_hello(hello: Hello) -> bytes:
    """Write the payload of a HELLO frame."""
    return json.dumps(asdict(hello)).encode()


def decode_hello(payload: Buffer) -> Hello:
    """Read the payload of a HELLO frame.

    Raises:
        LinkError: it is none; without the peer's name.
    """
    try:
        facts = read_json(bytes(payload), "HELLO")
    except FormatError as error:
        raise LinkError(f"greeting: {error.message}") from error
    if not isinstance(facts, dict) or set(facts) != set(Hello.__dataclass_fields__):
        raise LinkError("greeting: not the fields that were wanted")
    texts = [facts[name] for name in ("edgert", "host", "role")]
    texts += [] if facts["manifest"] is None else [facts["manifest"]]
    are_short = all(isinstance(t, str) and len(t) <= _LONGEST and t.isprintable() for t in texts)
    if not are_short or type(facts["protocol"]) is not int:
        raise LinkError("greeting: a field is not what was wanted")
    return Hello(**facts)


def check_hello(saw: Hello, own: Hello, terms: Terms, host: str) -> None:
    """Refuse a peer that differs where it must not.

    Args:
        saw: What the peer said.
        own: What this host says.
        terms: What this host wants.
        host: The name in the peer's certificate.

    Raises:
        LinkError: what differs, without the peer's name.
    """
    wanted = {
        "protocol": (saw.protocol, own.protocol, "install the same version of edgert on both"),
        "edgert": (saw.edgert, own.edgert, "install the same version of edgert on both hosts"),
        "host": (saw.host, host, "its certificate has another name; trust its newest one"),
        "role": (saw.role, terms.peer_role or saw.role, "connect to a host that does that"),
        "manifest": (
            saw.manifest,
            saw.manifest if terms.manifest is None else terms.manifest,
            "give both hosts the same manifest",
        ),
    }
    for what, (other, mine, hint) in wanted.items():
        is_open = what == "manifest" and other is None
        if other != mine and not is_open:
            raise LinkError(f"{what} of {host} is {other}, wanted {mine}", hint=hint)
