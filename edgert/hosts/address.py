"""Addresses as people write them: HOST:PORT, [IPV6]:PORT."""

from __future__ import annotations

from typing import NamedTuple

from edgert.errors import ConfigError

_MOST_PORT_DIGITS = 5
_LONGEST_HOST = 253


class Address(NamedTuple):
    """Where a host listens; port 0 lets the system choose."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Read an address.

    Raises:
        ConfigError: it is none.
    """
    host, _, port = text.rpartition(":")
    in_brackets = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if in_brackets else host
    is_host = 0 < len(bare) <= _LONGEST_HOST and bare.isascii() and bare.isprintable()
    is_host = is_host and " " not in bare and (":" in bare) == in_brackets
    is_port = port.isascii() and port.isdecimal() and len(port) <= _MOST_PORT_DIGITS
    if not is_host or not is_port or int(port) >= 1 << 16:
        raise ConfigError(f"address {text[:80]!r}, wanted HOST:PORT", hint="such as 10.0.0.2:7010")
    return Address(bare, int(port))
