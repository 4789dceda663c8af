"""Files that lie, and files that are none: each gives one clear error that names the place."""

import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest

import builders
from builders import Pair, RawTensor
from edgert.errors import ConfigError, FormatError
from quant.metadata import ValueType
from quant.model_spec import ModelSpec, read_model_spec
from quant.tensor_file import open_tensor_file


def read(path: Path) -> ModelSpec:
    return read_model_spec(open_tensor_file(path))


def one_pair(pair: Pair) -> bytes:
    return builders.RawGguf([pair]).content()


def array_head(element_type: int, count: int) -> bytes:
    return struct.pack("<IQ", element_type, count)


# name: content, what the message says; each message must name the file and an offset
HEADERS = {
    "empty": (b"", "offset 0: the file is empty"),
    "one byte": (b"G", "offset 0: starts with b'G', wanted b'GGUF'"),
    "magic only": (b"GGUF", "the file ends inside the header"),
    "wrong magic": (b"GGML" + bytes(60), "starts with b'GGML', wanted b'GGUF'"),
    "web page": (b"<!DOCTYPE html><html>", "starts with b'<!DO'"),
    "version 0": (replace(builders.llama(), version=0).content(), "GGUF version 0, wanted 2 or 3"),
    "version 1": (replace(builders.llama(), version=1).content(), "GGUF version 1, wanted 2 or 3"),
    "version 4": (replace(builders.llama(), version=4).content(), "GGUF version 4, wanted 2 or 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 1, 1) + bytes(80), "GGUF version 50331648"),
    "absurd tensor count": (
        replace(builders.llama(), n_tensors=1 << 60).content(),
        "offset 8: 1,152,921,504,606,846,976 tensors and 18 metadata keys cannot fit",
    ),
    "absurd key count": (
        replace(builders.llama(), n_pairs=1 << 63).content(),
        "9,223,372,036,854,775,808 metadata keys cannot fit",
    ),
    "one key too many": (replace(builders.llama(), n_pairs=19).content(), "offset"),
    "absurd key length": (
        one_pair(builders.u32("a", 1)).replace(struct.pack("<Q", 1) + b"a", b"\xff" * 8 + b"a"),
        "offset 24: key states a length of 18,446,744,073,709,551,615 bytes",
    ),
    "long key": (
        one_pair(builders.u32("k" * 70_000, 1)),
        "key states a length of 70,000 bytes, wanted at most 65,536",
    ),
    "empty key": (one_pair(builders.u32("", 1)), "offset 24: key is empty"),
    "key with zero byte": (one_pair(builders.u32("a\0b", 1)), r"key is b'a\x00b'"),
    "key not UTF-8": (one_pair(builders.u32("a\udcff", 1)), r"key b'a\xff' is not UTF-8"),
    "duplicate key": (
        builders.RawGguf([builders.u32("a", 1), builders.u32("a", 2)]).content(),
        "offset 41: key a appears twice",
    ),
    "unknown value type": (one_pair(Pair("a", 13, bytes(8))), "key a has value type 13, wanted"),
    "absurd string": (
        one_pair(Pair("a", ValueType.STRING, struct.pack("<Q", 1 << 50))),
        "value of a states a length of 1,125,899,906,842,624 bytes",
    ),
    "absurd array": (
        one_pair(Pair("a", ValueType.ARRAY, array_head(ValueType.UINT32, 1 << 61))),
        "key a states 2,305,843,009,213,693,952 elements",
    ),
    "absurd string array": (
        one_pair(Pair("a", ValueType.ARRAY, array_head(ValueType.STRING, 1 << 40))),
        "key a states 1,099,511,627,776 elements",
    ),
    "absurd string in array": (
        one_pair(
            Pair("a", ValueType.ARRAY, array_head(ValueType.STRING, 2) + b"\xff" * 8 + bytes(16))
        ),
        "string 0 of key a reaches past the end",
    ),
    "array of arrays": (
        one_pair(Pair("a", ValueType.ARRAY, array_head(ValueType.ARRAY, 1) + bytes(16))),
        "key a holds an array of arrays",
    ),
    "alignment 0": (one_pair(builders.u32("general.alignment", 0)), "general.alignment is 0"),
    "alignment 8": (one_pair(builders.u32("general.alignment", 8)), "general.alignment is 8"),
    "alignment 48": (one_pair(builders.u32("general.alignment", 48)), "general.alignment is 48"),
    "alignment as text": (
        one_pair(builders.text("general.alignment", "32")),
        "general.alignment is a string, wanted uint32",
    ),
}


@pytest.mark.parametrize(("content", "message"), HEADERS.values(), ids=HEADERS.keys())
def test_bad_headers_name_file_and_offset(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(FormatError) as caught:
        open_tensor_file(path)
    assert message in caught.value.message
    assert caught.value.message.startswith(f"{path}, offset ")
    assert caught.value.path == path


# name: change of the second tensor (blk.0.attn_norm.weight), what the message says
TENSORS = {
    "no dimensions": ({"dims": ()}, "0 dimensions, wanted 1 to 4"),
    "five dimensions": ({"dims": (64, 1, 1, 1, 1)}, "5 dimensions, wanted 1 to 4"),
    "zero dimension": ({"dims": (64, 0)}, "shape (64, 0), wanted positive lengths"),
    "negative dimension": ({"dims": ((1 << 64) - 1,)}, "wanted positive lengths and fewer"),
    "overflowing dimensions": ({"dims": (1 << 40, 1 << 40)}, "wanted positive lengths and fewer"),
    "overflowing bytes": ({"dims": (1 << 61, 3)}, "bytes, wanted fewer than 2^63"),
    "unknown type": ({"type_id": 43}, "unknown tensor type 43"),
    "removed type": ({"type_id": 4}, "unknown tensor type 4"),
    "absurd type": ({"type_id": 0xFFFFFFFF}, "unknown tensor type 4294967295"),
    "rows of partial blocks": ({"dims": (63,), "type_id": 2}, "a multiple of q4_0's block of 32"),
    "overlap": ({"offset": 0}, "overlaps tensor token_embd.weight, wanted 73,216"),
    "misaligned": ({"offset": 73_217}, "data offset 73,217: wanted a multiple of 32"),
    "hole": ({"offset": 73_248}, "leaves a hole, wanted 73,216"),
    "out of the file": ({"offset": 1 << 62}, "leaves a hole, wanted 73,216"),
    "larger than stated": ({"dims": (64, 64)}, None),
    "much larger than the file": ({"dims": (1 << 30, 1 << 20)}, None),
    "same name": ({"name": "token_embd.weight"}, "the name appears twice"),
}


@pytest.mark.parametrize(("changes", "message"), TENSORS.values(), ids=TENSORS.keys())
def test_bad_tensors_are_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    path = builders.llama().with_tensor(1, **changes).write(tmp_path / "bad.gguf")
    with pytest.raises(FormatError) as caught:
        open_tensor_file(path)
    assert (message or "overlaps tensor blk.0.attn_norm.weight") in caught.value.message
    assert str(path) in caught.value.message
    assert caught.value.tensor is not None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "tensor name is empty"),
        ("a\0b", "tensor name is b'a\\x00b'"),
        ("a\udcff", "is not UTF-8"),
        ("n" * 64, "tensor name states a length of 64 bytes, wanted at most 63"),
    ],
)
def test_bad_tensor_names_are_refused(tmp_path: Path, name: str, message: str) -> None:
    path = builders.llama().with_tensor(0, name=name).write(tmp_path / "bad.gguf")
    with pytest.raises(FormatError, match="offset") as caught:
        open_tensor_file(path)
    assert message in caught.value.message


def test_truncated_data_says_what_is_missing(tmp_path: Path) -> None:
    path = builders.llama().write(tmp_path / "model.gguf")
    size = path.stat().st_size
    os.truncate(path, size - 80_000)
    with pytest.raises(FormatError, match=r"80,000 bytes are missing, 3 of 21 tensors") as caught:
        open_tensor_file(path)
    assert caught.value.tensor == "blk.1.ffn_down.weight"
    assert caught.value.hint == "the file is truncated; download or copy it again"


def test_every_truncation_is_a_format_error(tmp_path: Path) -> None:
    model = builders.llama()
    content, n_header = model.content(), len(model.header())
    path = tmp_path / "model.gguf"
    for length in [*range(0, n_header, 7), n_header, n_header + 31, len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(FormatError):
            open_tensor_file(path)


def test_tensors_beyond_the_end_are_refused(tmp_path: Path) -> None:
    extra = RawTensor("extra.weight", (1 << 40,))
    model = builders.llama()
    path = replace(model, tensors=[*model.tensors, extra]).write(tmp_path / "bad.gguf")
    with pytest.raises(FormatError, match="bytes are missing, 1 of 22 tensors") as caught:
        open_tensor_file(path)
    assert caught.value.tensor == "extra.weight"


@pytest.mark.parametrize(
    ("magic", "hint"),
    [
        (b"FUGG", "big-endian"),
        (b"tjgg", "pre-GGUF"),
        (b"<htm", "web page"),
        (b"PK\3\4", "convert_hf_to_gguf"),
        (b"vers", "git lfs pull"),
        (b"\0\0\0\0", "check that the download finished"),
    ],
)
def test_wrong_magic_hints_at_what_the_file_is(tmp_path: Path, magic: bytes, hint: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(magic + bytes(100))
    with pytest.raises(FormatError) as caught:
        open_tensor_file(path)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize(("version", "hint"), [(1, "convert the model again"), (3 << 24, "endian")])
def test_wrong_version_has_a_hint(tmp_path: Path, version: int, hint: str) -> None:
    path = replace(builders.llama(), version=version).write(tmp_path / "model.gguf")
    with pytest.raises(FormatError) as caught:
        open_tensor_file(path)
    assert hint in (caught.value.hint or "")


@pytest.mark.parametrize("key", ["tokenizer.ggml.model", "general.architecture"])
def test_model_without_tokenizer_or_architecture_is_refused(tmp_path: Path, key: str) -> None:
    path = builders.llama().without(key).write(tmp_path / "model.gguf")
    with pytest.raises(FormatError, match=f"{key} is missing") as caught:
        read(path)
    assert str(path) in caught.value.message
    assert caught.value.hint is not None


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file") as caught:
        open_tensor_file(tmp_path / "absent.gguf")
    assert caught.value.hint is not None


def test_directory_hints_at_a_model_inside(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory") as caught:
        open_tensor_file(tmp_path)
    assert caught.value.hint == "name a .gguf file"
    builders.llama().write(tmp_path / "a.gguf")
    with pytest.raises(ConfigError, match="is a directory") as caught:
        open_tensor_file(tmp_path)
    assert "a.gguf" in (caught.value.hint or "")


def test_fifo_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigError, match="is a FIFO, wanted a regular file"):
        open_tensor_file(tmp_path / "pipe")


def test_device_is_refused() -> None:
    with pytest.raises(ConfigError, match="is a device"):
        open_tensor_file("/dev/zero")


def test_unreadable_file(tmp_path: Path) -> None:
    path = builders.llama().write(tmp_path / "model.gguf")
    path.chmod(0)
    if os.access(path, os.R_OK):
        pytest.skip("this user reads every file")
    with pytest.raises(ConfigError, match="cannot open: Permission denied"):
        open_tensor_file(path)


def test_circle_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match="cannot open"):
        open_tensor_file(tmp_path / "a")


def test_zero_byte_in_a_path() -> None:
    with pytest.raises(ConfigError, match="cannot open"):
        open_tensor_file("a\0b")
