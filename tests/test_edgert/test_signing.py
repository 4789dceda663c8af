"""Keys, signatures, and the manifests they let through."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import builders_manifest as build
from edgert.errors import ConfigError, EdgertError, FormatError
from edgert.signing import TrustedKey, new_key, sign, trusted_keys, verify
from partition.manifest_file import canonical_json, parse_manifest, signed_bytes

PRIVATE = serialization.PrivateFormat.PKCS8
PEM = serialization.Encoding.PEM


@pytest.fixture
def key(tmp_path: Path) -> Path:
    path = tmp_path / "key.pem"
    new_key(path)
    return path


def public_of(path: Path) -> str:
    signature = sign(build.manifest(), path).signature
    assert signature is not None
    return signature.public_key


def test_new_key_is_for_its_owner_only_and_never_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    public = new_key(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert public == public_of(path)
    content = path.read_bytes()
    with pytest.raises(ConfigError, match="there is such a file already"):
        new_key(path)
    assert path.read_bytes() == content


def test_signed_manifest_is_accepted_after_writing_and_reading(key: Path) -> None:
    signed = sign(build.manifest(build.two_hosts()), key)
    again = parse_manifest(canonical_json(signed), "m.json")
    verify(again, trusted_keys([public_of(key)]), "m.json")
    assert signed_bytes(again) == signed_bytes(build.manifest(build.two_hosts()))


def test_signing_again_replaces_the_signature(key: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pem"
    new_key(other)
    signed = sign(sign(build.manifest(), other), key)
    assert signed == sign(build.manifest(), key)


def test_every_flipped_bit_is_refused(key: Path) -> None:
    content = canonical_json(sign(build.manifest(), key))
    trusted = trusted_keys([public_of(key)])
    for position in range(0, len(content), 3):
        flipped = bytearray(content)
        flipped[position] ^= 1 << position % 8
        with pytest.raises(EdgertError):
            verify(parse_manifest(bytes(flipped), "m.json"), trusted, "m.json")


def test_wrong_key_is_named_with_the_trusted_ones(key: Path) -> None:
    trusted = (TrustedKey("ab" * 32, "given"), TrustedKey("cd" * 32, "keys.txt"))
    with pytest.raises(FormatError) as caught:
        verify(sign(build.manifest(), key), trusted, "m.json")
    assert caught.value.message == (
        f"m.json: $.signature.public_key: {public_of(key)}, "
        f"wanted {'ab' * 32} (given), {'cd' * 32} (keys.txt)"
    )


def test_signature_of_another_manifest_is_refused(key: Path) -> None:
    signature = sign(build.manifest(build.two_hosts()), key).signature
    mixed = build.manifest().model_copy(update={"signature": signature})
    with pytest.raises(FormatError, match=r"\$\.signature\.value: not a signature of this"):
        verify(mixed, trusted_keys([public_of(key)]), "m.json")


def test_key_that_is_no_point_of_the_curve_is_refused(key: Path) -> None:
    signature = sign(build.manifest(), key).signature
    assert signature is not None
    odd = "02" + "00" * 31
    forged = signature.model_copy(update={"public_key": odd, "value": "00" * 64})
    with pytest.raises(FormatError, match=r"\$\.signature\.value"):
        verify(
            build.manifest().model_copy(update={"signature": forged}), trusted_keys([odd]), "m.json"
        )


def test_unsigned_manifest_is_refused_only_when_a_key_is_set() -> None:
    verify(build.manifest(), (), "m.json")
    with pytest.raises(FormatError, match=r"\$\.signature: none, wanted one by abab") as caught:
        verify(build.manifest(), trusted_keys(["ab" * 32]), "m.json")
    assert caught.value.hint is not None


def test_trusted_keys_are_hexadecimal_files_of_them_or_pem(key: Path, tmp_path: Path) -> None:
    public = public_of(key)
    lines = tmp_path / "keys.txt"
    lines.write_text(f"# mine\n{public.upper()}\n\n{'ab' * 32}\n")
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    pem = tmp_path / "public.pem"
    pem.write_bytes(
        private.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    found = trusted_keys([f"{'cd' * 32}, {lines}", str(pem)])
    assert [k.public_key for k in found] == ["cd" * 32, public, "ab" * 32, public]
    assert [k.origin for k in found] == ["given", str(lines), str(lines), str(pem)]


@pytest.mark.parametrize("value", ["ab" * 31, "nothing.pem", "~nobody/key", "\0", "zz" * 32])
def test_trusted_key_that_is_none_is_named(value: str) -> None:
    with pytest.raises(ConfigError, match="neither 64 hexadecimal digits nor a file"):
        trusted_keys([value])


def test_trusted_key_longer_than_any_file_name_is_named_shortly() -> None:
    with pytest.raises(ConfigError, match="neither 64 hexadecimal digits nor a file") as caught:
        trusted_keys(["ab" * 150])
    assert len(caught.value.message) < 200


@pytest.mark.parametrize("values", [[""], [","], [" , "], ["", ","]])
def test_empty_trusted_keys_are_refused_instead_of_trusting_everybody(values: list[str]) -> None:
    with pytest.raises(ConfigError, match="none is named"):
        trusted_keys(values)
    assert trusted_keys([]) == ()


@pytest.mark.parametrize(
    "content",
    [b"", b"# none", b"not a key", b"\xff\xfe", b"-----BEGIN PUBLIC KEY-----\nAA\n", b"0" * 70000],
    ids=range(6),
)
def test_file_without_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "keys.txt"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=r"keys\.txt"):
        trusted_keys([str(path)])


def other_keys() -> dict[str, bytes]:
    secret = serialization.BestAvailableEncryption(b"secret")
    plain = serialization.NoEncryption()
    return {
        "elliptic": ec.generate_private_key(ec.SECP256R1()).private_bytes(PEM, PRIVATE, plain),
        "locked": Ed25519PrivateKey.generate().private_bytes(PEM, PRIVATE, secret),
        "text": b"no key",
        "empty": b"",
    }


@pytest.mark.parametrize("name", ["elliptic", "locked", "text", "empty"])
def test_private_key_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(other_keys()[name])
    with pytest.raises((FormatError, ConfigError), match=r"key\.pem"):
        sign(build.manifest(), path)


@pytest.mark.parametrize("name", ["missing.pem", "."])
def test_missing_private_key_says_how_to_make_one(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        sign(build.manifest(), tmp_path / name)
    assert caught.value.hint == "edgert keys new FILE makes one"
