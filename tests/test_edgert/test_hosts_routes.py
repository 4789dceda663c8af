"""Several hosts, joined by links in memory, compute what one does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

import edgert.models
from edgert.errors import Cancelled, LinkError
from edgert.llama.backend import Backend
from edgert.llama.open import open_backend
from hosts_parts import Hosts, options, shared_layers, stages
from part_models import SHAPES, random_model
from quant.parts.spec import PartSpec

pytestmark = pytest.mark.model

TINY = Path(edgert.models.__file__).parent / "tiny-chat.gguf"
MOE = Path(edgert.models.__file__).parent / "tiny-moe.gguf"
N_LAYER = 8
PROMPT = list(range(300, 340))
SPLITS = {"1:1": [2, 2], "3:1": [3, 1], "2:1:1": [2, 1, 1], "four": [1, 1, 1, 1]}


def greedy(backend: Backend, n_tokens: int, n_prompt: int = len(PROMPT)) -> list[int]:
    backend.truncate(0)
    logits = backend.decode(PROMPT[:n_prompt], 0, 1)
    tokens = [int(logits[0].argmax())]
    while len(tokens) < n_tokens:
        position = n_prompt + len(tokens) - 1
        tokens.append(int(backend.decode(tokens[-1:], position, 1)[0].argmax()))
    return tokens


@pytest.fixture(scope="module")
def alone() -> Iterator[Backend]:
    with closing(open_backend(options(TINY))) as backend:
        yield backend


def opened(model: Path, cuts: list[int], where: list[bool], folder: Path) -> Hosts:
    ends = [*cuts, N_LAYER]
    parts = []
    for first, end, at_home in zip([0, *cuts], ends, where, strict=True):
        head = "whole" if end == N_LAYER else "none"
        parts.append((PartSpec(first, end, embedding=False, head=head), at_home))
    return stages(model, parts, folder)


@pytest.mark.parametrize("name", SPLITS)
def test_shared_layers_answer_token_for_token_as_one_host(
    name: str, alone: Backend, tmp_path: Path
) -> None:
    with closing(shared_layers(TINY, SPLITS[name], tmp_path)) as hosts:
        assert greedy(hosts.backend, 100) == greedy(alone, 100)
        assert not hosts.errors


@pytest.mark.parametrize("name", ["llama", "qwen2", "llama-q4_0", "qwen3"])
def test_odd_shares_sum_to_the_whole(name: str, tmp_path: Path) -> None:
    model = random_model(SHAPES[name]).write(tmp_path / "model.gguf")
    prompt = [5, 6, 7, 9, 11, 30]
    with (
        closing(open_backend(options(model))) as whole,
        closing(shared_layers(model, [2, 1], tmp_path)) as hosts,
    ):
        wanted = whole.decode(prompt, 0, 3)
        found = hosts.backend.decode(prompt, 0, 3)
        tolerance = 1e-3 if name != "llama-q4_0" else 0.05  # f16 cache; activations in 8 bits
        assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


def test_a_ring_sums_as_a_star_does(alone: Backend, tmp_path: Path) -> None:
    with closing(shared_layers(TINY, [2, 1, 1], tmp_path, ring=True)) as hosts:
        assert greedy(hosts.backend, 40) == greedy(alone, 40)


def test_parts_of_the_vocabulary_come_home_whole_or_as_candidates(
    alone: Backend, tmp_path: Path
) -> None:
    with closing(shared_layers(TINY, [2, 2], tmp_path, by_rows=True)) as hosts:
        alone.truncate(0)
        wanted = alone.decode(PROMPT, 0, 2).copy()
        found = hosts.backend.decode(PROMPT, 0, 2)
        assert found.shape == wanted.shape
        assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)
        before = hosts.links[0].received_bytes
        hosts.backend.n_candidates = 8
        some = hosts.backend.decode(PROMPT[:1], len(PROMPT), 1)[0].copy()
        alone_some = alone.decode(PROMPT[:1], len(PROMPT), 1)[0]
        assert some.argmax() == alone_some.argmax()
        half = len(some) // 2
        assert np.isfinite(some[half:]).sum() == 8
        n_sums = 2 * N_LAYER
        assert hosts.links[0].received_bytes - before < n_sums * (256 * 4 + 20) + 200


@pytest.mark.parametrize("where", [[True, False], [False, True], [True, False, True]])
def test_stages_compute_bit_for_bit_what_one_host_does(
    where: list[bool], alone: Backend, tmp_path: Path
) -> None:
    cuts = [3] if len(where) == 2 else [2, 7]
    alone.truncate(0)
    with closing(opened(TINY, cuts, where, tmp_path)) as hosts:
        for tokens, position in ((PROMPT[:16], 0), ([7], 16), ([9, 11], 17)):
            wanted = alone.decode(tokens, position, 1)
            assert hosts.backend.decode(tokens, position, 1).tobytes() == wanted.tobytes()


def test_chunks_of_a_prompt_go_through_stages_one_behind_the_other(
    alone: Backend, tmp_path: Path
) -> None:
    with closing(opened(TINY, [2, 6], [True, False, False], tmp_path)) as hosts:
        assert greedy(hosts.backend, 20) == greedy(alone, 20)
        assert not hosts.errors


def test_a_mixture_of_experts_runs_in_stages(tmp_path: Path) -> None:
    with (
        closing(open_backend(options(MOE))) as whole,
        closing(opened(MOE, [4], [True, False], tmp_path)) as hosts,
    ):
        assert greedy(hosts.backend, 10, 16) == greedy(whole, 10, 16)


def test_layers_at_home_alone_keep_the_head_there(alone: Backend, tmp_path: Path) -> None:
    parts = [
        (PartSpec(0, 3, embedding=False, head="none"), True),
        (PartSpec(3, N_LAYER, embedding=False, head="none"), False),
        (PartSpec(N_LAYER, N_LAYER, embedding=False, head="whole"), True),
    ]
    with closing(stages(TINY, parts, tmp_path)) as hosts:
        assert greedy(hosts.backend, 20, 16) == greedy(alone, 20, 16)


def cancelled(hosts: Hosts) -> None:
    """Cancel a decode while it runs."""
    timer = threading.Timer(0.01, hosts.backend.cancel)
    timer.start()

    def decode_on() -> None:
        for _ in range(100):
            hosts.backend.decode(PROMPT, 0, 0)

    with pytest.raises(Cancelled):
        decode_on()
    timer.join()


def test_a_cancelled_step_leaves_every_host_ready_for_the_next(
    alone: Backend, tmp_path: Path
) -> None:
    with closing(shared_layers(TINY, [2, 2], tmp_path)) as hosts:
        cancelled(hosts)
        hosts.backend.truncate(0)
        assert greedy(hosts.backend, 20) == greedy(alone, 20)
        assert not hosts.errors


@pytest.mark.parametrize("kind", ["shares", "stages"])
def test_positions_are_forgotten_and_renumbered_everywhere(
    kind: str, alone: Backend, tmp_path: Path
) -> None:
    make: Callable[[], Hosts] = (
        (lambda: shared_layers(TINY, [3, 1], tmp_path))
        if kind == "shares"
        else (lambda: opened(TINY, [4], [True, False], tmp_path))
    )
    with closing(make()) as hosts:
        for backend in (alone, hosts.backend):
            backend.truncate(0)
            backend.decode(PROMPT, 0, 0)
            backend.truncate(30)
            backend.shift(4, 10)
        wanted = alone.decode([7], 20, 1)
        found = hosts.backend.decode([7], 20, 1)
        assert found.argmax() == wanted.argmax()
        assert np.linalg.norm(found - wanted) <= 1e-2 * np.linalg.norm(wanted)


def test_a_host_that_fails_is_named_at_home(tmp_path: Path) -> None:
    with closing(shared_layers(TINY, [2, 2], tmp_path)) as hosts:
        hosts.backend.decode(PROMPT, 0, 0)
        hosts.links[0].close()
        with pytest.raises(LinkError, match="h1"):
            hosts.backend.decode([7], len(PROMPT), 1)


def test_a_step_that_a_host_cannot_run_is_its_error_and_ends_the_link(tmp_path: Path) -> None:
    with closing(opened(TINY, [4], [True, False], tmp_path)) as hosts:
        hosts.runners[0].close()
        with pytest.raises(LinkError, match="closed"):
            hosts.backend.decode(PROMPT[:16], 0, 1)
        assert hosts.errors


def test_of_a_prompt_only_the_rows_come_back_that_a_head_at_home_wants(
    alone: Backend, tmp_path: Path
) -> None:
    parts = [
        (PartSpec(0, 3, embedding=False, head="none"), True),
        (PartSpec(3, N_LAYER, embedding=False, head="none"), False),
        (PartSpec(N_LAYER, N_LAYER, embedding=False, head="whole"), True),
    ]
    alone.truncate(0)
    with closing(stages(TINY, parts, tmp_path)) as hosts:
        before = hosts.links[0].received_bytes
        for first in (0, 16, 32):  # as one host computes them, so that rows are equal to the bit
            end = min(first + 16, len(PROMPT))
            n_logits = 3 if end == len(PROMPT) else 0
            wanted = alone.decode(PROMPT[first:end], first, n_logits)
            found = hosts.backend.decode(PROMPT[first:end], first, n_logits)
            assert found[:n_logits].tobytes() == wanted[:n_logits].tobytes()
        assert hosts.links[0].received_bytes - before == 3 * (20 + 4 + 4) + 3 * 4 * 256
        hosts.backend.truncate(30)
        hosts.backend.shift(4, 10)
        alone.truncate(30)
        alone.shift(4, 10)
        assert hosts.backend.decode([7], 20, 1).argmax() == alone.decode([7], 20, 1).argmax()
