"""Who this host is, and whom it trusts: a key with its certificate, and certificates of others.

`folder/key.pem` and `certificate.pem` are this host's, `folder/trusted/NAME.pem` those of others.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from edgert.atomic_file import PRIVATE, sync_folder, write_error, write_file
from edgert.config import Directories
from edgert.errors import ConfigError, FormatError
from edgert.hosts.certificates import (
    check_certificate,
    check_key,
    check_name,
    check_time,
    new_certificate,
    new_key,
)

KEY, CERTIFICATE, TRUSTED = "key.pem", "certificate.pem", "trusted"

_LARGEST_BYTES = 1 << 16
_MOST_PEERS = 4096
_MAKE = "edgert keys host NAME makes this host's identity"


@dataclass(frozen=True, slots=True)
class HostIdentity:
    """This host's name, certificate and private key, both in PEM.

    Attributes:
        fingerprint: SHA-256 of the public key as hexadecimal digits; others pin it.
    """

    name: str
    certificate_pem: bytes
    key_pem: bytes = field(repr=False)
    fingerprint: str


@dataclass(frozen=True, slots=True)
class TrustedPeer:
    """Another host whose key is let in, under the name it has here.

    Attributes:
        is_gateway: Whether it stands before other hosts and says whose calls it passes on; what
            it says is believed, it has no calls of its own.
    """

    name: str
    certificate_pem: bytes = field(repr=False)
    fingerprint: str
    is_gateway: bool = False


def hosts_folder(directories: Directories) -> Path:
    """Return the folder of keys: beside the configuration file."""
    return directories.config_file.parent / "hosts"


def create_identity(folder: Path, name: str, now: datetime | None = None) -> HostIdentity:
    """Make this host's key, which only its owner can read, and its certificate.

    A key without a certificate, which an interrupted call leaves, gets one.

    Raises:
        ConfigError: there is an identity already, the name is none, or the folder is not writable.
    """
    check_name(name)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(folder, error) from error
    key_path, certificate_path = folder / KEY, folder / CERTIFICATE
    if os.path.lexists(certificate_path):
        raise ConfigError(
            f"{certificate_path}: this host has an identity already",
            hint="edgert keys host shows it",
        )
    if not os.path.lexists(key_path):
        write_file(key_path, new_key(), replace=False, mode=PRIVATE)
    key_pem = _read(key_path, _MAKE, private=True)
    certificate = new_certificate(key_pem, name, str(key_path), now)
    write_file(certificate_path, certificate, replace=False)
    return load_identity(folder, now)


def load_identity(folder: Path, now: datetime | None = None) -> HostIdentity:
    """Read this host's identity.

    Raises:
        ConfigError: there is none, others can read its key, a link leads out of the folder, or the
            certificate is not valid now.
        FormatError: a file holds something else.
    """
    key_path, certificate_path = folder / KEY, folder / CERTIFICATE
    certificate = _read(certificate_path, _MAKE)
    key_pem = _read(key_path, _MAKE, private=True)
    name, fingerprint = check_certificate(certificate, str(certificate_path))
    check_key(key_pem, certificate, str(key_path))
    check_time(certificate, f"this host ({certificate_path})", now)
    return HostIdentity(name, certificate, key_pem, fingerprint)


def trust(
    folder: Path, name: str, certificate_pem: bytes, now: datetime | None = None
) -> TrustedPeer:
    """Let a host in under a name; a newer certificate of the same key takes the place of the old.

    Raises:
        ConfigError: the name is none, another host has it, the key has another name, or the
            certificate is not valid now.
        FormatError: not a certificate of a host.
    """
    check_name(name)
    if len(certificate_pem) > _LARGEST_BYTES:
        raise FormatError(f"more than {_LARGEST_BYTES:,} bytes, not a certificate", path=name)
    _, fingerprint = check_certificate(certificate_pem, name)
    check_time(certificate_pem, name, now)
    for peer in trusted_peers(folder):
        if (peer.name == name) != (peer.fingerprint == fingerprint):
            raise ConfigError(
                f"{peer.name} is trusted already, with key {peer.fingerprint}; "
                f"{name} would have {fingerprint}",
                hint=f"edgert keys forget {peer.name}",
            )
    trusted = folder / TRUSTED
    try:
        trusted.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(trusted, error) from error
    write_file(trusted / f"{name}.pem", certificate_pem, replace=True)
    return TrustedPeer(name, certificate_pem, fingerprint)


def trusted_peers(folder: Path) -> tuple[TrustedPeer, ...]:
    """Read whom this host trusts, by name; whether their certificates are valid now is left open.

    Raises:
        ConfigError: a name is none, two names have the same key, or a link leads out of the folder.
        FormatError: a file holds no certificate of a host.
    """
    trusted = folder / TRUSTED
    if trusted.is_symlink():
        raise _leads_out(trusted)
    try:
        paths = sorted(path for path in trusted.iterdir() if path.suffix == ".pem")
    except FileNotFoundError:
        return ()
    except OSError as error:
        raise ConfigError(f"{trusted}: {error.strerror or error}", hint=_MAKE) from error
    if len(paths) > _MOST_PEERS:
        raise ConfigError(f"{trusted}: {len(paths):,} hosts, wanted {_MOST_PEERS:,} at most")
    peers: dict[str, TrustedPeer] = {}
    for path in paths:
        check_name(path.stem)
        content = _read(path, f"edgert keys forget {path.stem}")
        _, fingerprint = check_certificate(content, str(path))
        if fingerprint in peers:
            raise ConfigError(
                f"{trusted}: {peers[fingerprint].name} and {path.stem} have the same key",
                hint=f"edgert keys forget {path.stem}",
            )
        peers[fingerprint] = TrustedPeer(path.stem, content, fingerprint)
    return tuple(peers.values())


def find_peer(trusted: Sequence[TrustedPeer], wanted: str) -> TrustedPeer:
    """Return the trusted host of a name or a fingerprint.

    Raises:
        ConfigError: it is not trusted.
    """
    for peer in trusted:
        if wanted in (peer.name, peer.fingerprint):
            return peer
    raise ConfigError(
        f"no trusted host has the name or key {wanted[:80]}",
        hint="edgert keys trust NAME CERTIFICATE.pem; edgert keys list shows who is trusted",
    )


def forget(folder: Path, name: str) -> None:
    """Trust a host no more.

    Raises:
        ConfigError: it was not trusted.
    """
    path = folder / TRUSTED / f"{check_name(name)}.pem"
    try:
        path.unlink()
        sync_folder(path.parent)
    except FileNotFoundError:
        raise ConfigError(
            f"{name} is not trusted", hint="edgert keys list shows who is trusted"
        ) from None
    except OSError as error:
        raise write_error(path, error) from error


def _read(path: Path, hint: str, *, private: bool = False) -> bytes:
    """Read a small file of the folder itself, never through a link."""
    if path.is_symlink():
        raise _leads_out(path)
    try:
        number = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file", hint=hint) from None
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}", hint=hint) from error
    with os.fdopen(number, "rb") as stream:
        facts = os.fstat(number)
        if not stat.S_ISREG(facts.st_mode):
            raise ConfigError(f"{path}: not a file", hint=hint)
        if private and stat.S_IMODE(facts.st_mode) & 0o077:
            raise ConfigError(
                f"{path}: others than its owner can read this private key",
                hint=f"chmod 600 {path}; where others may have read it, make a new identity",
            )
        content = stream.read(_LARGEST_BYTES + 1)
    if len(content) > _LARGEST_BYTES:
        raise FormatError(f"more than {_LARGEST_BYTES:,} bytes, not a key", path=path, hint=hint)
    return content


def _leads_out(path: Path) -> ConfigError:
    return ConfigError(
        f"{path}: a link to another place, wanted the file itself",
        hint="put the file itself there, or remove the link",
    )
