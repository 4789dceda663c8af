"""The flash reader: every byte arrives where it belongs, and failures name file and offset."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.errors import ConfigError, FormatError
from edgert.llama.lib import load_library
from edgert.weights.flash import PAGE_BYTES, REQUEST_BYTES, Extent, FlashReader
from edgert.weights.memory import Region

SIZE = 2 * REQUEST_BYTES + 12_345


@pytest.fixture
def content(tmp_path: Path) -> tuple[Path, NDArray[np.uint8]]:
    values = np.random.default_rng(0).integers(0, 256, SIZE).astype(np.uint8)
    path = tmp_path / "weights"
    path.write_bytes(values.tobytes())
    return path, values


@pytest.fixture
def region() -> Iterator[Region]:
    region = Region(load_library().libc, 2 * SIZE, huge=False)
    yield region
    region.close()


def at(region: Region, skew: int, size: int) -> NDArray[np.uint8]:
    import ctypes

    array = (ctypes.c_uint8 * size).from_address(region.address + skew)
    return np.frombuffer(array, np.uint8).copy()


@pytest.mark.model
@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize(("offset", "size"), [(0, 10), (777, 5000), (4096, 4096), (5, SIZE - 5)])
def test_any_extent_arrives_whole(
    content: tuple[Path, NDArray[np.uint8]], region: Region, direct: bool, offset: int, size: int
) -> None:
    path, values = content
    reader = FlashReader([path], [SIZE], direct=direct)
    skew = offset % PAGE_BYTES
    reader.read(Extent(0, offset, size, region.address + skew, "w"))
    reader.close()
    assert np.array_equal(at(region, skew, size), values[offset : offset + size])


@pytest.mark.model
def test_a_file_that_shrank_since_is_an_error_with_its_offset(
    content: tuple[Path, NDArray[np.uint8]], region: Region
) -> None:
    path, _ = content
    reader = FlashReader([path], [SIZE])
    with path.open("r+b") as file:
        file.truncate(PAGE_BYTES)
    with pytest.raises(FormatError, match="ended early") as caught:
        reader.read(Extent(0, 0, SIZE, region.address, "blk.3.ffn_up.weight"))
    reader.close()
    assert caught.value.tensor == "blk.3.ffn_up.weight"
    assert caught.value.path == path


@pytest.mark.model
def test_a_device_error_is_an_error_with_its_offset(region: Region) -> None:
    # Reading one's own memory at an unmapped address answers EIO, as a failing disk does.
    memory = Path("/proc/self/mem")
    reader = FlashReader([memory], [0], direct=False)
    reader._sizes_bytes[0] = SIZE
    with pytest.raises(FormatError, match="Input/output error") as caught:
        reader.read(Extent(0, 0, PAGE_BYTES, region.address, "w"))
    reader.close()
    assert caught.value.offset == 0


def test_another_file_in_its_place_is_refused(content: tuple[Path, NDArray[np.uint8]]) -> None:
    with pytest.raises(FormatError, match="it changed"):
        FlashReader([content[0]], [SIZE + 1])


def test_a_missing_file_is_the_callers_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        FlashReader([tmp_path / "none"], [1])
