"""Split models whose shards are missing, renamed, mixed up or inconsistent."""

from pathlib import Path

import pytest

import builders
from builders import Pair, RawGguf
from edgert.errors import ConfigError, FormatError
from quant.metadata import ValueType
from quant.tensor_file import open_tensor_file


@pytest.fixture
def shards() -> list[RawGguf]:
    return builders.split(builders.llama(), 3)


def u16(key: str, value: int) -> Pair:
    return builders.scalar(key, ValueType.UINT16, value)


def test_other_shard_says_which_to_open(tmp_path: Path, shards: list[RawGguf]) -> None:
    paths = builders.write_shards(shards, tmp_path)
    for number in (2, 3):
        with pytest.raises(
            ConfigError, match=f"is shard {number} of 3, wanted the first"
        ) as caught:
            open_tensor_file(paths[number - 1])
        assert caught.value.hint == f"open {paths[0]}"


def test_missing_shard_is_named(tmp_path: Path, shards: list[RawGguf]) -> None:
    paths = builders.write_shards(shards, tmp_path)
    paths[1].unlink()
    with pytest.raises(FormatError, match="shard 2 of 3 is missing") as caught:
        open_tensor_file(paths[0])
    assert caught.value.path == paths[1]
    assert caught.value.hint is not None


def test_renamed_shard_says_the_name(tmp_path: Path, shards: list[RawGguf]) -> None:
    path = shards[0].write(tmp_path / "renamed.gguf")
    with pytest.raises(FormatError, match="say shard 1 of 3, the name") as caught:
        open_tensor_file(path)
    assert "NAME-00001-of-00003.gguf" in (caught.value.hint or "")


def test_swapped_shards_are_refused(tmp_path: Path, shards: list[RawGguf]) -> None:
    paths = builders.write_shards([shards[0], shards[2], shards[1]], tmp_path)
    with pytest.raises(FormatError, match=r"split\.no is 2, wanted 1") as caught:
        open_tensor_file(paths[0])
    assert caught.value.path == paths[1]


def test_truncated_shard_is_named(tmp_path: Path, shards: list[RawGguf]) -> None:
    paths = builders.write_shards(shards, tmp_path)
    paths[2].write_bytes(paths[2].read_bytes()[:-200])
    with pytest.raises(FormatError, match="200 bytes are missing") as caught:
        open_tensor_file(paths[0])
    assert caught.value.path == paths[2]


CASES = {
    "count of another split": (1, u16("split.count", 2), r"split\.count is 2, wanted 3"),
    "number as uint32": (1, builders.u32("split.no", 1), r"split\.no is a uint32, wanted a uint16"),
    "count as uint32": (0, builders.u32("split.count", 3), r"split\.count is a uint32"),
    "count of tensors": (
        0,
        builders.scalar("split.tensors.count", ValueType.INT32, 20),
        r"split\.tensors\.count is 20, the 3 shards hold 21 tensors",
    ),
    "more shards than the name says": (0, u16("split.count", 4), "the name"),
}


@pytest.mark.parametrize(("index", "pair", "message"), CASES.values(), ids=CASES.keys())
def test_inconsistent_split_keys_are_refused(
    tmp_path: Path, shards: list[RawGguf], index: int, pair: Pair, message: str
) -> None:
    shards[index] = shards[index].with_pair(pair)
    paths = builders.write_shards(shards, tmp_path)
    with pytest.raises(FormatError, match=message):
        open_tensor_file(paths[0])


@pytest.mark.parametrize("key", ["split.no", "split.tensors.count"])
def test_absent_split_keys_are_refused(tmp_path: Path, shards: list[RawGguf], key: str) -> None:
    shards[0] = shards[0].without(key)
    paths = builders.write_shards(shards, tmp_path)
    with pytest.raises(FormatError, match=f"{key} is missing"):
        open_tensor_file(paths[0])


def test_tensor_in_two_shards_is_refused(tmp_path: Path, shards: list[RawGguf]) -> None:
    shards[2] = shards[2].with_tensor(0, name="token_embd.weight")
    paths = builders.write_shards(shards, tmp_path)
    with pytest.raises(FormatError, match="the name appears twice, first in ") as caught:
        open_tensor_file(paths[0])
    assert caught.value.path == paths[2]
