"""What passes validation, llama.cpp survives; what does not, fails with FormatError only."""

import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import builders
from builders import RawGguf
from mutations import find_killers, flip_bytes, mutate_structure, outcomes, passes_validation

MODEL = builders.llama()
BYTE_PAIRS = builders.with_byte_pairs(MODEL)
CONTENT, N_HEADER = MODEL.content(), len(MODEL.header())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@settings(max_examples=200, deadline=None)
@given(
    position=st.integers(0, N_HEADER - 8),
    value=st.integers(0, 2**64 - 1) | st.sampled_from([0, 1, 2**31, 2**32 - 1, 2**63, 2**64 - 1]),
    width=st.sampled_from("BIQ"),
)
def test_overwritten_headers_raise_format_errors_only(
    folder: Path, position: int, value: int, width: str
) -> None:
    code = struct.Struct(f"<{width}")
    mutated = bytearray(CONTENT)
    code.pack_into(mutated, position, value % (1 << 8 * code.size))
    path = folder / "overwritten.gguf"
    path.write_bytes(mutated)
    passes_validation(path)


def survivors(folder: Path, rng: random.Random, count: int) -> list[Path]:
    """Return mutated files that pass validation, half of them mutated by bytes, half by fields."""
    passed = []
    for number in range(count):
        path = folder / f"{number}.gguf"
        if number % 2:
            path.write_bytes(flip_bytes(CONTENT, N_HEADER, rng))
        else:
            mutate_structure(rng.choice((MODEL, BYTE_PAIRS)), rng).write(path)
        if passes_validation(path):
            passed.append(path)
        else:
            path.unlink()
    return passed


@pytest.mark.parametrize("model", [MODEL, BYTE_PAIRS], ids=["sentencepiece", "byte pairs"])
def test_llama_cpp_decodes_with_the_unmutated_model(folder: Path, model: RawGguf) -> None:
    path = model.write(folder / "unmutated.gguf")
    assert passes_validation(path)
    assert outcomes([path]) == ["decoded 0"]


def test_llama_cpp_survives_what_passes_validation(folder: Path) -> None:
    passed = survivors(folder, random.Random(2024), 120)
    assert len(passed) > 10
    assert find_killers(passed) == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_llama_cpp_survives_many_mutations(tmp_path: Path, seed: int) -> None:
    assert find_killers(survivors(tmp_path, random.Random(seed), 600)) == []


def test_the_search_notices_a_death(folder: Path) -> None:
    # A zero layer count passes no validation; llama.cpp asserts on it.
    path = MODEL.with_pair(builders.u32("llama.block_count", 0)).write(folder / "killer.gguf")
    assert not passes_validation(path)
    ((killer, status),) = find_killers([path])
    assert killer == path
    assert status < 0
