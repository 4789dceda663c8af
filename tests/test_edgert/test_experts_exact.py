"""Experts that come and go change no bit of any logit, whatever the memory, also in rounds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.engine import Engine, EngineSettings
from edgert.errors import Cancelled, CapacityError
from edgert.experts.keeper import ExpertWeights
from edgert.experts.keeping import CachedExperts
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.llama.runner import LlamaBackend
from edgert.sampling import SamplingParams
from edgert.speculative import NgramDrafter
from make_model import Request, make_model
from native import run, stock_logits, tapped

pytestmark = pytest.mark.model
TEXT = [300 + i % 7 * 11 for i in range(40)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("experts")
    requests = {
        "one file": Request("tiny-moe", folder / "one.gguf"),
        "split": Request("tiny-moe", folder / "split.gguf", n_shards=3),
        "scattered": Request("tiny-moe", folder / "scattered.gguf", scatter=True),
        "q8_0": Request("tiny-moe", folder / "q8.gguf", weight_type="Q8_0"),
        "repeating": Request("tiny-moe", folder / "repeating.gguf", repeat=16),
    }
    return {name: make_model(request)[0] for name, request in requests.items()}


@contextmanager
def opened(path: Path, weight_bytes: int | None, **changes: object) -> Iterator[Backend]:
    options = LoadOptions(
        path, weight_memory_bytes=weight_bytes,
        **{"n_ctx": 64, "n_threads": 1, **changes},  # type: ignore[arg-type]
    )  # fmt: skip
    backend = open_backend(options)
    try:
        yield backend
    finally:
        backend.close()


def keeper(backend: Backend) -> CachedExperts:
    assert isinstance(backend, LlamaBackend)
    assert isinstance(backend._keeper, ExpertWeights)
    return backend._keeper


def needed(path: Path, weight_bytes: int = 1 << 16) -> int:
    with pytest.raises(CapacityError) as caught, opened(path, weight_bytes):
        pass
    assert caught.value.needed_bytes is not None
    return caught.value.needed_bytes


@cache
def repacked_least(path: Path) -> int:
    """The least memory in which everything that is not routed stays, repacked."""
    least, most = needed(path), needed(path) * 4
    while most - least > 1 << 17:
        middle = (least + most) // 2
        try:
            with opened(path, middle) as backend:
                fits = backend.counters().layout == "repacked"
        except CapacityError:
            fits = False
        least, most = (least, middle) if fits else (middle, most)
    return most


def logits_of(backend: Backend) -> list[bytes]:
    def decode(tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        return backend.decode(tokens, position, 1)[0]

    return run(decode)


def check_pools(backend: Backend) -> None:
    """No pool holds more than its slots, and what tables say is in slots that are distinct."""
    cache = keeper(backend).cache
    arena = cache._arena
    by_pool: dict[int, list[int]] = {n: [] for n in range(len(arena.pools))}
    for form in arena.forms:
        held = [slot for slot in cache.slots(form.stack.index) if slot >= 0]
        by_pool[arena.pool_of[form.stack.index]] += held
    for number, slots in by_pool.items():
        pool = arena.pools[number]
        assert len(set(slots)) == len(slots) == pool.n_taken <= pool.n_slots


@pytest.mark.parametrize("name", ["one file", "split", "scattered", "q8_0"])
def test_logits_equal_stock_llama_cpp_at_any_budget(models: dict[str, Path], name: str) -> None:
    path = models[name]
    plain = stock_logits(path)
    repacked = plain if name == "q8_0" else stock_logits(path, repacked=True)
    least, stays = needed(path), repacked_least(path)
    for weight_bytes in (least, (least + stays) // 2, stays, stays + (2 << 20)):
        with opened(path, weight_bytes) as backend:
            counters = backend.counters()
            wanted = repacked if counters.layout == "repacked" else plain
            assert logits_of(backend) == wanted
            if not counters.streaming:
                continue
            check_pools(backend)
            counters = backend.counters()
            assert counters.resident_weight_bytes <= weight_bytes + (1 << 20)
            assert counters.experts is not None
            assert counters.experts.total.wanted >= counters.experts.total.missed > 0


def test_prompt_whose_experts_do_not_fit_at_once_is_computed_in_rounds(
    models: dict[str, Path],
) -> None:
    path = models["one file"]
    with tapped(path) as (context, _):
        wanted = [context.decode(TEXT, 0, 33).tobytes(), context.decode([301], 40, 1).tobytes()]
    with opened(path, needed(path)) as backend:
        cache = keeper(backend).cache
        assert not any(cache.fits(turn, 6) for turn in cache.turns)
        assert backend.decode(TEXT, 0, 33).tobytes() == wanted[0]
        check_pools(backend)
        assert backend.decode([301], 40, 1).tobytes() == wanted[1]


def test_batch_without_logits_has_no_rows_in_the_last_layer(models: dict[str, Path]) -> None:
    path = models["one file"]
    with opened(path, needed(path) * 5 // 4, n_batch=8) as backend:
        backend.decode(TEXT[:8], 0, 0)
        split = backend.decode(TEXT[8:16], 8, 1).tobytes()
        backend.truncate(0)
        backend.decode(TEXT[:8], 0, 1)
        assert backend.decode(TEXT[8:16], 8, 1).tobytes() == split


def test_context_shift_goes_on_exactly(models: dict[str, Path]) -> None:
    path = models["one file"]

    def shifted(weight_bytes: int) -> list[bytes]:
        with opened(path, weight_bytes) as backend:
            for position, token in enumerate(TEXT[:12]):
                backend.decode([token], position, 1)
            backend.shift(2, 5)
            return [backend.decode([TEXT[12 + i]], 7 + i, 1).tobytes() for i in range(4)]

    stays = repacked_least(path)
    assert shifted(stays) == shifted(stays * 3 // 2)


def test_cancelled_pass_leaves_the_next_ones_exact(models: dict[str, Path]) -> None:
    path = models["one file"]
    with opened(path, needed(path) * 5 // 4) as backend:
        wanted = logits_of(backend)
        for n_tokens in (30, 6, 1):
            backend.truncate(0)
            backend.cancel()
            with pytest.raises(Cancelled):
                backend.decode(TEXT[:n_tokens], 0, 1)
            check_pools(backend)
        backend.truncate(0)
        assert logits_of(backend) == wanted


@pytest.mark.parametrize("n_tokens", [6, 30])  # of one token only what matters is seen
@pytest.mark.parametrize("n_nodes", [1, 9, 28, 29, 30, 31, 75, 110])
def test_pass_stopped_at_any_node_leaves_the_next_ones_exact(
    models: dict[str, Path], n_nodes: int, n_tokens: int
) -> None:
    path = models["one file"]
    with opened(path, needed(path) * 5 // 4) as backend:
        wanted = logits_of(backend)
        streamer, seen = keeper(backend).streamer, 0
        backend.truncate(0)
        batch = backend.decode(TEXT[:n_tokens], 0, 1).tobytes()

        class Canceller:
            def before(self, node: int) -> bool:
                nonlocal seen
                seen += 1
                if seen == n_nodes:
                    backend.cancel()
                return streamer.before(node)

            def after(self, node: int) -> None:
                streamer.after(node)

        tap = keeper(backend).tap
        backend.truncate(0)
        tap.observer = Canceller()
        with pytest.raises(Cancelled):
            backend.decode(TEXT[:n_tokens], 0, 1)
        tap.observer = streamer
        check_pools(backend)
        backend.truncate(0)
        assert backend.decode(TEXT[:n_tokens], 0, 1).tobytes() == batch
        backend.truncate(0)
        assert logits_of(backend) == wanted


def test_speculation_changes_no_token(models: dict[str, Path]) -> None:
    path = models["repeating"]
    weight_bytes = repacked_least(path)

    def answer(drafter: NgramDrafter | None) -> tuple[tuple[int, ...], int]:
        with opened(path, weight_bytes, n_ctx=256) as backend:
            engine = Engine(backend, EngineSettings("m", chat_template=None), drafter=drafter)
            prompt = b"".join(backend.vocab.piece(token) for token in TEXT).decode()
            greedy = SamplingParams(temperature=0.0)
            reply = engine.complete(prompt, max_tokens=60, sampling=greedy)
            return reply.token_ids, reply.stats.n_accepted

    plain, _ = answer(None)
    drafted, n_accepted = answer(NgramDrafter())
    assert drafted == plain
    assert n_accepted > 0


def test_memory_for_less_than_one_tokens_experts_says_the_least(models: dict[str, Path]) -> None:
    path = models["one file"]
    with pytest.raises(CapacityError) as caught, opened(path, 1 << 16):
        pass
    assert caught.value.hint is not None
    assert "--memory" in caught.value.hint
    least = caught.value.needed_bytes
    assert least is not None
    with pytest.raises(CapacityError), opened(path, least - 4096):
        pass
    with opened(path, least) as backend:
        assert backend.decode([300], 0, 1).shape[0] == 1
