"""The table of tensor types against ggml itself."""

import ctypes
from pathlib import Path

import llama_cpp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quant.formats import FORMATS, GgmlType, row_bytes, type_named


@pytest.fixture(scope="module")
def ggml() -> ctypes.CDLL:
    library = ctypes.CDLL(str(next(Path(llama_cpp.__file__).parent.glob("lib/*ggml-base.*"))))
    library.ggml_blck_size.restype = ctypes.c_int64
    library.ggml_type_size.restype = ctypes.c_size_t
    library.ggml_type_name.restype = ctypes.c_char_p
    library.ggml_row_size.restype = ctypes.c_size_t
    library.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    return library


def test_every_type_has_a_format() -> None:
    assert set(FORMATS) == set(GgmlType)


@pytest.mark.parametrize("ggml_type", list(GgmlType), ids=lambda t: t.name)
def test_row_equals_ggml(ggml: ctypes.CDLL, ggml_type: GgmlType) -> None:
    entry = FORMATS[ggml_type]
    saw = (entry.name, entry.block_length, entry.block_bytes)
    name = ggml.ggml_type_name(ggml_type).decode()
    assert saw == (name, ggml.ggml_blck_size(ggml_type), ggml.ggml_type_size(ggml_type))
    assert ggml_type.name == name.upper()


# ggml_type_name reads past its table, so the count itself is taken from GGML_TYPE_COUNT of 0.3.36.
@pytest.mark.parametrize("type_id", sorted(set(range(43)) - {int(t) for t in GgmlType}))
def test_removed_types_have_no_block_in_ggml(ggml: ctypes.CDLL, type_id: int) -> None:
    assert ggml.ggml_blck_size(type_id) == 0


@given(st.sampled_from(GgmlType), st.integers(0, 1 << 20))
def test_row_bytes_are_whole_blocks(ggml_type: GgmlType, n_blocks: int) -> None:
    entry = FORMATS[ggml_type]
    assert row_bytes(ggml_type, n_blocks * entry.block_length) == n_blocks * entry.block_bytes


def test_row_bytes_of_hand_worked_block() -> None:
    # Q4_0: 32 weights are 16 bytes of nibbles and a half-precision scale.
    assert row_bytes(GgmlType.Q4_0, 64) == 2 * (16 + 2)
    assert FORMATS[GgmlType.Q4_0].bits_per_weight == 4.5


@pytest.mark.parametrize("n_elements", [31, 33, -32])
def test_partial_blocks_are_refused(n_elements: int) -> None:
    with pytest.raises(ValueError, match="multiple of q4_0's block of 32"):
        row_bytes(GgmlType.Q4_0, n_elements)


def test_types_are_found_by_name() -> None:
    assert type_named("Q8_0") is GgmlType.Q8_0
    assert type_named("q4_K") is GgmlType.Q4_K
    with pytest.raises(ValueError, match="'q4_2' is not a ggml type"):
        type_named("q4_2")
