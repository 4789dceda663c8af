"""Every type of tensors: its name, block length and block bytes. Nothing here reads files."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class GgmlType(IntEnum):
    """Type ids of tensors in GGUF files.

    Source: `enum ggml_type`, ggml/include/ggml.h of llama.cpp in llama-cpp-python 0.3.36.
    The ids missing here (4, 5, 31 to 33, 36 to 38) were removed from the format.
    """

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


_FIRST_NESTED = 0x4E00_0000


class NestedType(IntEnum):
    """Type ids of experts in nested precision, base and top width in the lowest bytes.

    They are edgert's own: ggml has no such types and refuses a file with them.
    """

    NESTED_2_4 = 0x4E00_0204
    NESTED_3_4 = 0x4E00_0304
    NESTED_4_4 = 0x4E00_0404
    NESTED_2_5 = 0x4E00_0205
    NESTED_3_5 = 0x4E00_0305
    NESTED_4_5 = 0x4E00_0405
    NESTED_5_5 = 0x4E00_0505
    NESTED_2_8 = 0x4E00_0208
    NESTED_3_8 = 0x4E00_0308
    NESTED_4_8 = 0x4E00_0408
    NESTED_5_8 = 0x4E00_0508
    NESTED_6_8 = 0x4E00_0608
    NESTED_7_8 = 0x4E00_0708
    NESTED_8_8 = 0x4E00_0808

    @property
    def base(self) -> int:
        """Narrowest width."""
        return self >> 8 & 0xFF

    @property
    def top(self) -> int:
        """Widest width, that of the whole code."""
        return self & 0xFF


TensorType = GgmlType | NestedType


@dataclass(frozen=True, slots=True)
class GgmlFormat:
    """How one type lies in memory: `block_length` elements in `block_bytes` bytes."""

    name: str
    block_length: int
    block_bytes: int

    @property
    def bits_per_weight(self) -> float:
        """Average bits of one element, scales included."""
        return 8 * self.block_bytes / self.block_length


FORMATS: dict[GgmlType, GgmlFormat] = {
    GgmlType.F32: GgmlFormat("f32", 1, 4),
    GgmlType.F16: GgmlFormat("f16", 1, 2),
    GgmlType.Q4_0: GgmlFormat("q4_0", 32, 18),
    GgmlType.Q4_1: GgmlFormat("q4_1", 32, 20),
    GgmlType.Q5_0: GgmlFormat("q5_0", 32, 22),
    GgmlType.Q5_1: GgmlFormat("q5_1", 32, 24),
    GgmlType.Q8_0: GgmlFormat("q8_0", 32, 34),
    GgmlType.Q8_1: GgmlFormat("q8_1", 32, 36),
    GgmlType.Q2_K: GgmlFormat("q2_K", 256, 84),
    GgmlType.Q3_K: GgmlFormat("q3_K", 256, 110),
    GgmlType.Q4_K: GgmlFormat("q4_K", 256, 144),
    GgmlType.Q5_K: GgmlFormat("q5_K", 256, 176),
    GgmlType.Q6_K: GgmlFormat("q6_K", 256, 210),
    GgmlType.Q8_K: GgmlFormat("q8_K", 256, 292),
    GgmlType.IQ2_XXS: GgmlFormat("iq2_xxs", 256, 66),
    GgmlType.IQ2_XS: GgmlFormat("iq2_xs", 256, 74),
    GgmlType.IQ3_XXS: GgmlFormat("iq3_xxs", 256, 98),
    GgmlType.IQ1_S: GgmlFormat("iq1_s", 256, 50),
    GgmlType.IQ4_NL: GgmlFormat("iq4_nl", 32, 18),
    GgmlType.IQ3_S: GgmlFormat("iq3_s", 256, 110),
    GgmlType.IQ2_S: GgmlFormat("iq2_s", 256, 82),
    GgmlType.IQ4_XS: GgmlFormat("iq4_xs", 256, 136),
    GgmlType.I8: GgmlFormat("i8", 1, 1),
    GgmlType.I16: GgmlFormat("i16", 1, 2),
    GgmlType.I32: GgmlFormat("i32", 1, 4),
    GgmlType.I64: GgmlFormat("i64", 1, 8),
    GgmlType.F64: GgmlFormat("f64", 1, 8),
    GgmlType.IQ1_M: GgmlFormat("iq1_m", 256, 56),
    GgmlType.BF16: GgmlFormat("bf16", 1, 2),
    GgmlType.TQ1_0: GgmlFormat("tq1_0", 256, 54),
    GgmlType.TQ2_0: GgmlFormat("tq2_0", 256, 66),
    GgmlType.MXFP4: GgmlFormat("mxfp4", 32, 17),
    GgmlType.NVFP4: GgmlFormat("nvfp4", 64, 36),
    GgmlType.Q1_0: GgmlFormat("q1_0", 128, 18),
    GgmlType.Q2_0: GgmlFormat("q2_0", 64, 18),
}


NESTED_FORMATS: dict[NestedType, GgmlFormat] = {
    kind: GgmlFormat(kind.name.lower(), 32, 2 + 4 * kind.top) for kind in NestedType
}


_BY_NAME: dict[str, TensorType] = {
    known.name.lower(): tensor_type
    for table in (FORMATS, NESTED_FORMATS)
    for tensor_type, known in table.items()
}


def known_type(type_id: int) -> TensorType:
    """Return the type of an id in a file; ValueError if there is none."""
    return NestedType(type_id) if type_id >= _FIRST_NESTED else GgmlType(type_id)


def format_of(tensor_type: TensorType) -> GgmlFormat:
    """Return how a type lies in memory."""
    if isinstance(tensor_type, NestedType):
        return NESTED_FORMATS[tensor_type]
    return FORMATS[tensor_type]


def type_named(name: str) -> TensorType:
    """Return the type of a name such as `q8_0`, in any case; ValueError if there is none."""
    try:
        return _BY_NAME[name.lower()]
    except KeyError:
        raise ValueError(f"{name!r} is not a ggml type") from None


def row_bytes(ggml_type: TensorType, n_elements: int) -> int:
    """Return the bytes of a row of `n_elements`.

    Raises:
        ValueError: `n_elements` is negative or not a multiple of the type's block length.
    """
    entry = format_of(ggml_type)
    if n_elements < 0 or n_elements % entry.block_length:
        raise ValueError(
            f"a row of {n_elements} elements is not a multiple of "
            f"{entry.name}'s block of {entry.block_length}"
        )
    return n_elements // entry.block_length * entry.block_bytes
