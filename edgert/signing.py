"""Signs manifests and checks signatures: Ed25519 over the canonical form without `signature`.

`cryptography` is loaded only when a key is made, used or checked.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgert.atomic_file import PRIVATE, write_file
from edgert.errors import ConfigError, FormatError
from partition.manifest import Manifest, Signature
from partition.manifest_file import signed_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_HEX_KEY = re.compile(r"[0-9a-f]{64}")
_LARGEST_KEY_BYTES = 1 << 16
_LONGEST_SHOWN = 80
_NOT_A_KEY = "edgert keys new FILE makes one"


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A public key whose manifests are run.

    Attributes:
        public_key: 64 hexadecimal digits.
        origin: The file it was read from, or how it was given.
    """

    public_key: str
    origin: str

    def __str__(self) -> str:
        return f"{self.public_key} ({self.origin})"


def new_key(path: Path) -> str:
    """Make a private key, in a file that only its owner can read; return its public key.

    Raises:
        ConfigError: the file exists, or cannot be written.
    """
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    content = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    write_file(path, content, replace=False, mode=PRIVATE)
    return _public_hex(key)


def is_exposed(path: Path) -> bool:
    """Whether others than its owner can read a file."""
    return bool(stat.S_IMODE(path.stat().st_mode) & 0o077)


def sign(manifest: Manifest, key_path: Path) -> Manifest:
    """Return the manifest with a signature by a private key, in place of any it had.

    Raises:
        ConfigError: the key file is not there, or has a password.
        FormatError: it holds no Ed25519 private key.
    """
    key = _private_key(key_path)
    signature = Signature(public_key=_public_hex(key), value=key.sign(signed_bytes(manifest)).hex())
    return manifest.model_copy(update={"signature": signature})


def trusted_keys(values: Sequence[str]) -> tuple[TrustedKey, ...]:
    """Read the keys a person trusts.

    Args:
        values: Public keys in hexadecimal, or files with such lines or a PEM public key; one value
            may hold several, separated by commas.

    Raises:
        ConfigError: a value is neither, or all are empty.
        FormatError: a file holds something else.
    """
    items = [item.strip() for value in values for item in value.split(",")]
    keys = tuple(key for item in items if item for key in _keys_of(item))
    if values and not keys:
        raise ConfigError(
            "trusted keys are asked for, and none is named",
            hint="name 64 hexadecimal digits or a file of keys, or leave --trusted-key out",
        )
    return keys


def verify(manifest: Manifest, trusted: Sequence[TrustedKey], place: str) -> None:
    """Refuse a manifest that none of the trusted keys signed, or that was changed since.

    Without trusted keys anybody may have signed it, or nobody; a signature that is there must be
    one of this manifest all the same.

    Args:
        manifest: What to check.
        trusted: See `trusted_keys`.
        place: Where the manifest is from, for errors.

    Raises:
        FormatError: unsigned, signed by another key, or changed since; names the keys.
    """
    signature, names = manifest.signature, ", ".join(str(key) for key in trusted)
    if signature is None:
        if not trusted:
            return
        raise FormatError(
            f"$.signature: none, wanted one by {names}",
            path=place,
            hint="edgert sign MANIFEST --key FILE, or run it without trusted keys",
        )
    if trusted and signature.public_key not in {key.public_key for key in trusted}:
        raise FormatError(
            f"$.signature.public_key: {signature.public_key}, wanted {names}",
            path=place,
            hint="trust that key with --trusted-key if you know whose it is",
        )
    if not _is_by(signature, signed_bytes(manifest)):
        raise FormatError(
            f"$.signature.value: not a signature of this manifest by {signature.public_key}",
            path=place,
            hint="the manifest was changed after it was signed; sign it again or get it again",
        )


def _is_by(signature: Signature, content: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = Ed25519PublicKey.from_public_bytes(bytes.fromhex(signature.public_key))
        key.verify(bytes.fromhex(signature.value), content)
    except (InvalidSignature, ValueError):
        return False
    return True


def _private_key(path: Path) -> Ed25519PrivateKey:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    content = _read(path)
    try:
        key = serialization.load_pem_private_key(content, password=None)
    except TypeError as error:
        raise ConfigError(f"{path}: the key has a password", hint=_NOT_A_KEY) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError("not a private key in PEM", path=path, hint=_NOT_A_KEY) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise FormatError("not an Ed25519 key", path=path, hint=_NOT_A_KEY)
    return key


def _keys_of(item: str) -> list[TrustedKey]:
    if _HEX_KEY.fullmatch(item.lower()):
        return [TrustedKey(item.lower(), "given")]
    path = Path(os.path.expanduser(item))  # noqa: PTH111 - leaves ~nobody as it is
    try:
        found, why = path.exists(), ""
    except OSError as error:  # a name longer than any file's, a folder that may not be searched
        found, why = False, f": {error.strerror or error}"
    if not found:
        shown = item if len(item) <= _LONGEST_SHOWN else f"{item[:_LONGEST_SHOWN]}..."
        raise ConfigError(
            f"trusted key {shown!r}: neither 64 hexadecimal digits nor a file{why}",
            hint="edgert keys new FILE prints the public key",
        )
    content = _read(path)
    if content.lstrip().startswith(b"-----BEGIN"):
        return [TrustedKey(_pem_key(content, path), item)]
    lines = [line.strip() for line in content.decode("utf-8", "replace").splitlines()]
    keys = [line.lower() for line in lines if line and not line.startswith("#")]
    wrong = next((key for key in keys if not _HEX_KEY.fullmatch(key)), None)
    if wrong is not None or not keys:
        saw = "no key" if wrong is None else repr(wrong[:80])
        raise FormatError(
            f"{saw}, wanted lines of 64 hexadecimal digits or a PEM public key",
            path=path,
            hint="edgert keys new FILE prints the public key",
        )
    return [TrustedKey(key, item) for key in keys]


def _pem_key(content: bytes, path: Path) -> str:
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    try:
        key = serialization.load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise FormatError(
            "not a public key in PEM", path=path, hint="a private key stays where it is"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise FormatError("not an Ed25519 key", path=path, hint=_NOT_A_KEY)
    return key.public_bytes_raw().hex()


def _public_hex(key: Ed25519PrivateKey) -> str:
    return key.public_key().public_bytes_raw().hex()


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            raise ConfigError(f"{path}: no such key file", hint=_NOT_A_KEY)
        with path.open("rb") as stream:
            content = stream.read(_LARGEST_KEY_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot read the key: {error.strerror or error}", hint=_NOT_A_KEY
        ) from error
    if len(content) > _LARGEST_KEY_BYTES:
        raise FormatError(f"more than {_LARGEST_KEY_BYTES:,} bytes, not a key", path=path)
    return content
