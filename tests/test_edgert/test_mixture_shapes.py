"""Experts come and go exactly in every kind of mixture, or the model is refused by name."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgert.errors import BackendError, CapacityError, FormatError
from edgert.experts.binding import chosen_experts
from edgert.experts.gating import Gating
from edgert.experts.keeper import ExpertWeights
from edgert.experts.predictor import RouterPredictor
from edgert.experts.widths import WidthPolicy
from edgert.llama.backend import Backend
from edgert.llama.lib import load_library, tensor_at
from edgert.llama.open import open_backend
from edgert.llama.options import LoadOptions
from edgert.llama.runner import LlamaBackend
from moe_models import (
    N_EXPERT,
    N_LAYER,
    Mixture,
    deepseek2,
    gpt_oss,
    grovemoe,
    mixtral,
    qwen2moe,
    write_mixture,
)
from native import PROMPT, run, stock_logits, tapped
from quant.nested.encoder import ModelEncoder
from quant.nested.source import TensorReader
from quant.nested.writer import NestedRequest, write_nested
from quant.tensor_file import open_tensor_file

pytestmark = pytest.mark.model
MIXED = {"0.ffn_down_exps.weight": "Q6_K", "2.ffn_down_exps.weight": "Q5_1"}
MIXTURES: dict[str, tuple[Mixture, int]] = {
    "mixtral": (replace(mixtral(), expert_type="Q4_K", changed=MIXED), 1),
    "qwen2moe": (replace(qwen2moe(), changed={"gate_inp_shexp.weight": "F16"}), 1),
    "gpt-oss": (gpt_oss(), 1),
    "gpt-oss in q5_0": (replace(gpt_oss(), expert_type="Q5_0"), 1),
    "deepseek2": (deepseek2(), 1),
    "deepseek2 fused": (replace(deepseek2(), fused=True), 1),
    "deepseek2 split": (deepseek2(), 3),
    "gpt-oss split": (gpt_oss(), 4),
}
NESTED = ["mixtral", "qwen2moe", "gpt-oss", "deepseek2", "deepseek2 fused", "deepseek2 split"]


@contextmanager
def opened(path: Path, weight_bytes: int | None = None, **changes: object) -> Iterator[Backend]:
    options = LoadOptions(
        path, weight_memory_bytes=weight_bytes,
        **{"n_ctx": 64, "n_threads": 1, **changes},  # type: ignore[arg-type]
    )  # fmt: skip
    backend = open_backend(options)
    try:
        yield backend
    finally:
        backend.close()


def logits_of(backend: Backend) -> list[bytes]:
    def decode(tokens: Sequence[int], position: int) -> NDArray[np.float32]:
        return backend.decode(tokens, position, 1)[0]

    backend.truncate(0)
    return run(decode)


def least_bytes(path: Path) -> int:
    with pytest.raises(CapacityError) as caught, opened(path, 1 << 12):
        pass
    assert caught.value.needed_bytes is not None
    return caught.value.needed_bytes


def nested(source: Path, out: Path) -> Path:
    with TensorReader(open_tensor_file(source)) as reader, out.open("w+b") as stream:
        request = NestedRequest(2, 8, "0" * 64)
        write_nested(stream, reader, request, ModelEncoder(reader, (2, 8)), lambda *_: None)
    return out


def check_evictions(backend: Backend) -> None:
    """More was read than slots can hold, so some of it took the place of something else."""
    assert isinstance(backend, LlamaBackend)
    assert isinstance(backend._keeper, ExpertWeights)
    experts = backend.counters().experts
    assert experts is not None
    assert experts.total.missed > sum(pool.n_slots for pool in backend._keeper.plan.pools)


@pytest.mark.parametrize("name", MIXTURES)
def test_logits_equal_those_of_everything_in_memory(name: str, tmp_path: Path) -> None:
    path = write_mixture(MIXTURES[name][0], tmp_path / "model.gguf", MIXTURES[name][1])
    plain = stock_logits(path)
    with opened(path) as backend:
        everything = logits_of(backend)
        all_bytes = backend.counters().resident_weight_bytes
    routed = [t for t in open_tensor_file(path).tensors if "_exps.weight" in t.name]
    assert len(routed) == (N_LAYER - ("deep" in name)) * (2 if "fused" in name else 3)
    routed_bytes = sum(tensor.size_bytes for tensor in routed)
    for weight_bytes in (least_bytes(path), all_bytes - routed_bytes * 3 // 5):
        with opened(path, weight_bytes) as backend:
            wanted = everything if backend.counters().layout == "repacked" else plain
            for _ in range(3):
                assert logits_of(backend) == wanted
            check_evictions(backend)
            assert backend.counters().resident_weight_bytes <= weight_bytes + (1 << 20)


@pytest.mark.parametrize("name", NESTED)
def test_widest_width_is_the_source(name: str, tmp_path: Path) -> None:
    mixture, n_shards = (
        replace(MIXTURES[name][0], expert_type="Q8_0", changed={}),
        MIXTURES[name][1],
    )
    source = write_mixture(mixture, tmp_path / "source.gguf", n_shards)
    path = nested(source, tmp_path / "nested.gguf")
    plain = stock_logits(source)
    with opened(path, least_bytes(path)) as backend:
        for _ in range(2):
            assert logits_of(backend) == plain
        experts = backend.counters().experts
        assert experts is not None
        assert experts.total.missed > 0
    changes = {"expert_bits": (3, 8), "expert_cuts": (0.6,), "exact_bits": True}
    with opened(path, **changes) as backend:
        mixed = logits_of(backend)
    assert mixed != plain
    with opened(path, **changes) as backend:
        assert logits_of(backend) == mixed


def test_mxfp4_nested_is_near_its_source(tmp_path: Path) -> None:
    source = write_mixture(gpt_oss(), tmp_path / "source.gguf")
    path = nested(source, tmp_path / "nested.gguf")
    wanted = _rows(stock_logits(source))
    errors = []
    for bits in ((8,), (4,), (2,)):
        with opened(path, expert_bits=bits) as backend:
            errors.append(np.linalg.norm(_rows(logits_of(backend)) - wanted))
    assert errors[0] < 0.1 * np.linalg.norm(wanted)
    assert errors == sorted(errors)


def _rows(logits: list[bytes]) -> NDArray[np.float32]:
    return np.array([np.frombuffer(row, np.float32) for row in logits])


class _Weights:
    """Keeps what `Gating` says of a layer's choice, and what llama.cpp then weighs it by."""

    def __init__(self, last: bytes) -> None:
        self._last = last
        self._gating = Gating(load_library())
        self.found: list[NDArray[np.float32]] = []
        self.wanted: list[NDArray[np.float32]] = []

    def before(self, node: int) -> bool:
        name = tensor_at(node).name
        return name in (b"ffn_moe_topk-1", self._last)

    def after(self, node: int) -> None:
        tensor = tensor_at(node)
        if tensor.name == self._last:
            values = (ctypes.c_float * (2 * len(PROMPT))).from_address(tensor.data)
            self.wanted.append(np.array(values).reshape(-1, 2))
        else:
            self.found.append(self._gating.weights(tensor, chosen_experts(tensor, N_EXPERT)))


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("mixtral", b"ffn_moe_weights_norm-1"),
        ("gpt-oss", b"ffn_moe_weights_softmax-1"),
        ("deepseek2", b"ffn_moe_weights_norm-1"),
    ],
)
def test_weights_of_choices_are_those_of_the_graph(name: str, last: bytes, tmp_path: Path) -> None:
    path = write_mixture(MIXTURES[name][0], tmp_path / "model.gguf")
    observer = _Weights(last)
    with tapped(path) as (context, tap):
        tap.observer = observer
        context.decode(PROMPT, 0, 1)
        tap.raise_error()
    shares = observer.found[0] / observer.found[0].sum(axis=1, keepdims=True)
    assert np.allclose(shares, observer.wanted[0], rtol=1e-4)
    assert shares.std() > 0.01


def test_bits_follow_weights_that_a_bias_kept_from_coming_in_order() -> None:
    weights = np.array([[0.15, 0.5, 0.05, 0.3]], np.float32)
    assert WidthPolicy((2, 4, 8), (0.4, 0.9)).levels(weights).tolist() == [[1, 2, 0, 1]]


def test_experts_that_are_ruled_out_teach_nothing() -> None:
    router = np.eye(3, dtype=np.float32)
    predictor, inputs = RouterPredictor({1: router}), np.ones((1, 3), np.float32)
    for _ in range(3):
        assert np.isfinite(predictor.guess(1, inputs)).all()
        predictor.chose(1, np.array([[0.9, 0.2, -np.inf]], np.float32))
    guess = predictor.guess(1, inputs)
    assert guess[0] > guess[2] == 1 > guess[1]


def test_experts_chosen_by_unnamed_ids_stream_whole(tmp_path: Path) -> None:
    path = write_mixture(grovemoe(), tmp_path / "model.gguf")
    plain = stock_logits(path)
    with opened(path, least_bytes(path) * 2) as backend:
        assert logits_of(backend) == plain
        assert backend.counters().streaming
        assert backend.counters().experts is None


def test_nested_experts_chosen_by_unnamed_ids_are_refused(tmp_path: Path) -> None:
    source = write_mixture(replace(grovemoe(), expert_type="Q8_0"), tmp_path / "source.gguf")
    path = nested(source, tmp_path / "nested.gguf")
    with pytest.raises(BackendError, match="nested") as caught, opened(path):
        pass
    assert caught.value.hint


def test_gate_and_up_in_one_stack_are_refused_where_the_graph_has_none(tmp_path: Path) -> None:
    path = write_mixture(replace(qwen2moe(), fused=True), tmp_path / "model.gguf")
    with pytest.raises(BackendError, match="ffn_gate_exps") as caught, opened(path):
        pass
    assert caught.value.hint


def test_numbers_of_experts_that_differ_by_layer_are_refused(tmp_path: Path) -> None:
    mixture = mixtral()
    keys = dict(mixture.keys) | {"expert_used_count": [2] * (N_LAYER - 1) + [1]}
    path = write_mixture(replace(mixture, keys=keys), tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="expert_used_count is 1 to 2") as caught, opened(path):
        pass
    assert caught.value.hint


def test_experts_in_tensors_of_their_own_are_refused(tmp_path: Path) -> None:
    mixture = mixtral()
    layers = tuple((*layer, ("ffn_up.0", (256, 256))) for layer in mixture.layers)
    path = write_mixture(replace(mixture, layers=layers), tmp_path / "model.gguf")
    with pytest.raises(FormatError, match="stacked") as caught, opened(path):
        pass
    assert "convert" in (caught.value.hint or "")


def test_a_llama4_of_which_every_layer_rotates_is_refused(tmp_path: Path) -> None:
    path = write_mixture(replace(mixtral(), architecture="llama4"), tmp_path / "model.gguf")
    with (
        pytest.raises(FormatError, match=r"llama4\.block_count is 3, wanted at least 4"),
        opened(path),
    ):
        pass
