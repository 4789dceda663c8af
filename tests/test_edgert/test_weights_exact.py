"""Streaming changes no bit of any logit, in any layout, at any budget."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.errors import CapacityError
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from native import run, stock_logits

LAYOUTS = ("plain", "split", "scattered", "tied", "experts", "q8_0", "f16")


def logits_of(backend: Backend) -> list[bytes]:
    def decode(tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        return backend.decode(tokens, position, 1)[0]

    return run(decode)


def open_with(path: Path, weight_bytes: int | None, **changes: object) -> Backend:
    options = LoadOptions(path, weight_memory_bytes=weight_bytes, n_ctx=64, n_threads=1)
    for name, value in changes.items():
        object.__setattr__(options, name, value)
    return open_backend(options)


def smallest_budget(path: Path) -> int:
    """What the error says is needed is exactly what suffices."""
    with pytest.raises(CapacityError) as caught:
        open_with(path, 1 << 16)
    needed = caught.value.needed_bytes
    assert needed is not None
    return needed


@pytest.mark.model
@pytest.mark.parametrize("layout", LAYOUTS)
def test_streamed_logits_equal_stock_llama_cpp(random_models: dict[str, Path], layout: str) -> None:
    path = random_models[layout]
    wanted = stock_logits(path)
    budget = smallest_budget(path)
    for weight_bytes in (budget * 9 // 8, budget):
        backend = open_with(path, weight_bytes)
        try:
            assert logits_of(backend) == wanted
            counters = backend.counters()
            assert counters.resident_weight_bytes <= weight_bytes + (1 << 20)
            assert counters.streaming
            assert counters.bytes_read > 0
        finally:
            backend.close()


@pytest.mark.model
@pytest.mark.parametrize("layout", ["plain", "split", "scattered", "experts"])
def test_packed_and_resident_logits_equal_repacked_llama_cpp(
    random_models: dict[str, Path], layout: str, tmp_path: Path
) -> None:
    path = random_models[layout]
    wanted = stock_logits(path, repacked=True)
    resident = open_with(path, None)
    try:
        assert logits_of(resident) == wanted
        assert resident.counters().layout == "repacked"
    finally:
        resident.close()
    budget = smallest_budget(path) * 9 // 8
    for mode in ("auto", "only"):
        packed = open_with(path, budget, packed=mode, packed_folder=tmp_path)
        try:
            assert logits_of(packed) == wanted
            assert packed.counters().streaming
        finally:
            packed.close()


@pytest.mark.model
@pytest.mark.data
@pytest.mark.parametrize("precision", ["f32", "f16"])
@pytest.mark.parametrize("weight_bytes", [None, 400_000])
def test_stories_model_tells_the_published_story(
    shared_data: Path, precision: str, weight_bytes: int | None
) -> None:
    folder = shared_data / "llm" / "stories260K"
    backend = open_with(
        folder / "derived" / f"stories260K-{precision}.gguf", weight_bytes, n_ctx=256
    )
    try:
        tokens, text = backend.vocab.tokenize(""), b""
        for position in range(200):
            logits = backend.decode(tokens, position, 1)
            tokens = [int(logits[0].argmax())]
            text += backend.vocab.piece(tokens[0])
    finally:
        backend.close()
    published = (folder / "expected_greedy_200.txt").read_text(encoding="utf-8")
    assert text.decode().strip() == published.strip()
