"""Parts of a model, run one after the other or side by side, compute what the whole model does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf.quants import dequantize

import edgert.models
from edgert.llama.context import LlamaContext
from edgert.llama.lib import TensorFields, load_library, tensor_at
from edgert.llama.tap import Capture, Floats, Tap, node_values
from native import tapped
from part_models import SHAPES, make_part, random_model
from quant.model_spec import ModelSpec, read_model_spec
from quant.nested.source import TensorReader
from quant.parts.cuts import vocabulary_rows
from quant.parts.rules import LAYERS_VERIFIED, SHARES_VERIFIED
from quant.parts.spec import HeadRows, PartSpec, Share
from quant.tensor_file import open_tensor_file

pytestmark = pytest.mark.model

EMBEDDED = Path(edgert.models.__file__).parent
# One model of each architecture; qwen3moe is that of tiny-moe, llama that of tiny-chat.
PLAIN = ("qwen2", "qwen3", "mistral3", "ernie4_5", "exaone", "seed_oss")
STEPS = ([*range(40, 52)], [7], [9], [11, 12, 13])
Decode = Callable[[LlamaContext], Floats]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    made = {name: random_model(s).write(folder / f"{name}.gguf") for name, s in SHAPES.items()}
    return made | {name: EMBEDDED / f"{name}.gguf" for name in ("tiny-chat", "tiny-moe")}


class Chain:
    """Parts whose hidden states enter one another; every position's logits of the last ones."""

    def __init__(self, model: Path, specs: Sequence[PartSpec], folder: Path) -> None:
        self._stack = ExitStack()
        self.parts: list[tuple[LlamaContext, Tap, Capture | None]] = []
        for index, spec in enumerate(specs):
            part = make_part(model, spec, folder / f"{index}.gguf")
            read_model_spec(part.file)
            context, tap = self._stack.enter_context(tapped(part.file.path))
            last = f"l_out-{spec.n_layer - 1}"
            capture = tap.capture(last, stop=True) if spec.head == "none" else None
            self.parts.append((context, tap, capture))

    def close(self) -> None:
        """Free the models."""
        self._stack.close()

    def __call__(self, tokens: Sequence[int], position: int) -> Floats:
        """Decode tokens; parts of the vocabulary are joined."""
        hidden, logits = np.empty(0, np.float32), []
        for index, (context, tap, capture) in enumerate(self.parts):
            tap.begin()
            if index == 0:
                out = context.decode(tokens, position, len(tokens))
            else:
                out = context.decode_hidden(hidden, position, len(tokens))
            tap.raise_error()
            if capture is None:
                logits.append(out.copy())
            elif capture.value is not None:
                hidden = capture.value
        return np.concatenate(logits, axis=1)


def n_layer(model: Path) -> int:
    return read_model_spec(open_tensor_file(model)).n_layer


def chains(n: int) -> dict[str, list[PartSpec]]:
    """Ways to cut n layers."""
    return {
        "two parts": [PartSpec(0, 1, True, "none"), PartSpec(1, n, False, "whole")],
        "three parts": [PartSpec(0, 2, True, "none"), PartSpec(2, 3, False, "none"),
                        PartSpec(3, n, False, "whole")],
        "head of its own": [PartSpec(0, 1, True, "none"), PartSpec(1, n, False, "none"),
                            PartSpec(n, n, False, "whole")],
    }  # fmt: skip


@pytest.mark.parametrize("way", ["two parts", "three parts", "head of its own"])
@pytest.mark.parametrize("name", ["tiny-chat", "tiny-moe", "llama-fused", *PLAIN, "phi3"])
def test_logits_of_parts_are_those_of_the_whole_model_to_the_bit(
    models: dict[str, Path], tmp_path: Path, name: str, way: str
) -> None:
    specs = chains(n_layer(models[name]))[way]
    with tapped(models[name]) as (whole, _):
        chain, position = Chain(models[name], specs, tmp_path), 0
        try:
            for tokens in STEPS:
                wanted = whole.decode(tokens, position, len(tokens))
                assert chain(tokens, position).tobytes() == wanted.tobytes()
                position += len(tokens)
        finally:
            chain.close()


# Kernels take rows in tiles, so that other numbers of rows round the last bits otherwise.
@pytest.mark.parametrize("name", ["tiny-chat", "tiny-moe", "qwen2"])
def test_logits_of_rows_of_the_vocabulary_are_joined(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    spec = read_model_spec(open_tensor_file(models[name]))
    n, end = spec.n_layer, spec.n_vocab
    rows = [HeadRows(0, 100), HeadRows(100, end - 1), HeadRows(end - 1, end)]
    specs = [PartSpec(0, n, True, "none"), *(PartSpec(n, n, False, head) for head in rows)]
    with tapped(models[name]) as (whole, _):
        chain, position = Chain(models[name], specs, tmp_path), 0
        try:
            for tokens in STEPS:
                wanted = whole.decode(tokens, position, len(tokens))
                logits = chain(tokens, position)
                np.testing.assert_allclose(logits, wanted, rtol=1e-4, atol=1e-4)
                assert (logits.argmax(axis=1) == wanted.argmax(axis=1)).all()
                position += len(tokens)
        finally:
            chain.close()


class Summing:
    """Sums the two products of each layer over hosts that run in threads."""

    def __init__(self, barrier: threading.Barrier, values: dict[int, Floats], host: int) -> None:
        self._barrier, self._values, self._host = barrier, values, host
        self.n_sums = 0

    def before(self, node: int) -> bool:
        """Look at products over heads and over the FFN's columns."""
        return self._product(node) is not None

    def after(self, node: int) -> None:
        """Replace the output by the sum over hosts."""
        tensor = self._product(node)
        if tensor is None:
            return
        view = node_values(tensor)
        self._values[self._host] = view.copy()
        self._barrier.wait()
        total = np.sum([self._values[host] for host in sorted(self._values)], axis=0)
        self._barrier.wait()
        view[...] = total
        self.n_sums += 1

    def _product(self, node: int) -> TensorFields | None:
        tensor = tensor_at(node)
        name = tensor_at(tensor.src[0]).name if tensor.src[0] else b""
        wanted = name.endswith((b"attn_output.weight", b"ffn_down.weight"))
        return tensor if wanted else None


class Hosts:
    """Parts that run all layers side by side."""

    def __init__(self, model: Path, bounds: Sequence[int], folder: Path) -> None:
        self._stack = ExitStack()
        self._embeddings = embeddings(model)
        spec = read_model_spec(open_tensor_file(model))
        barrier = threading.Barrier(len(bounds) - 1, timeout=60)
        values: dict[int, Floats] = {}
        self.parts: list[tuple[LlamaContext, Tap, Summing]] = []
        for host in range(len(bounds) - 1):
            part = make_part(model, share_of(spec, bounds, host), folder / f"{host}.gguf")
            context, tap = self._stack.enter_context(tapped(part.file.path))
            tap.observer = summing = Summing(barrier, values, host)
            self.parts.append((context, tap, summing))

    def close(self) -> None:
        """Free the models."""
        self._stack.close()

    def __call__(self, tokens: Sequence[int], position: int) -> Floats:
        """Decode tokens on all hosts; each has the logits of a part of the vocabulary."""
        logits: dict[int, Floats] = {}

        def run(host: int) -> None:
            context, tap, _ = self.parts[host]
            tap.begin()
            hidden = self._embeddings[list(tokens)]
            logits[host] = context.decode_hidden(hidden, position, len(tokens)).copy()
            tap.raise_error()

        threads = [threading.Thread(target=run, args=(host,)) for host in range(len(self.parts))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return np.concatenate([logits[host] for host in range(len(self.parts))], axis=1)


def share_of(spec: ModelSpec, bounds: Sequence[int], host: int) -> PartSpec:
    share = Share(bounds[host], bounds[host + 1], bounds[-1])
    rows = HeadRows(*vocabulary_rows(spec.n_vocab, share))
    return PartSpec(0, spec.n_layer, False, rows, share)


def embeddings(model: Path) -> Floats:
    """Look up every token."""
    file = open_tensor_file(model)
    entry = file.tensor("token_embd.weight")
    with TensorReader(file) as reader:
        data = reader.data(entry, 0, entry.size_bytes).reshape(entry.shape[1], -1)
    rows: Floats = dequantize(data, GGMLQuantizationType(int(entry.ggml_type))).astype(np.float32)
    return rows


# Sums in another order differ in their last bits. Before a product with quantized weights they are
# rounded to 8 bits, and as keys and values to halves: a difference can grow to a step of those.
SHARED = [
    ("tiny-chat", (0, 3, 4), 2e-2),
    ("tiny-chat", (0, 1, 2, 4), 2e-2),
    ("qwen2", (0, 2, 3), 1e-3),
    ("qwen2", (0, 1, 2, 3), 1e-3),
    ("qwen3", (0, 1, 3), 1e-3),
    *((name, (0, 2, 3), 1e-3) for name in ("llama-fused", *PLAIN) if name != "qwen2"),
    ("llama-biased", (0, 1, 3), 1e-3),
]


@pytest.mark.parametrize(("name", "bounds", "most"), SHARED)
def test_shares_of_hosts_sum_to_the_whole_model(
    models: dict[str, Path], tmp_path: Path, name: str, bounds: tuple[int, ...], most: float
) -> None:
    tokens, position = [*range(40, 52)], 0
    with tapped(models[name]) as (whole, _):
        hosts = Hosts(models[name], bounds, tmp_path)
        try:
            for _ in range(50):
                wanted = whole.decode(tokens, position, len(tokens))
                logits = hosts(tokens, position)
                error = np.linalg.norm(logits - wanted) / np.linalg.norm(wanted)
                assert error < most
                position += len(tokens)
                if name == "tiny-chat":  # random models have near ties
                    assert logits[-1].argmax() == wanted[-1].argmax()
                tokens = [int(wanted[-1].argmax())]
        finally:
            hosts.close()
    assert {summing.n_sums for *_, summing in hosts.parts} == {50 * 2 * n_layer(models[name])}


@pytest.mark.parametrize("name", ["tiny-chat", *PLAIN, "qwen2-tied-f16", "llama-q4_0"])
def test_one_share_of_everything_is_the_whole_model_to_the_bit(
    models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    n_groups = read_model_spec(open_tensor_file(models[name])).n_head_kv_per_layer[0]
    with tapped(models[name]) as (whole, _):
        hosts, position = Hosts(models[name], (0, n_groups), tmp_path), 0
        try:
            for tokens in STEPS:
                wanted = whole.decode(tokens, position, len(tokens))
                assert hosts(tokens, position).tobytes() == wanted.tobytes()
                position += len(tokens)
        finally:
            hosts.close()


def test_every_verified_architecture_is_verified_here() -> None:
    shared = {SHAPES[name].architecture for name in PLAIN} | {"llama"}
    assert shared == SHARES_VERIFIED
    assert shared | {"phi3", "qwen3moe"} == LAYERS_VERIFIED


def test_entrance_has_the_tokenizer_and_the_embeddings(
    models: dict[str, Path], tmp_path: Path
) -> None:
    model = models["tiny-chat"]
    part = make_part(model, PartSpec(0, 0, True, "none"), tmp_path / "entrance.gguf")
    assert embeddings(part.file.path).tobytes() == embeddings(model).tobytes()
    assert tokenized(part.file.path) == tokenized(model)


def tokenized(path: Path) -> list[int]:
    """Let llama.cpp open a file for its tokenizer alone."""
    api = load_library().api
    params = api.llama_model_default_params()
    params.vocab_only = True
    model = api.llama_model_load_from_file(str(path).encode(), params)
    assert model
    try:
        from edgert.llama.vocab import Vocab

        return Vocab(load_library(), api.llama_model_get_vocab(model)).tokenize("Once upon a time")
    finally:
        api.llama_model_free(model)
