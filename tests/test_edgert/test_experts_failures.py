"""Experts that cannot be read: the pass ends with a typed error and the next ones are exact."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgert.engine import Engine, EngineSettings
from edgert.errors import CapacityError, FormatError
from edgert.experts.arena import Arena
from edgert.experts.keeper import ExpertWeights
from edgert.experts.keeping import CachedExperts
from edgert.experts.loads import Load
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.llama.runner import LlamaBackend
from edgert.sampling import SamplingParams
from native import run

pytestmark = pytest.mark.model


@pytest.fixture
def model(random_models: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(random_models["experts"], tmp_path / "model.gguf"))


@pytest.fixture
def backend(model: Path) -> Iterator[Backend]:
    opened = open_backend(
        LoadOptions(model, weight_memory_bytes=least(model) * 9 // 8, n_ctx=64, n_threads=1)
    )
    yield opened
    opened.close()


def least(model: Path) -> int:
    with pytest.raises(CapacityError) as caught:
        open_backend(LoadOptions(model, weight_memory_bytes=1 << 16, n_ctx=64, n_threads=1))
    assert caught.value.needed_bytes is not None
    return caught.value.needed_bytes


def keeper(backend: Backend) -> CachedExperts:
    assert isinstance(backend, LlamaBackend)
    assert isinstance(backend._keeper, ExpertWeights)
    return backend._keeper


def decode_on(backend: Backend, position: int) -> None:
    """Decode different tokens until the context is full."""
    for index in range(position, 60):
        backend.decode([300 + 5 * index], index, 1)


class Failing:
    """An arena whose reads fail from the nth on, until it is mended."""

    def __init__(self, arena: Arena, n_good: int) -> None:
        self._arena = arena
        self._bring = arena.bring
        self._lock = threading.Lock()
        self.n_left = n_good
        self.n_failed = 0

    def bring(self, load: Load, number: int) -> None:
        with self._lock:
            self.n_left -= 1
            fails = self.n_left < 0
            self.n_failed += fails
        if fails:
            raise FormatError("cannot be read: I/O error", path="model.gguf")
        self._bring(load, number)

    def mend(self) -> None:
        self.n_left = 1 << 30


def plant(backend: Backend, n_good: int) -> Failing:
    cache = keeper(backend).cache
    failing = Failing(cache._arena, n_good)
    cache._loader._run = failing.bring
    return failing


@pytest.mark.parametrize("n_good", [0, 1, 4, 9, 14])
def test_read_that_fails_ends_the_pass_and_the_next_ones_are_exact(
    backend: Backend, n_good: int
) -> None:
    wanted = run(lambda tokens, position: backend.decode(tokens, position, 1)[0])
    pools = keeper(backend).cache._arena.pools
    failing = plant(backend, n_good)
    with pytest.raises(FormatError, match="I/O error"):
        decode_on(backend, 9)
    assert failing.n_failed
    failing.mend()
    backend.truncate(0)
    assert run(lambda tokens, position: backend.decode(tokens, position, 1)[0]) == wanted
    slots = [s for form in keeper(backend).cache._arena.forms
             for s in keeper(backend).cache.slots(form.stack.index) if s >= 0]  # fmt: skip
    assert len(slots) == sum(pool.n_taken for pool in pools)


def test_file_that_shrinks_is_named_and_closing_still_works(model: Path, backend: Backend) -> None:
    backend.decode([300, 301], 0, 1)
    os.truncate(model, model.stat().st_size // 2)
    with pytest.raises(FormatError) as caught:
        decode_on(backend, 2)
    assert caught.value.path == model
    assert caught.value.tensor is not None
    assert caught.value.offset is not None


def test_reply_that_fails_leaves_the_conversation_usable(backend: Backend) -> None:
    engine = Engine(backend, EngineSettings("m", chat_template=None))
    greedy = SamplingParams(temperature=0.0)
    wanted = engine.complete("once upon", max_tokens=8, sampling=greedy).token_ids
    failing = plant(backend, 3)
    with pytest.raises(FormatError):
        engine.complete("another thing entirely, at length", max_tokens=30, sampling=greedy)
    failing.mend()
    assert engine.complete("once upon", max_tokens=8, sampling=greedy).token_ids == wanted


def test_closing_while_reads_are_under_way_ends_every_thread(model: Path) -> None:
    opened = open_backend(
        LoadOptions(model, weight_memory_bytes=least(model) * 9 // 8, n_ctx=64, n_threads=1)
    )
    opened.decode([300, 301, 302], 0, 1)
    opened.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("edgert-")]
